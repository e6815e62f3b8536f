"""The packet that an ICMP error quotes, as far as it was quoted.

Only the head of it need be there (RFC 792: 8 bytes of the transport header), so its length field is
not compared with what was quoted. What names no flow gives None: the error is then about nothing.

Sources: RFC 792, RFC 4443, RFC 4861 section 4.5, RFC 1122 section 3.2.2.
"""

from struct import Struct
from typing import Final, NamedTuple

from conntrack.extensions import walk_extensions
from conntrack.fault import PacketError
from conntrack.flow import GRE, ICMP, ICMPV6, SCTP, TCP, UDP

ICMP_ERRORS: Final = frozenset((3, 4, 5, 11, 12))  # RFC 792: messages that quote a packet
ICMPV6_REDIRECT: Final = 137  # RFC 4861 section 4.5
PPP: Final = b"\x88\x0b"  # what GRE version 1 carries (RFC 2637 section 4.1)
_ICMPV6_FIRST_INFORMATIONAL: Final = 128  # RFC 4443 section 2.1: below are errors

_IPV4: Final = Struct("!BxHxxHBBxx4s4s")
_IPV6: Final = Struct("!4xHBB16s16s")
_IPV4_BYTES: Final = 20
_IPV6_BYTES: Final = 40


class Quoted(NamedTuple):
    """The start of another packet, quoted by an ICMP error.

    Attributes:
        protocol: upper-layer protocol number of the quoted packet.
        source: who had sent the quoted packet.
        destination: whom it was meant for.
        source_port: 0 where there are none.
        destination_port: 0 where there are none.
        key: flow key in the quoted packet's own direction.
        sequence: TCP sequence number or SCTP verification tag, or -1 if it was not quoted or the
            protocol has none.
    """

    protocol: int
    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    key: bytes
    sequence: int


def is_error(version: int, kind: int) -> bool:
    """Whether an ICMP or ICMPv6 type (by IP version) is an error, which quotes a packet."""
    if version == 4:
        return kind in ICMP_ERRORS
    return kind < _ICMPV6_FIRST_INFORMATIONAL


def read_redirect(data: bytes, start: int) -> Quoted | None:
    """Find the redirected header option (RFC 4861 sections 4.5 and 4.6.3) and read it."""
    at = start + 40  # 8 bytes of header, target and destination address
    while at + 8 <= len(data):
        length = data[at + 1] * 8
        if length == 0:
            return None
        if data[at] == 4:
            return read_quote(6, data[: at + length], at + 8)
        at += length
    return None


def read_quote(version: int, data: bytes, at: int) -> Quoted | None:
    """Read the packet that an ICMP error quotes; None if it does not name a flow.

    Only the head of the packet need be there (RFC 792: 8 bytes of the transport header), so its
    length field is not compared with what was quoted. A quoted fragment other than the first
    holds no ports, and errors about errors do not exist (RFC 1122 section 3.2.2).
    """
    if version == 4:
        if at + _IPV4_BYTES > len(data):
            return None
        first, _, fragment, _, protocol, source, destination = _IPV4.unpack_from(data, at)
        start = at + (first & 0x0F) * 4
        if first >> 4 != 4 or first & 0x0F < 5 or fragment & 0x1FFF:
            return None
        return _read_transport(version, protocol, source + destination, data, start)
    if at + _IPV6_BYTES > len(data) or data[at] >> 4 != 6:
        return None
    _, following, _, source, destination = _IPV6.unpack_from(data, at)
    try:
        protocol, start, _, fragment = walk_extensions(data, following, at + _IPV6_BYTES, len(data))
        if fragment == 1:  # first fragment: the rest of the chain follows it
            protocol, start, _, fragment = walk_extensions(data, protocol, start, len(data))
    except PacketError:
        return None
    if fragment >> 3:
        return None
    return _read_transport(version, protocol, source + destination, data, start)


def _read_transport(
    version: int, protocol: int, addresses: bytes, data: bytes, start: int
) -> Quoted | None:
    if start > len(data):
        return None  # not even the quoted IP header is whole
    half = len(addresses) // 2
    source, destination = addresses[:half], addresses[half:]
    ports = data[start : start + 4]
    suffix = bytes((protocol,))
    if protocol in (TCP, UDP, SCTP):
        if len(ports) < 4:
            return None
        sequence = -1
        if protocol == TCP:
            suffix = b""
        if protocol != UDP and start + 8 <= len(data):
            sequence = int.from_bytes(data[start + 4 : start + 8], "big")
        source_port = int.from_bytes(ports[:2], "big")
        destination_port = int.from_bytes(ports[2:], "big")
        key = addresses + ports + suffix
        return Quoted(protocol, source, destination, source_port, destination_port, key, sequence)
    if protocol in (ICMP, ICMPV6):
        if start + 8 > len(data) or (protocol == ICMP) != (version == 4):
            return None
        if is_error(version, data[start]):
            return None
        key = addresses + data[start + 4 : start + 6] + data[start : start + 2] + suffix
        return Quoted(protocol, source, destination, 0, 0, key, -1)
    header = data[start : start + 8]
    if protocol == GRE and len(header) == 8 and header[1] & 7 == 1 and header[2:4] != PPP:
        return None
    return Quoted(protocol, source, destination, 0, 0, addresses + suffix, -1)
