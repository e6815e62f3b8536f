"""Whether the checksums of a complete packet are right.

The kernel's own tracker verifies checksums of received packets, and a packet that this host has
sent may carry an unfinished one (checksum offload), so the packet path does not call this. It is
for packets from elsewhere: captures, tests, a queue that is fed before the kernel has looked.

Internet checksum: RFC 1071, ones' complement sum of 16-bit words; pseudo header of RFC 9293 section
3.1 and RFC 8200 section 8.1. SCTP: CRC-32C, RFC 9260 section 6.8 and appendix A.
"""

from typing import Final

_CRC32C_POLYNOMIAL: Final = 0x82F63B78  # Castagnoli, bit-reversed; RFC 9260 appendix A

_ICMP: Final = 1
_TCP: Final = 6
_UDP: Final = 17
_ICMPV6: Final = 58
_SCTP: Final = 132
_CHECKSUM_AT: Final = {_UDP: 6, _TCP: 16}


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        crc = value
        for _ in range(8):
            crc = (crc >> 1) ^ (_CRC32C_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_TABLE: Final = _crc32c_table()


def crc32c(data: bytes) -> int:
    """CRC-32C of the bytes, as a number whose little-endian bytes SCTP sends."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def sums_to_zero(data: bytes) -> bool:
    """Whether the ones' complement sum of the bytes, checksum included, is zero (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    # 2**16 is 1 modulo 65535, so the remainder of the whole number is the folded sum.
    return int.from_bytes(data, "big") % 0xFFFF == 0


def transport_is_intact(data: bytes, protocol: int) -> bool:
    """Whether the IPv4 header's and the transport's checksum are right.

    Args:
        data: one complete packet that `conntrack.packet.parse` accepts.
        protocol: its upper-layer protocol; those without a checksum are always intact.
    """
    if data[0] >> 4 == 4:
        start = (data[0] & 0x0F) * 4
        if not sums_to_zero(data[:start]):
            return False
        addresses = data[12:20]
    else:
        start = len(data) - _ipv6_payload_bytes(data, protocol)
        addresses = data[8:40]
    body = data[start:]
    if protocol == _ICMP:
        return sums_to_zero(body)
    if protocol == _SCTP:
        zeroed = body[:8] + b"\0\0\0\0" + body[12:]
        return body[8:12] == crc32c(zeroed).to_bytes(4, "little")
    if protocol == _UDP:
        if body[6:8] == b"\0\0":  # not computed: RFC 768
            return True
        body = body[: int.from_bytes(body[4:6], "big")]
    elif protocol not in (_TCP, _ICMPV6):
        return True
    pseudo = addresses + len(body).to_bytes(4, "big") + bytes((0, 0, 0, protocol))
    return sums_to_zero(pseudo + body)


def _ipv6_payload_bytes(data: bytes, protocol: int) -> int:
    """Bytes of the upper layer: the chain was validated by the parser, so it is only walked."""
    following, at = data[6], 40
    while following != protocol:
        length = 8 if following == 44 else (data[at + 1] + 1) * 8
        if following == 51:
            length = (data[at + 1] + 2) * 4
        following, at = data[at], at + length
    return len(data) - at
