"""May this packet come from where it came from? Asked before tracking and before policy.

Theory of operation. Identity is derived from the source address, so an address is believed only
where it belongs: a managed endpoint's address on that endpoint's interface and nowhere else, and on
that interface nothing but its endpoint's addresses. What is left over are packets that an endpoint
must send without an address of its own or from a link-local one: neighbour discovery, listener
discovery, DHCP, and IPv6 talk with the node. Those count as the endpoint's own: policy is asked
with one of its addresses.

Neighbour discovery is never a matter of policy, or IPv6 would not work, and never a hole: it must
have hop limit 255, which no router forwards (RFC 4861 sections 6.1, 7.1, 8.1), and an endpoint may
not pose as a router (advertisements and redirects; CVE-2020-10749 is what happens otherwise).

The tables are made once per snapshot; `Admission` never changes.
"""

from typing import Final, NamedTuple

from conntrack.address import is_link_local
from conntrack.flow import UDP
from conntrack.packet import Packet
from firewall.datapath.verdict import Drop
from firewall.policy.snapshot import EndpointRow
from firewall.policy.verdict import DropReason

_UNSPECIFIED_V4: Final = bytes(4)
_UNSPECIFIED_V6: Final = bytes(16)


class _Discovery(NamedTuple):
    """How a kind of message must look."""

    hop_limit: int
    from_endpoint: bool


DISCOVERY: Final = {
    130: _Discovery(1, from_endpoint=False),  # listener query: a router's (RFC 3810 section 5.1)
    131: _Discovery(1, from_endpoint=True),  # listener report (RFC 2710 section 3)
    132: _Discovery(1, from_endpoint=True),  # listener done (RFC 2710 section 3)
    133: _Discovery(255, from_endpoint=True),  # router solicitation (RFC 4861 section 6.1.1)
    134: _Discovery(255, from_endpoint=False),  # router advertisement (RFC 4861 section 6.1.2)
    135: _Discovery(255, from_endpoint=True),  # neighbour solicitation (RFC 4861 section 7.1.1)
    136: _Discovery(255, from_endpoint=True),  # neighbour advertisement (RFC 4861 section 7.1.2)
    137: _Discovery(255, from_endpoint=False),  # redirect: a router's (RFC 4861 section 8.1)
    143: _Discovery(1, from_endpoint=True),  # version 2 listener report (RFC 3810 section 5.2)
    151: _Discovery(1, from_endpoint=False),  # multicast router advertisement (RFC 4286 section 3)
    152: _Discovery(1, from_endpoint=True),  # multicast router solicitation (RFC 4286 section 4)
    153: _Discovery(1, from_endpoint=False),  # multicast router termination (RFC 4286 section 5)
}
"""ICMPv6 messages of the link itself, by type."""

_UNADDRESSED: Final = frozenset({131, 132, 133, 135, 143})
"""May come from `::`, before an address is assigned (RFC 4861, RFC 3590)."""


class Origin(NamedTuple):
    """Who sent a packet, as far as the place where it arrived tells.

    Attributes:
        source: packed address to ask policy with.
        refused: why the packet may not pass, None if it may.
    """

    source: bytes
    refused: Drop | None


class Admission:
    """Where each address and each interface belongs.

    Attributes:
        homes: interface index by address, for endpoints whose interface is known.
        guarded: endpoints by interface index.
    """

    __slots__ = ("guarded", "homes")

    def __init__(self, endpoints: tuple[EndpointRow, ...]) -> None:
        self.homes: dict[bytes, int] = {}
        self.guarded: dict[int, EndpointRow] = {}
        for row in endpoints:
            if row.interface_index:
                self.guarded[row.interface_index] = row
                self.homes.update(dict.fromkeys(row.addresses, row.interface_index))

    def check(self, packet: Packet, interface_index: int) -> Origin:
        """Say whether a packet that arrived on an interface may bear its source address."""
        source = packet.source
        home = self.homes.get(source)
        if home == interface_index:
            return Origin(source, None)
        endpoint = self.guarded.get(interface_index)
        if endpoint is None:
            if home is None:
                return Origin(source, None)
            owner = self.guarded[home]
            return _spoofed(source, f"the address belongs to {_name(owner)} on another interface")
        if home is None and _is_stand_in(packet):
            # Without an address there is no identity to speak for it.
            if endpoint.addresses:
                return Origin(endpoint.addresses[0], None)
            return _spoofed(source, f"{_name(endpoint)} has no address yet")
        return _spoofed(source, f"not an address of {_name(endpoint)}")

    def discovery(self, packet: Packet, interface_index: int) -> Drop | None:
        """Judge a message of the link itself (`DISCOVERY`); None = it may pass."""
        rule = DISCOVERY[packet.icmp_type]
        endpoint = self.guarded.get(interface_index)
        if packet.hop_limit != rule.hop_limit:
            return _forbidden("neighbour or listener discovery that was forwarded")
        if endpoint is None:
            return None
        if not rule.from_endpoint:
            return _forbidden(f"{_name(endpoint)} is no router")
        source = packet.source
        if source in endpoint.addresses or is_link_local(source):
            return None
        if source == _UNSPECIFIED_V6 and packet.icmp_type in _UNADDRESSED:
            return None
        return _spoofed(source, f"not an address of {_name(endpoint)}").refused


def _is_stand_in(packet: Packet) -> bool:
    """Say whether the source address is one that hosts use in place of their own.

    IPv4: 0.0.0.0 from a DHCP client to a server (RFC 2131 section 4.1). IPv6: link-local.
    """
    if packet.version == 6:
        return is_link_local(packet.source)
    dhcp = packet.protocol == UDP and (packet.source_port, packet.destination_port) == (68, 67)
    return packet.source == _UNSPECIFIED_V4 and dhcp


def _spoofed(source: bytes, detail: str) -> Origin:
    return Origin(source, Drop(DropReason.INVALID_SOURCE_IP, detail))


def _forbidden(detail: str) -> Drop:
    return Drop(DropReason.FORBIDDEN_ICMP6_MESSAGE, detail)


def _name(endpoint: EndpointRow) -> str:
    return f"{endpoint.namespace}/{endpoint.name}" if endpoint.namespace else endpoint.name
