"""IPv6 extension headers, from the fixed header to the upper layer (RFC 8200 section 4)."""

from typing import Final

from conntrack.fault import Fault, Oddity, PacketError

_HOP_BY_HOP: Final = 0  # next-header values, RFC 8200 section 4
_ROUTING: Final = 43
_FRAGMENT: Final = 44
_AUTHENTICATION: Final = 51  # RFC 4302
_DESTINATION: Final = 60
NO_NEXT: Final = 59


def walk_extensions(data: bytes, following: int, at: int, end: int) -> tuple[int, int, int, int]:
    """Follow an IPv6 header chain to the upper layer.

    Headers may stand in any order and number (RFC 8200 section 4.1 asks receivers to cope); each
    consumes at least 8 bytes, so the walk is bounded by the bytes that were copied.

    Args:
        data: bytes that contain the chain.
        following: the next-header value that precedes `at`.
        at: where the first extension header starts.
        end: first byte that is not available.

    Returns:
        (upper-layer protocol, where it starts, oddities, fragment offset and M bit).

    Raises:
        PacketError: the chain leaves `end`, or a header is shorter than its minimum.
    """
    oddities = 0
    fragment = 0
    first = at
    while True:
        if following in (_DESTINATION, _ROUTING, _HOP_BY_HOP):
            if at + 8 > end:
                raise PacketError(Fault.TRUNCATED)
            if following == _HOP_BY_HOP and at != first:
                oddities |= Oddity.HOP_BY_HOP_LATE
            elif following == _ROUTING and data[at + 2] == 0:
                oddities |= Oddity.ROUTING_0
            following, at = data[at], at + (data[at + 1] + 1) * 8
        elif following == _FRAGMENT:
            if at + 8 > end:
                raise PacketError(Fault.TRUNCATED)
            # Offset and M are the top 13 bits and the last one; the 2 between are reserved.
            fragment |= int.from_bytes(data[at + 2 : at + 4], "big") & 0xFFF9
            following, at = data[at], at + 8
            if fragment:
                return following, at, int(oddities), fragment
        elif following == _AUTHENTICATION:
            if at + 8 > end:
                raise PacketError(Fault.TRUNCATED)
            if data[at + 1] < 1:  # RFC 4302 section 2.2: fixed fields alone are 12 bytes
                raise PacketError(Fault.BAD_HEADER_LENGTH)
            following, at = data[at], at + (data[at + 1] + 2) * 4
        else:
            return following, at, int(oddities), fragment
