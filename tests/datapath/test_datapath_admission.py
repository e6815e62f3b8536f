"""Messages of the link itself: never a matter of policy, never a way around it."""

import pytest
from datapath_world import A6, B6, ON_A, ON_W, World
from scapy.layers import inet6
from scapy.layers.inet6 import IPv6

from firewall.datapath.admission import DISCOVERY
from firewall.datapath.verdict import QUIETLY, Drop
from firewall.policy.verdict import DropReason

OWN, LINK_LOCAL, NOBODY, FOREIGN = A6, "fe80::a", "::", B6


def message(kind: int, source: str, hop_limit: int | None = None):
    """An ICMPv6 message of a type, with the bytes that the longest of them needs."""
    limit = DISCOVERY[kind].hop_limit if hop_limit is None else hop_limit
    body = inet6.ICMPv6Unknown(type=kind, code=0, msgbody=b"\0" * 28)
    return IPv6(src=source, dst="ff02::1", hlim=limit) / body


@pytest.mark.parametrize("kind", DISCOVERY)
@pytest.mark.parametrize("source", [OWN, LINK_LOCAL])
def test_an_endpoint_may_ask_and_answer_but_not_pose_as_a_router(kind, source):
    """RFC 4861, RFC 3810; advertisements, redirects and queries are a router's."""
    world = World()
    decision = world.at(ON_A, message(kind, source))
    if kind in (130, 134, 137, 151, 153):
        assert decision.verdict.reason is DropReason.FORBIDDEN_ICMP6_MESSAGE
        assert "no router" in decision.verdict.detail
    else:
        assert decision is QUIETLY
    assert len(world.tracker) == 0


@pytest.mark.parametrize("kind", DISCOVERY)
def test_whoever_is_no_endpoint_and_we_ourselves_may_say_anything_on_the_link(kind):
    world = World()
    assert world.at(ON_W, message(kind, "fe80::1")) is QUIETLY
    assert world.node(message(kind, "fe80::1")) is QUIETLY


@pytest.mark.parametrize("kind", DISCOVERY)
@pytest.mark.parametrize("place", [ON_A, ON_W, 0])
def test_what_a_router_forwarded_is_not_of_this_link(kind, place):
    """RFC 4861 section 6.1.1: hop limit 255; RFC 2710 section 3: hop limit 1."""
    wrong = 64 if DISCOVERY[kind].hop_limit == 255 else 255
    decision = World().at(place, message(kind, "fe80::a", wrong))
    assert decision.verdict.reason is DropReason.FORBIDDEN_ICMP6_MESSAGE


@pytest.mark.parametrize("kind", [131, 133, 135, 136, 143, 152])
def test_an_endpoint_speaks_for_itself_only(kind):
    decision = World().at(ON_A, message(kind, FOREIGN))
    assert decision.verdict.reason is DropReason.INVALID_SOURCE_IP


@pytest.mark.parametrize(
    ("kind", "passes"), [(131, True), (133, True), (135, True), (136, False), (152, False)]
)
def test_only_what_precedes_an_address_may_come_from_nobody(kind, passes):
    """RFC 4861 section 7.1.2: an advertisement has a source; section 7.1.1: DAD has none."""
    decision = World().at(ON_A, message(kind, NOBODY))
    assert isinstance(decision.verdict, Drop) is not passes
