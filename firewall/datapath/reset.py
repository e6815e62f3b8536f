"""TCP segments that end a connection at both of its ends. Pure.

Both are made of one packet of the connection. Its sender believes a RST whose number is the one
that it acknowledged last; its receiver one that continues what it has (RFC 9293 3.10.7, RFC 5961
3.2). If the packet was not the next one for its receiver, that RST is answered with an
acknowledgment, of which another pair is made, and then the numbers fit.
"""

from struct import Struct

from conntrack.packet import Packet, TcpFlag

_IPV4 = Struct("!BBHHHBBH4s4s")
_IPV6 = Struct("!IHBB16s16s")
_TCP = Struct("!HHIIBBHHH")

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
        packet.version,
        (packet.source, packet.source_port),
        (packet.destination, packet.destination_port),
        packet.sequence,
        packet.acknowledgment if acknowledges else None,
    )
    if flags & TcpFlag.RST:
        return (onward,)
    length = packet.payload_bytes + bool(flags & TcpFlag.SYN) + bool(flags & TcpFlag.FIN)
    back = _segment(
        packet.version,
        (packet.destination, packet.destination_port),
        (packet.source, packet.source_port),
        packet.acknowledgment if acknowledges else 0,
        None if acknowledges else (packet.sequence + length) & 0xFFFFFFFF,
    )
    return back, onward


def _segment(
    version: int,
    source: tuple[bytes, int],
    destination: tuple[bytes, int],
    sequence: int,
    acknowledgment: int | None,
) -> bytes:
    """Return one RST with its IP header; the kernel fills in IPv4's checksum (raw(7))."""
    flags = TcpFlag.RST if acknowledgment is None else TcpFlag.RST | TcpFlag.ACK
    ends = source[0] + destination[0]
    ports = source[1], destination[1]

    def tcp(checksum: int) -> bytes:
        offset = _TCP.size // 4 << 4
        return _TCP.pack(*ports, sequence, acknowledgment or 0, offset, flags, 0, checksum, 0)

    pseudo = ends + _PROTOCOL.to_bytes(4, "big") + _TCP.size.to_bytes(4, "big")
    segment = tcp(_checksum(pseudo + tcp(0)))
    if version == 4:
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
