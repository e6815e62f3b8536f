"""TCP segments that end a connection at both of its ends, or have them speak. Pure.

Those that end it are made of one packet of the connection. Its sender believes a RST whose number
is the one that it acknowledged last; its receiver one that continues what it has (RFC 9293 3.10.7,
RFC 5961 3.2). If the packet was not the next one for its receiver, that RST is answered with an
acknowledgment, of which another pair is made, and then the numbers fit.
"""

from struct import Struct

from conntrack.flow import FlowTuple
from conntrack.packet import Packet, TcpFlag
from conntrack.tcp_window import ACKED, MODULUS_MASK, UNKNOWN, Window

_IPV4 = Struct("!BBHHHBBH4s4s")
_IPV6 = Struct("!IHBB16s16s")
_TCP = Struct("!HHIIBBHHH")
_PORTS = Struct("!HH")

_ACK, _RST = TcpFlag.ACK, TcpFlag.RST

_PROTOCOL = 6
_DONT_FRAGMENT = 0x4000
_HOP_LIMIT = 64
"""RFC 1700, default TTL."""


def resets(packet: Packet) -> tuple[bytes, ...]:
    """Return whole IP packets with RST, for the sender and the receiver of a TCP packet.

    A sender that has just sent RST gets none.
    """
    flags = packet.tcp_flags
    acknowledges = bool(flags & TcpFlag.ACK)
    onward = _segment(
        (packet.source, packet.source_port),
        (packet.destination, packet.destination_port),
        _RST | _ACK if acknowledges else _RST,
        packet.sequence,
        packet.acknowledgment if acknowledges else 0,
    )
    if flags & TcpFlag.RST:
        return (onward,)
    length = packet.payload_bytes + bool(flags & TcpFlag.SYN) + bool(flags & TcpFlag.FIN)
    back = _segment(
        (packet.destination, packet.destination_port),
        (packet.source, packet.source_port),
        _RST if acknowledges else _RST | _ACK,
        packet.acknowledgment if acknowledges else 0,
        0 if acknowledges else (packet.sequence + length) & MODULUS_MASK,
    )
    return back, onward


def questions(original: FlowTuple, windows: tuple[Window, Window] | None) -> tuple[bytes, bytes]:
    """Return whole IP packets that both ends of a connection answer with an acknowledgment.

    Each looks like a keep-alive of the other end (RFC 9293 3.8.4): its number lies before what the
    receiver has, so that it says nothing, and must be answered (3.10.7.4). Numbers that are not
    known, or too old, lie outside of the window as well, but for one in a thousand (a window of
    4 MiB in 4 GiB of numbers).

    Args:
        original: the tuple of the connection's first packet.
        windows: what its sender and its receiver have sent, None = not known.
    """
    of_source, of_destination = windows or (UNKNOWN, UNKNOWN)
    source = original.source, original.source_port
    destination = original.destination, original.destination_port
    return (
        _question(source, destination, of_source, of_destination),
        _question(destination, source, of_destination, of_source),
    )


def ends_of(segment: bytes) -> FlowTuple:
    """Return the tuple of a segment that was made here."""
    at, size = (12, 4) if segment[0] >> 4 == 4 else (8, 16)
    source, destination = segment[at : at + size], segment[at + size : at + 2 * size]
    return FlowTuple(source, destination, _PROTOCOL, *_PORTS.unpack_from(segment, at + 2 * size))


def readdressed(segment: bytes, ends: FlowTuple) -> bytes:
    """Return a segment that was made here, between other ends of the same family."""
    at = _IPV4.size if segment[0] >> 4 == 4 else _IPV6.size
    _, _, sequence, acknowledgment, _, flags, _, _, _ = _TCP.unpack_from(segment, at)
    source, destination = ends.source, ends.destination
    return _segment(
        (source, ends.source_port), (destination, ends.destination_port),
        flags, sequence, acknowledgment,
    )  # fmt: skip


def _question(
    source: tuple[bytes, int], destination: tuple[bytes, int], sender: Window, receiver: Window
) -> bytes:
    known = receiver.max_ack if receiver.flags & ACKED else sender.initial
    acknowledged = sender.max_ack if sender.flags & ACKED else receiver.initial
    return _segment(source, destination, _ACK, (known - 1) & MODULUS_MASK, acknowledged)


def _segment(
    source: tuple[bytes, int],
    destination: tuple[bytes, int],
    flags: int,
    sequence: int,
    acknowledgment: int,
) -> bytes:
    """Return a segment with its IP header; the kernel fills in IPv4's checksum (raw(7))."""
    ends = source[0] + destination[0]
    ports = source[1], destination[1]

    def tcp(checksum: int) -> bytes:
        offset = _TCP.size // 4 << 4
        return _TCP.pack(*ports, sequence, acknowledgment, offset, flags, 0, checksum, 0)

    pseudo = ends + _PROTOCOL.to_bytes(4, "big") + _TCP.size.to_bytes(4, "big")
    segment = tcp(_checksum(pseudo + tcp(0)))
    if len(source[0]) == 4:
        total = _IPV4.size + _TCP.size
        head = 0x45, 0, total, 0, _DONT_FRAGMENT, _HOP_LIMIT, _PROTOCOL, 0
        return _IPV4.pack(*head, source[0], destination[0]) + segment
    return _IPV6.pack(6 << 28, _TCP.size, _PROTOCOL, _HOP_LIMIT, *_halves(ends)) + segment


def _halves(ends: bytes) -> tuple[bytes, bytes]:
    return ends[:16], ends[16:]


def _checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total = sum(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
