"""Addresses and prefixes: packed bytes inside, text at the edges.

An address is 4 (IPv4) or 16 (IPv6) bytes in network order, exactly as it stands in the packet, so
that the packet path compares and hashes slices without making objects. This is the only module
that knows the text forms (RFC 4632 prefixes, RFC 5952 IPv6 text); everything else passes bytes.

IPv4-mapped IPv6 addresses (`::ffff:a.b.c.d`) stay 16 bytes: on the wire they are IPv6.
"""

import ipaddress  # noqa: TID251 -- the one module that may
from functools import lru_cache
from typing import NamedTuple

_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 2.5.5.2
_MEMO_COUNT = 4096  # masks and texts remembered; bounds memory to under 1 MB


class Prefix(NamedTuple):
    """A block of addresses that share their first bits.

    Attributes:
        network: 4 or 16 bytes, network order; bits after `length` are zero.
        length: number of leading bits that are compared, 0-32 or 0-128.
    """

    network: bytes
    length: int

    def __str__(self) -> str:
        return format_prefix(self)


def parse_address(text: str) -> bytes:
    """Packed form of an address written in text.

    Args:
        text: dotted-quad IPv4 or RFC 4291 IPv6, without zone index and without prefix length.

    Returns:
        4 or 16 bytes, network order.

    Raises:
        ValueError: `text` is not one address. Leading zeros in IPv4 octets and zone indices are
            refused, because readers disagree on their meaning (RFC 6943 section 3.1.1).
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise ValueError(f"{text!r} has a zone index, which is not part of an address")
    return address.packed


@lru_cache(maxsize=_MEMO_COUNT)
def format_address(address: bytes) -> str:
    """Text of a packed address, as RFC 5952 recommends it.

    Raises:
        ValueError: `address` is neither 4 nor 16 bytes long.
    """
    return str(ipaddress.ip_address(address))


def parse_prefix(text: str, *, strict: bool = False) -> Prefix:
    """Prefix written in text; a bare address is the prefix of that host alone.

    Args:
        text: `10.0.0.0/8`, `fd00::/48`, `10.1.2.3`. The length is decimal digits only: a netmask
            (`/255.0.0.0`) is refused, as RFC 4632 section 3.1 writes lengths.
        strict: refuse bits after the prefix length instead of masking them off.

    Raises:
        ValueError: not a prefix, or host bits set while `strict`.
    """
    host, slash, digits = text.partition("/")
    network = parse_address(host)
    width = len(network) * 8
    if not slash:
        return Prefix(network, width)
    if not (digits.isascii() and digits.isdigit()) or (len(digits) > 1 and digits[0] == "0"):
        raise ValueError(f"{text!r}: prefix length {digits!r} is not a decimal number")
    if len(digits) > 3 or int(digits) > width:
        raise ValueError(f"{text!r}: prefix length {digits} is longer than {width} bits")
    length = int(digits)
    masked = mask(network, length)
    if strict and masked != network:
        raise ValueError(f"{text!r} has host bits set; the network is {format_address(masked)}")
    return Prefix(masked, length)


def format_prefix(prefix: Prefix) -> str:
    """Text of a prefix, always with its length (`10.0.0.1/32`)."""
    return f"{format_address(prefix.network)}/{prefix.length}"


@lru_cache(maxsize=258)  # every (length, width) there is: 33 for IPv4, 129 for IPv6
def _netmask(length: int, width: int) -> int:
    return ((1 << length) - 1) << (width - length)


def mask(address: bytes, length: int) -> bytes:
    """The address with every bit after the first `length` bits cleared.

    Raises:
        ValueError: `length` is negative or longer than the address.
    """
    width = len(address) * 8
    if not 0 <= length <= width:
        raise ValueError(f"a prefix of {length} bits does not fit an address of {width} bits")
    if length == width:
        return address
    return (int.from_bytes(address, "big") & _netmask(length, width)).to_bytes(len(address), "big")


def address_in(address: bytes, prefix: Prefix) -> bool:
    """Whether the address lies in the prefix; never across address families."""
    return len(address) == len(prefix.network) and mask(address, prefix.length) == prefix.network


def prefix_contains(outer: Prefix, inner: Prefix) -> bool:
    """Whether every address of `inner` is one of `outer`; never across address families."""
    return inner.length >= outer.length and address_in(inner.network, outer)


def is_multicast(address: bytes) -> bool:
    """Whether the address names a group: 224.0.0.0/4 (RFC 5771) or ff00::/8 (RFC 4291 2.7)."""
    first = address[0]
    return first == 0xFF if len(address) == 16 else first >> 4 == 0xE


def is_link_local(address: bytes) -> bool:
    """Whether the address is valid on one link: 169.254/16 (RFC 3927), fe80::/10 (RFC 4291)."""
    if len(address) == 16:
        return address[0] == 0xFE and address[1] & 0xC0 == 0x80
    return address[:2] == b"\xa9\xfe"


def is_loopback(address: bytes) -> bool:
    """Whether the address is the host itself: 127.0.0.0/8 (RFC 1122 3.2.1.3) or ::1."""
    return address == b"\0" * 15 + b"\1" if len(address) == 16 else address[0] == 127


def why_unusable(address: bytes) -> str:
    """Say why no host of a network can have the address, "" if one can.

    RFC 1122 3.2.1.3 and RFC 4291 2.5: the unspecified address, loopback and groups stand in no
    packet as the address of one host elsewhere. An IPv4-mapped address (RFC 4291 2.5.5.2) is an
    IPv4 host in the eyes of a socket; in packets the host has its IPv4 address.
    """
    if is_multicast(address):
        return "is a multicast address"
    if is_loopback(address):
        return "is a loopback address"
    if len(address) == 4:
        if address[0] == 0:
            return "is unspecified"
        return "is the broadcast address" if address == b"\xff" * 4 else ""
    if not any(address):
        return "is unspecified"
    if address[:12] == _MAPPED:
        return f"is IPv4 in the clothes of IPv6; write {format_address(address[12:])}"
    return ""
