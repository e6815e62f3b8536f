"""Bytes of one IP packet become a value that cannot be nonsense, or a named fault.

Input → output: `parse(data)` takes one packet from the version nibble on and returns a `Packet`, or
raises `PacketError` with exactly one `Fault`. There is no third outcome for any input.

Rules
    - Every length that the packet states is compared with the header that contains it. A statement
      that contradicts the outer one is a fault, never a guess.
    - The kernel may have copied only the head of a packet (`complete=False`). Then bytes may be
      missing at the end, but every header must lie inside the copy: a packet whose transport
      header was not seen is `TRUNCATED`, because its ports are unknown.
    - Packets arrive reassembled. Whatever still carries a fragment offset or "more fragments" is
      `FRAGMENT`. An IPv6 fragment header with neither (RFC 6946) holds a whole packet and is
      walked like any other extension header.
    - Things that are legal syntax but that a strict tracker refuses (source routes, routing header
      type 0, a missing UDP checksum over IPv6) are `Oddity` bits, and the tracker decides.

`Packet.key` is the flow's hash key, cut from the packet without making objects: source address,
destination address, then 4 bytes (ports; or ICMP identifier, type, code), then the protocol number
where it is not TCP. Bytes hash with a keyed SipHash in CPython, so an attacker cannot choose tuples
that collide (integers and tuples of integers do not).

Not handled: IPv4 and IPv6 jumbo datagrams (length 0 or RFC 2675: `BAD_LENGTH`), checksums unless
`verify=True` (the kernel has checked them, or the sender's card has yet to compute them).

Sources: RFC 791, RFC 8200, RFC 9293, RFC 768, RFC 9260, RFC 792, RFC 4443.
"""

from enum import IntFlag
from struct import Struct
from typing import Final, NamedTuple

from conntrack.checksum import transport_is_intact
from conntrack.extensions import NO_NEXT, walk_extensions
from conntrack.fault import Fault, Oddity, PacketError
from conntrack.flow import GRE, ICMP, ICMPV6, SCTP, TCP, UDP
from conntrack.quote import ICMPV6_REDIRECT, PPP, Quoted, is_error, read_quote, read_redirect

__all__ = [
    "Fault",
    "Oddity",
    "Packet",
    "PacketError",
    "Quoted",
    "TcpFlag",
    "parse",
    "policy_port",
]


class TcpFlag(IntFlag):
    """Bits of byte 13 of the TCP header (RFC 9293 section 3.1)."""

    FIN = 0x01
    SYN = 0x02
    RST = 0x04
    PSH = 0x08
    ACK = 0x10
    URG = 0x20
    ECE = 0x40
    CWR = 0x80


class Packet:
    """One whole IP packet as the tracker and the policy see it.

    Attributes:
        version: 4 or 6.
        protocol: upper-layer protocol number, after IPv6 extension headers.
        source: packed address, network order.
        destination: packed address, network order.
        source_port: TCP, UDP and SCTP, host order; 0 otherwise.
        destination_port: as `source_port`.
        icmp_type: ICMP and ICMPv6; -1 otherwise.
        icmp_code: ICMP and ICMPv6; -1 otherwise.
        icmp_id: identifier of an ICMP query; 0 otherwise.
        tcp_flags: bits of `TcpFlag`; 0 otherwise.
        length: bytes of the whole packet, by the IP header.
        hop_limit: TTL or hop limit.
        key: see the module header.
        sequence: TCP sequence number; SCTP verification tag; ICMP and ICMPv6: the 4 bytes after
            the checksum (an error's path MTU or pointer); 0 otherwise.
        acknowledgment: TCP acknowledgment number; 0 otherwise.
        window: TCP window as sent, not scaled; 0 otherwise.
        payload_bytes: data after the transport header, by the stated lengths.
        options: TCP options, or the SCTP chunks that were copied; empty otherwise.
        oddities: bits of `Oddity`.
        quoted: what an ICMP error quotes; None if it is not an error or the quote is unreadable.
    """

    __slots__ = (
        "acknowledgment",
        "destination",
        "destination_port",
        "hop_limit",
        "icmp_code",
        "icmp_id",
        "icmp_type",
        "key",
        "length",
        "oddities",
        "options",
        "payload_bytes",
        "protocol",
        "quoted",
        "sequence",
        "source",
        "source_port",
        "tcp_flags",
        "version",
        "window",
    )

    def __init__(  # noqa: PLR0917 -- once per packet: keywords cost
        self,
        version: int,
        protocol: int,
        source: bytes,
        destination: bytes,
        source_port: int,
        destination_port: int,
        icmp_type: int,
        icmp_code: int,
        icmp_id: int,
        tcp_flags: int,
        length: int,
        hop_limit: int,
        key: bytes,
        sequence: int,
        acknowledgment: int,
        window: int,
        payload_bytes: int,
        options: bytes,
        oddities: int,
        quoted: Quoted | None,
    ) -> None:
        self.version = version
        self.protocol = protocol
        self.source = source
        self.destination = destination
        self.source_port = source_port
        self.destination_port = destination_port
        self.icmp_type = icmp_type
        self.icmp_code = icmp_code
        self.icmp_id = icmp_id
        self.tcp_flags = tcp_flags
        self.length = length
        self.hop_limit = hop_limit
        self.key = key
        self.sequence = sequence
        self.acknowledgment = acknowledgment
        self.window = window
        self.payload_bytes = payload_bytes
        self.options = options
        self.oddities = oddities
        self.quoted = quoted


# One Struct per header that is met on the hot path; `x` skips what no decision needs.
_IPV4_TCP: Final = Struct("!BxHxxHBBxx4s4sHHIIBBH")
_IPV4_UDP: Final = Struct("!BxHxxHBBxx4s4sHHH")
_IPV6_TCP: Final = Struct("!4xHxB16s16sHHIIBBH")
_IPV4: Final = Struct("!BxHxxHBBxx4s4s")
_IPV6: Final = Struct("!4xHBB16s16s")
_TCP: Final = Struct("!HHIIBBH")
_UDP: Final = Struct("!HHHH")
_SCTP: Final = Struct("!HHI")
_ICMP: Final = Struct("!BBxxH")

_MORE_OR_OFFSET: Final = 0x3FFF  # "more fragments" and the 13-bit offset (RFC 791 section 3.1)
_IPV4_BYTES: Final = 20
_IPV6_BYTES: Final = 40
_TCP_BYTES: Final = 20
_UDP_BYTES: Final = 8
_SCTP_BYTES: Final = 12
_ICMP_BYTES: Final = 8

_UDP_SUFFIX: Final = bytes((UDP,))
_SCTP_SUFFIX: Final = bytes((SCTP,))


def parse(data: bytes, *, complete: bool = True, verify: bool = False) -> Packet:
    """Read one packet.

    Args:
        data: the packet from its first IP byte; link-layer padding after it is ignored.
        complete: False if the kernel copied only the head: then the payload may be shorter than
            the lengths say, but every header must be there.
        verify: check the transport checksum (and the IPv4 header's); only for complete packets
            whose checksum the sender has filled in.

    Raises:
        PacketError: the bytes are not a whole, trackable packet.
    """
    size = len(data)
    if size < _IPV4_BYTES:
        raise PacketError(Fault.TRUNCATED)
    first = data[0]
    if first == 0x45:
        protocol = data[9]
        if protocol == TCP and size >= 40:
            packet = _parse_plain_ipv4_tcp(data, size, complete)
        elif protocol == UDP and size >= 28:
            packet = _parse_plain_ipv4_udp(data, size, complete)
        else:
            packet = _parse_ipv4(data, size, complete)
    elif first >> 4 == 6:
        if size >= 60 and data[6] == TCP:
            packet = _parse_plain_ipv6_tcp(data, size, complete)
        else:
            packet = _parse_ipv6(data, size, complete)
    elif first >> 4 == 4:
        packet = _parse_ipv4(data, size, complete)
    else:
        raise PacketError(Fault.BAD_VERSION)
    if verify and complete and not transport_is_intact(data[: packet.length], packet.protocol):
        raise PacketError(Fault.BAD_CHECKSUM)
    return packet


def policy_port(packet: Packet) -> int:
    """What a policy rule compares its port with: destination port, ICMP type, or 0."""
    return packet.icmp_type if packet.icmp_type >= 0 else packet.destination_port


def _parse_plain_ipv4_tcp(data: bytes, size: int, complete: bool) -> Packet:
    total: int
    fragment: int
    offset: int
    (
        _,
        total,
        fragment,
        hop_limit,
        _,
        source,
        destination,
        source_port,
        destination_port,
        sequence,
        acknowledgment,
        offset,
        flags,
        window,
    ) = _IPV4_TCP.unpack_from(data)
    if fragment & _MORE_OR_OFFSET:
        raise PacketError(Fault.FRAGMENT)
    start = 20 + (offset >> 4 << 2)
    if total > size and complete:
        raise PacketError(Fault.TRUNCATED)
    if start != 40:
        _check_data_offset(start - 20, total - 20, size - 20)
    elif total < 40:
        raise PacketError(Fault.BAD_LENGTH if total < _IPV4_BYTES else Fault.TRUNCATED)
    return Packet(
        4, TCP, source, destination, source_port, destination_port, -1, -1, 0,
        flags, total, hop_limit, data[12:24], sequence, acknowledgment, window,
        total - start, data[40:start], 0, None,
    )  # fmt: skip


def _parse_plain_ipv4_udp(data: bytes, size: int, complete: bool) -> Packet:
    total: int
    fragment: int
    stated: int
    (
        _,
        total,
        fragment,
        hop_limit,
        _,
        source,
        destination,
        source_port,
        destination_port,
        stated,
    ) = _IPV4_UDP.unpack_from(data)
    if total < _IPV4_BYTES:
        raise PacketError(Fault.BAD_LENGTH)
    if total > size and complete:
        raise PacketError(Fault.TRUNCATED)
    if fragment & _MORE_OR_OFFSET:
        raise PacketError(Fault.FRAGMENT)
    if total < _IPV4_BYTES + _UDP_BYTES:
        raise PacketError(Fault.TRUNCATED)
    if stated < _UDP_BYTES or stated > total - _IPV4_BYTES:
        raise PacketError(Fault.BAD_LENGTH)
    return Packet(
        4, UDP, source, destination, source_port, destination_port, -1, -1, 0,
        0, total, hop_limit, data[12:24] + _UDP_SUFFIX, 0, 0, 0,
        stated - _UDP_BYTES, b"", 0, None,
    )  # fmt: skip


def _parse_plain_ipv6_tcp(data: bytes, size: int, complete: bool) -> Packet:
    payload: int
    offset: int
    (
        payload,
        hop_limit,
        source,
        destination,
        source_port,
        destination_port,
        sequence,
        acknowledgment,
        offset,
        flags,
        window,
    ) = _IPV6_TCP.unpack_from(data)
    start = 40 + (offset >> 4 << 2)
    total = payload + _IPV6_BYTES
    if total > size and complete:
        raise PacketError(Fault.TRUNCATED)
    _check_data_offset(start - 40, payload, size - 40)
    return Packet(
        6, TCP, source, destination, source_port, destination_port, -1, -1, 0,
        flags, total, hop_limit, data[8:44], sequence, acknowledgment, window,
        total - start, data[60:start], 0, None,
    )  # fmt: skip


def _check_data_offset(header_bytes: int, segment_bytes: int, copied_bytes: int) -> None:
    if segment_bytes < _TCP_BYTES or copied_bytes < _TCP_BYTES:
        raise PacketError(Fault.BAD_LENGTH if segment_bytes < 0 else Fault.TRUNCATED)
    if header_bytes < _TCP_BYTES or header_bytes > segment_bytes:
        raise PacketError(Fault.BAD_HEADER_LENGTH)
    if header_bytes > copied_bytes:
        raise PacketError(Fault.TRUNCATED)


def _parse_ipv4(data: bytes, size: int, complete: bool) -> Packet:
    first, total, fragment, hop_limit, protocol, source, destination = _IPV4.unpack_from(data)
    start = (first & 0x0F) * 4
    if start < _IPV4_BYTES:
        raise PacketError(Fault.BAD_HEADER_LENGTH)
    if total < start:
        raise PacketError(Fault.BAD_LENGTH)
    if size < start or (complete and size < total):
        raise PacketError(Fault.TRUNCATED)
    if fragment & _MORE_OR_OFFSET:
        raise PacketError(Fault.FRAGMENT)
    oddities = _ipv4_oddities(data, start) if start > _IPV4_BYTES else 0
    head = _Head(4, protocol, source, destination, total, hop_limit, oddities)
    return _parse_transport(head, data[: min(size, total)], start)


def _ipv4_oddities(data: bytes, end: int) -> int:
    """Walk the options once (RFC 791 section 3.1) and note a source route.

    Raises:
        PacketError: an option's length is under 2 or leaves the header.
    """
    oddities = 0
    at = _IPV4_BYTES
    while at < end:
        kind = data[at]
        if kind == 0:  # end of list: what follows is padding
            break
        if kind == 1:  # no operation: one byte long
            at += 1
            continue
        if at + 1 >= end or data[at + 1] < 2 or at + data[at + 1] > end:
            raise PacketError(Fault.BAD_OPTION)
        if kind in (131, 137):
            oddities |= Oddity.SOURCE_ROUTE
        at += data[at + 1]
    return int(oddities)


def _parse_ipv6(data: bytes, size: int, complete: bool) -> Packet:
    if size < _IPV6_BYTES:
        raise PacketError(Fault.TRUNCATED)
    payload, following, hop_limit, source, destination = _IPV6.unpack_from(data)
    total = payload + _IPV6_BYTES
    if complete and size < total:
        raise PacketError(Fault.TRUNCATED)
    end = min(size, total)
    protocol, start, oddities, offset = walk_extensions(data, following, _IPV6_BYTES, end)
    if offset:
        raise PacketError(Fault.FRAGMENT)
    if protocol == NO_NEXT:
        raise PacketError(Fault.NO_TRANSPORT)
    if start > end:
        # The chain states more than it has: more than the copy is truncation, more than the
        # packet is a lie.
        raise PacketError(Fault.BAD_LENGTH if start > total else Fault.TRUNCATED)
    head = _Head(6, protocol, source, destination, total, hop_limit, oddities)
    return _parse_transport(head, data[:end], start)


class _Head(NamedTuple):
    """What the IP header said; the transport parsers add their part."""

    version: int
    protocol: int
    source: bytes
    destination: bytes
    total: int
    hop_limit: int
    oddities: int


def _parse_transport(head: _Head, data: bytes, start: int) -> Packet:
    """Read the transport header at `start`; `data` ends with the packet or the copy."""
    protocol = head.protocol
    if protocol == UDP:
        return _parse_udp(head, data, start)
    if protocol == TCP:
        return _parse_tcp(head, data, start)
    if protocol in (ICMP, ICMPV6):
        if (protocol == ICMP) != (head.version == 4):
            raise PacketError(Fault.WRONG_FAMILY)
        return _parse_icmp(head, data, start)
    if protocol == SCTP:
        return _parse_sctp(head, data, start)
    oddities = head.oddities | _gre_oddity(head, data, start) if protocol == GRE else head.oddities
    key = head.source + head.destination + bytes((protocol,))
    return Packet(
        head.version, protocol, head.source, head.destination, 0, 0, -1, -1, 0,
        0, head.total, head.hop_limit, key, 0, 0, 0,
        head.total - start, b"", oddities, None,
    )  # fmt: skip


def _require(head: _Head, data: bytes, start: int, count: int) -> None:
    """The transport header must fit the packet and lie in the copy."""
    if start + count > len(data) or start + count > head.total:
        raise PacketError(Fault.TRUNCATED)


def _parse_tcp(head: _Head, data: bytes, start: int) -> Packet:
    _require(head, data, start, _TCP_BYTES)
    source_port, destination_port, sequence, acknowledgment, offset, flags, window = (
        _TCP.unpack_from(data, start)
    )
    header_bytes = offset >> 4 << 2
    _check_data_offset(header_bytes, head.total - start, len(data) - start)
    options = data[start + _TCP_BYTES : start + header_bytes]
    key = head.source + head.destination + data[start : start + 4]
    return Packet(
        head.version, TCP, head.source, head.destination, source_port, destination_port,
        -1, -1, 0, flags, head.total, head.hop_limit, key, sequence, acknowledgment, window,
        head.total - start - header_bytes, options, head.oddities, None,
    )  # fmt: skip


def _parse_udp(head: _Head, data: bytes, start: int) -> Packet:
    _require(head, data, start, _UDP_BYTES)
    source_port, destination_port, stated, checksum = _UDP.unpack_from(data, start)
    if stated < _UDP_BYTES or stated > head.total - start:
        raise PacketError(Fault.BAD_LENGTH)
    oddities = head.oddities
    if checksum == 0 and head.version == 6:
        oddities |= Oddity.NO_CHECKSUM
    key = head.source + head.destination + data[start : start + 4] + _UDP_SUFFIX
    return Packet(
        head.version, UDP, head.source, head.destination, source_port, destination_port,
        -1, -1, 0, 0, head.total, head.hop_limit, key, 0, 0, 0,
        stated - _UDP_BYTES, b"", int(oddities), None,
    )  # fmt: skip


def _parse_sctp(head: _Head, data: bytes, start: int) -> Packet:
    _require(head, data, start, _SCTP_BYTES)
    source_port, destination_port, tag = _SCTP.unpack_from(data, start)
    key = head.source + head.destination + data[start : start + 4] + _SCTP_SUFFIX
    return Packet(
        head.version, SCTP, head.source, head.destination, source_port, destination_port,
        -1, -1, 0, 0, head.total, head.hop_limit, key, tag, 0, 0,
        head.total - start - _SCTP_BYTES, data[start + _SCTP_BYTES :], head.oddities, None,
    )  # fmt: skip


def _gre_oddity(head: _Head, data: bytes, start: int) -> int:
    """GRE version 0 (RFC 2784) and version 1 carrying PPP (RFC 2637) are what exists.

    Raises:
        PacketError: version 1 that carries something else.
    """
    _require(head, data, start, 4)
    version = data[start + 1] & 7
    if version == 0:
        return 0
    if version > 1 or start + 8 > head.total:
        return int(Oddity.GRE_HEADER)
    _require(head, data, start, 8)
    if data[start + 2 : start + 4] != PPP:
        raise PacketError(Fault.UNKNOWN_L4)
    return 0


def _parse_icmp(head: _Head, data: bytes, start: int) -> Packet:
    _require(head, data, start, _ICMP_BYTES)
    kind, code, identifier = _ICMP.unpack_from(data, start)
    quoted: Quoted | None = None
    if is_error(head.version, kind):
        quoted = read_quote(head.version, data, start + _ICMP_BYTES)
        identifier = 0
    elif kind == ICMPV6_REDIRECT and head.version == 6:
        quoted = read_redirect(data, start)
        identifier = 0
    key = (
        head.source
        + head.destination
        + data[start + 4 : start + 6]
        + data[start : start + 2]
        + bytes((head.protocol,))
    )
    return Packet(
        head.version, head.protocol, head.source, head.destination, 0, 0,
        kind, code, identifier, 0, head.total, head.hop_limit, key,
        int.from_bytes(data[start + 4 : start + 8], "big"), 0, 0,
        head.total - start - _ICMP_BYTES, b"", head.oddities, quoted,
    )  # fmt: skip
