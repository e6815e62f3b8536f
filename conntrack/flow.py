"""The flow tuple: who talks to whom, and in which direction a packet goes.

The first packet that we accept defines ORIGINAL; packets of the swapped tuple are REPLY. With TCP,
UDP and SCTP the ports are the transport's. An ICMP query flow has no ports: both ports hold the
identifier, so that swapping the ends keeps it (the request's type is kept by the tracker, and two
query kinds with one identifier are two flows). Protocols without ports have 0 in both.
"""

from enum import IntEnum
from typing import Final, NamedTuple

from conntrack.address import format_address

ICMP: Final = 1  # protocol numbers: IANA "Assigned Internet Protocol Numbers"
TCP: Final = 6
UDP: Final = 17
GRE: Final = 47
ESP: Final = 50
AH: Final = 51
ICMPV6: Final = 58
SCTP: Final = 132

_PROTOCOL_NAME: Final = {
    ICMP: "icmp",
    TCP: "tcp",
    UDP: "udp",
    GRE: "gre",
    ESP: "esp",
    AH: "ah",
    ICMPV6: "icmpv6",
    SCTP: "sctp",
}


class Direction(IntEnum):
    """Which way a packet of a flow goes: as the first one did, or back."""

    ORIGINAL = 0
    REPLY = 1


class FlowTuple(NamedTuple):
    """The five values that name a flow.

    Attributes:
        source: packed address, 4 or 16 bytes, network order.
        destination: packed address of the same length.
        protocol: upper-layer protocol number (after IPv6 extension headers).
        source_port: host order; ICMP queries: the identifier; 0 where there are no ports.
        destination_port: as `source_port`.
    """

    source: bytes
    destination: bytes
    protocol: int
    source_port: int
    destination_port: int

    def __str__(self) -> str:
        name = protocol_name(self.protocol)
        source = _end(self.source, self.source_port)
        destination = _end(self.destination, self.destination_port)
        return f"{name} {source} -> {destination}"


def _end(address: bytes, port: int) -> str:
    text = format_address(address)
    if len(address) == 16:
        text = f"[{text}]"
    return f"{text}:{port}"


def protocol_name(protocol: int) -> str:
    """Lower-case name of a protocol number, or the number itself in decimal."""
    return _PROTOCOL_NAME.get(protocol) or str(protocol)


def reply(flow: FlowTuple) -> FlowTuple:
    """The tuple that answers to this flow carry."""
    source, destination, protocol, source_port, destination_port = flow
    return FlowTuple(destination, source, protocol, destination_port, source_port)
