"""Datagrams in pieces, and whether reassembly makes them whole: ours (tests), the kernel's (netns).

A plan is the pieces of a datagram of 56 bytes of payload in the order in which they come: where one
begins, its size, and "." if it says to be the last. The kernel's part is what Linux 6.18 does.
"""

import struct

from packet_script import checksum

PAYLOAD_BYTES = 56
_FRAGMENT = 44

PLANS = {
    # plan: (IPv4, IPv6): whether a datagram comes out
    "0+24 24+32.": (True, True),
    "24+32. 0+24": (True, True),
    "24+32. 8+16 0+8": (True, True),
    "0+24 0+24 24+32.": (True, True),  # repeated
    "0+48 8+8 48+8.": (True, True),  # inside what is there
    "0+8 8+8 0+16 16+40.": (True, True),  # inside two that followed each other
    "8+8 0+8 0+16 16+40.": (False, False),  # these did not
    "0+32 24+32.": (False, False),
    "0+32 24+32. 0+24 24+32.": (True, True),  # an overlap, and all once more
    "24+32. 24+24. 0+24": (False, True),  # two ends
    "24+32. 56+8 0+24": (False, True),  # behind the last one: IPv6 loses that piece alone
    "0+24 24+0 24+32.": (False, True),
    "0+56 56+0.": (False, False),
    "0+20 24+32.": (False, False),
    "0+8 8+48.": (True, True),  # the header of UDP is whole
    "24+32.": (False, False),
}


def sizes(plan: str) -> list[tuple[int, int, bool]]:
    """(offset, bytes, more) of every piece."""
    pieces = []
    for word in plan.split():
        offset, size = word.rstrip(".").split("+")
        pieces.append((int(offset), int(size), not word.endswith(".")))
    return pieces


def cut(plan: str, source: bytes, destination: bytes, identifier: int) -> list[bytes]:
    """The pieces of a UDP datagram, port 40000 to 53, as packets."""
    body = struct.pack("!HHHH", 40000, 53, PAYLOAD_BYTES, 0) + bytes(PAYLOAD_BYTES - 8)
    pseudo = source + destination + struct.pack("!IHH", len(body), 0, 17)
    body = body[:6] + struct.pack("!H", checksum(pseudo + body)) + body[8:]
    packets = []
    for offset, size, more in sizes(plan):
        piece = (body + bytes(64))[offset : offset + size]
        if len(source) == 4:
            field = offset // 8 | more << 13
            head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + size, identifier, field, 64, 17, 0)
            head += source + destination
            packets.append(head[:10] + struct.pack("!H", checksum(head)) + head[12:] + piece)
        else:
            head = struct.pack("!IHBB", 6 << 28, 8 + size, _FRAGMENT, 64) + source + destination
            packets.append(head + struct.pack("!BBHI", 17, 0, offset | more, identifier) + piece)
    return packets
