"""Packets to a pcapng file, block by block. Pure.

Input -> output: `head` once, then `packet` for each, then `tail`; their bytes in this order are a
file that Wireshark, tcpdump and scapy read. Without `tail` it is complete too: whoever is killed
while writing leaves a good file. Packets begin with their IP header (LINKTYPE_RAW).

Source: draft-ietf-opsawg-pcapng, sections 4.1 (section header), 4.2 (interface description), 4.3
(enhanced packet), 4.6 (interface statistics), 3.5 (options).
"""

from struct import Struct
from typing import Final

LINKTYPE_RAW: Final = 101  # tcpdump.org/linktypes.html

_SECTION, _INTERFACE, _STATISTICS, _PACKET = 0x0A0D0D0A, 1, 5, 6
_ORDER_MAGIC: Final = 0x1A2B3C4D
_NANOSECONDS: Final = b"\x09"  # if_tsresol: 10^-9
_COMMENT, _APPLICATION = 1, 4
_NAME, _RESOLUTION = 2, 9
_DROP_COUNT = 4  # epb_dropcount
_RECEIVED, _DROPPED = 4, 5  # isb_ifrecv, isb_ifdrop

_WORDS = Struct("<II")
_OPTION = Struct("<HH")
_SECTION_BODY = Struct("<IHHq")
_INTERFACE_BODY = Struct("<HHI")
_PACKET_BODY = Struct("<IIIII")
_STATISTICS_BODY = Struct("<III")
_COUNT = Struct("<Q")
_LENGTH = Struct("<I")
_COMMENT_MAX_BYTES: Final = 4096  # an option holds 65,535; a comment is for people


def head(application: str, interface: str, snapshot_bytes: int) -> bytes:
    """Return the section header and the one interface.

    Args:
        application: who writes the file.
        interface: name that every packet is shown with.
        snapshot_bytes: most that is kept of a packet.
    """
    section = _SECTION_BODY.pack(_ORDER_MAGIC, 1, 0, -1)  # of unknown length
    section += _option(_APPLICATION, application.encode()) + _END
    link = _INTERFACE_BODY.pack(LINKTYPE_RAW, 0, snapshot_bytes)
    link += _option(_NAME, interface.encode()) + _option(_RESOLUTION, _NANOSECONDS) + _END
    return _block(_SECTION, section) + _block(_INTERFACE, link)


def packet(time_ns: int, data: bytes, length: int, comment: str, lost_count: int = 0) -> bytes:
    """Return the block of one packet.

    Args:
        time_ns: nanoseconds since the epoch.
        data: what is kept of it, from the IP header on.
        length: bytes on the wire; never less than `data` has.
        comment: text to show with it; cut after 4096 bytes.
        lost_count: packets that are missing between the one before and this one.
    """
    body = _PACKET_BODY.pack(0, time_ns >> 32, time_ns & 0xFFFFFFFF, len(data), length)
    text = comment.encode()[:_COMMENT_MAX_BYTES].decode(errors="ignore").encode()
    body += _padded(data) + _option(_COMMENT, text)
    if lost_count:
        body += _option(_DROP_COUNT, _COUNT.pack(lost_count))
    return _block(_PACKET, body + _END)


def tail(time_ns: int, count: int, lost_count: int) -> bytes:
    """Return the statistics: how many packets there are, and how many are missing."""
    body = _STATISTICS_BODY.pack(0, time_ns >> 32, time_ns & 0xFFFFFFFF)
    body += _option(_RECEIVED, _COUNT.pack(count + lost_count))
    return _block(_STATISTICS, body + _option(_DROPPED, _COUNT.pack(lost_count)) + _END)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _option(code: int, value: bytes) -> bytes:
    return _OPTION.pack(code, len(value)) + _padded(value)


def _block(kind: int, body: bytes) -> bytes:
    total = 12 + len(body)
    return _WORDS.pack(kind, total) + body + _LENGTH.pack(total)


_END: Final = _OPTION.pack(0, 0)
