"""The packets that open a flow, as bytes: what the source host puts on its link.

Written here because scapy, which tests use, is under the GPL and the firewall is not. Sources: RFC
791, 8200 (headers), 9293 (TCP), 768 (UDP), 9260 (SCTP INIT), 792 and 4443 (ICMP), 1071 (checksum).
"""

import struct

from conntrack.checksum import crc32c
from policytest.case import ICMP, ICMPV6, PROTOCOLS
from policytest.world import Probe

_TCP, _UDP, _SCTP = PROTOCOLS["TCP"], PROTOCOLS["UDP"], PROTOCOLS["SCTP"]

_HOP_LIMIT = 64  # RFC 1700's default; IANA ip-parameters
_DONT_FRAGMENT = 0x4000
_SYN = 0x02
_WINDOW_BYTES = 64240  # what Linux offers on Ethernet: 44 segments of 1460 bytes
_RECEIVE_BUFFER_BYTES = 106_496  # a_rwnd of Linux's SCTP
_STREAM_COUNT = 10  # RFC 9260 asks for at least 1; Linux offers 10
PAYLOAD = b"bartizan test"


def packet(probe: Probe, source_port: int) -> bytes:
    """Return the layer-3 packet of a probe.

    Args:
        probe: who to whom, protocol, port or ICMP type.
        source_port: also the id of an ICMP query and the tag of an SCTP INIT, which must not be 0.
    """
    body = _transport(probe, source_port)
    if len(probe.source) == 4:
        return _ipv4(probe, body)
    return _ipv6(probe, body)


def _transport(probe: Probe, source_port: int) -> bytes:
    source, destination, protocol, port = probe
    if protocol == _TCP:
        sequence = 0x1000_0000 | source_port
        head = struct.pack(
            "!HHIIBBHHH", source_port, port, sequence, 0, 0x50, _SYN, _WINDOW_BYTES, 0, 0
        )
        return _summed(head, 16, _pseudo(source, destination, protocol, len(head)))
    if protocol == _UDP:
        length = 8 + len(PAYLOAD)
        data = struct.pack("!HHHH", source_port, port, length, 0) + PAYLOAD
        # RFC 768: a checksum of zero means that there is none, so zero is sent as its complement.
        return _summed(data, 6, _pseudo(source, destination, protocol, length))
    if protocol == _SCTP:
        chunk = struct.pack(
            "!BBHIIHHI",
            1,
            0,
            20,
            source_port,
            _RECEIVE_BUFFER_BYTES,
            _STREAM_COUNT,
            _STREAM_COUNT,
            1,
        )
        head = struct.pack("!HHI", source_port, port, 0)
        check = crc32c(head + bytes(4) + chunk).to_bytes(4, "little")
        return head + check + chunk
    data = struct.pack("!BBHHH", port, 0, 0, source_port, 1) + PAYLOAD
    pseudo = _pseudo(source, destination, ICMPV6, len(data)) if protocol == ICMPV6 else b""
    return _summed(data, 2, pseudo)


def _pseudo(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    """Return what TCP, UDP and ICMPv6 sum besides themselves (RFC 9293 3.1, RFC 8200 8.1)."""
    if len(source) == 4:
        return source + destination + struct.pack("!BBH", 0, protocol, length)
    return source + destination + struct.pack("!IHBB", length, 0, 0, protocol)


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    # 2**16 is 1 modulo 65535, so the remainder of the whole number is the folded sum.
    return 0xFFFF - int.from_bytes(data, "big") % 0xFFFF


def _summed(data: bytes, at: int, pseudo: bytes) -> bytes:
    """Return data with its checksum at an offset where it now has zeros."""
    value = _checksum(pseudo + data)
    return data[:at] + value.to_bytes(2, "big") + data[at + 2 :]


def _ipv4(probe: Probe, body: bytes) -> bytes:
    length = 20 + len(body)
    head = struct.pack(
        "!BBHHHBBH", 0x45, 0, length, 0, _DONT_FRAGMENT, _HOP_LIMIT, probe.protocol, 0
    )
    return _summed(head + probe.source + probe.destination, 10, b"") + body


def _ipv6(probe: Probe, body: bytes) -> bytes:
    head = struct.pack("!IHBB", 6 << 28, len(body), probe.protocol, _HOP_LIMIT)
    return head + probe.source + probe.destination + body


__all__ = ["ICMP", "PAYLOAD", "packet"]
