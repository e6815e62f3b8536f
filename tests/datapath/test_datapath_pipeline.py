"""From bytes to verdict: what passes, what does not, why, and what is told about it."""

import msgspec
import pytest
from datapath_world import (
    A4,
    A6,
    B4,
    B6,
    HERE,
    ICMP,
    ICMPV6,
    ON_A,
    ON_B,
    ON_W,
    TCP,
    UDP,
    W4,
    W6,
    Rule,
    World,
    snapshot,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers import inet, inet6
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from conntrack.address import parse_address
from conntrack.packet import Fault
from conntrack.tracker import Tracker
from firewall.datapath.events import packet_event
from firewall.datapath.pipeline import FAULT_REASON, PREROUTING, Pipeline, PipelineSettings, Resets
from firewall.datapath.verdict import ACCEPT, QUIETLY, Drop, PassOn, Redirect
from firewall.policy.model import Action, Tier
from firewall.policy.snapshot import DirectionRow, EndpointRow, EntryRow, PolicyRow
from firewall.policy.verdict import DropReason, Verdict
from firewall.policy.view import View

ENDS = [(A4, B4), (A6, B6)]


def ip(source, destination, **fields):
    layer = IPv6 if ":" in source else IP
    return layer(src=source, dst=destination, **fields)


def syn(source=A4, destination=B4, port=80, sport=4000, seq=100):
    return ip(source, destination) / inet.TCP(sport=sport, dport=port, flags="S", seq=seq)


def udp(source=A4, destination=B4, port=53, sport=4000):
    return ip(source, destination) / inet.UDP(sport=sport, dport=port) / Raw(b"data")


def handshake(world, source=A4, destination=B4, port=80, sport=4000):
    """Open a connection from a to b and return its three decisions."""
    return (
        world.a(syn(source, destination, port, sport)),
        world.b(
            ip(destination, source)
            / inet.TCP(sport=port, dport=sport, flags="SA", seq=500, ack=101)
        ),
        world.a(
            ip(source, destination) / inet.TCP(sport=sport, dport=port, flags="A", seq=101, ack=501)
        ),
    )


def segment(source=A4, destination=B4, port=80, sport=4000, **fields):
    fields = {"flags": "PA", "seq": 101, "ack": 501} | fields
    header = inet.TCP(sport=sport, dport=port, **fields)
    return ip(source, destination) / header / Raw(b"data")


def is_drop(decision, reason, detail=""):
    verdict = decision.verdict
    assert isinstance(verdict, Drop), decision
    assert verdict.reason is reason, decision
    assert detail in verdict.detail, decision
    assert decision.report is not None  # every drop is told
    return True


# --- policy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ENDS)
def test_an_allowed_flow_passes_with_its_replies_and_is_told_once(ends):
    world = World(Rule(1001, 1002, TCP, 80))
    first, second, third = handshake(world, *ends)
    assert first.verdict is ACCEPT
    assert first.report is not None
    assert second is third is QUIETLY
    assert world.a(segment(*ends)) is QUIETLY
    assert len(world.tracker) == 1


@pytest.mark.parametrize("ends", ENDS)
def test_a_refused_flow_leaves_no_trace(ends):
    world = World(Rule(1001, 1002, TCP, 80))
    is_drop(world.a(syn(*ends, port=81)), DropReason.POLICY_DENIED)
    is_drop(world.b(syn(*reversed(ends), port=80)), DropReason.POLICY_DENIED)
    assert len(world.tracker) == 0
    reply = ip(*reversed(ends)) / inet.TCP(sport=81, dport=4000, flags="SA", seq=1, ack=101)
    is_drop(world.b(reply), DropReason.INVALID_PACKET_DROPPED)


def test_a_packet_that_opens_nothing_is_dropped_with_the_trackers_reason():
    world = World(Rule(0, 1002))
    decision = world.a(segment())
    is_drop(decision, DropReason.INVALID_PACKET_DROPPED)
    assert decision.verdict.detail


def test_a_repeated_first_packet_is_not_told_twice():
    world = World(Rule(1001, 1002, UDP))
    assert world.a(udp()).report is not None
    assert world.a(udp()) is QUIETLY


@pytest.mark.parametrize(("protocol", "source", "destination", "kind"), [
    (ICMP, A4, B4, 8), (ICMPV6, A6, B6, 128),
])  # fmt: skip
def test_the_port_of_an_icmp_message_is_its_type_also_when_decided_anew(
    protocol, source, destination, kind
):
    layer = inet.ICMP(id=7) if protocol == ICMP else inet6.ICMPv6EchoRequest(id=7)
    world = World(Rule(1001, 1002, protocol, kind))
    assert world.a(ip(source, destination) / layer).report is not None
    world.change(Rule(1001, 1002, protocol, kind))
    assert world.a(ip(source, destination) / layer) is QUIETLY
    world.change(Rule(1001, 1002, protocol, kind + 1))
    is_drop(world.a(ip(source, destination) / layer), DropReason.POLICY_DENIED)


def test_a_full_table_refuses_new_flows_and_keeps_the_old():
    world = World(Rule(1001, 1002), limit=1)
    handshake(world)
    assert world.a(segment()) is QUIETLY
    is_drop(world.a(syn(sport=4001)), DropReason.CT_MAP_INSERTION_FAILED)
    assert world.a(segment()) is QUIETLY


def test_without_a_snapshot_nothing_passes():
    pipeline = Pipeline(Tracker(), None)
    decision = pipeline.decide(bytes(syn()), ON_A, PREROUTING, 1.0, True)
    is_drop(decision, DropReason.DROP_EP_NOT_READY)


# --- changes of the snapshot ------------------------------------------------------------------


def test_a_change_that_keeps_the_permission_is_not_noticed():
    world = World(Rule(1001, 1002, TCP, 80))
    handshake(world)
    world.change(Rule(0, 1002, TCP, 80))
    assert world.a(segment()) is QUIETLY
    assert world.pipeline.counts.ruled_anew_count == 1
    assert world.a(segment(seq=105)) is QUIETLY
    assert world.pipeline.counts.ruled_anew_count == 1


def test_a_lost_permission_stops_both_directions_and_a_new_one_mends_it():
    world = World(Rule(1001, 1002, TCP, 80))
    handshake(world)
    world.change()
    answer = segment(B4, A4, 4000, 80, seq=501, ack=101)
    is_drop(world.b(answer), DropReason.POLICY_DENIED)
    is_drop(world.a(segment()), DropReason.POLICY_DENIED)
    world.change(Rule(1001, 1002, TCP, 80))
    back = world.a(segment())
    assert back.verdict is ACCEPT
    assert back.report is not None  # another outcome than before
    assert world.b(answer) is QUIETLY


def test_an_error_about_a_flow_that_lost_its_permission_does_not_pass():
    world = World(Rule(1001, 1002, UDP))
    world.a(udp())
    world.change()
    error = ip(B4, A4) / inet.ICMP(type=3, code=3) / udp()
    is_drop(world.b(error), DropReason.POLICY_DENIED)


# --- errors -----------------------------------------------------------------------------------


def test_an_error_about_a_known_flow_needs_no_rule():
    world = World(Rule(1001, 1002, UDP))
    world.a(udp())
    assert world.b(ip(B4, A4) / inet.ICMP(type=3, code=3) / udp()) is QUIETLY


@pytest.mark.parametrize("six", [False, True])
def test_path_mtu_messages_pass_without_a_flow_if_so_set(six):
    """Cilium: allow-icmp-frag-needed, on unless switched off."""
    if six:
        error = ip(W6, A6) / inet6.ICMPv6PacketTooBig(mtu=1400) / udp(A6, B6)
        wrong = ip(W6, A6) / inet6.ICMPv6PacketTooBig(mtu=1400) / udp(B6, A6)
        other = ip(W6, A6) / inet6.ICMPv6TimeExceeded() / udp(A6, B6)
    else:
        error = ip(W4, A4) / inet.ICMP(type=3, code=4) / udp()
        wrong = ip(W4, A4) / inet.ICMP(type=3, code=4) / udp(B4, A4)
        other = ip(W4, A4) / inet.ICMP(type=11) / udp()
    world = World()
    assert world.w(error) is QUIETLY
    is_drop(world.w(wrong), DropReason.INVALID_PACKET_DROPPED)  # quotes what a did not send
    is_drop(world.w(other), DropReason.INVALID_PACKET_DROPPED)
    strict = World(allow_icmp_frag_needed=False)
    is_drop(strict.w(error), DropReason.INVALID_PACKET_DROPPED)


def test_an_error_of_an_unknown_flow_may_be_another_workers():
    world = World(workers=2)
    decision = world.w(ip(W4, A4) / inet.ICMP(type=11) / udp())
    assert isinstance(decision.verdict, PassOn)
    assert isinstance(decision.verdict.otherwise, Drop)
    assert decision.report is not None
    mtu = world.w(ip(W4, A4) / inet.ICMP(type=3, code=4) / udp())
    assert mtu.verdict == PassOn(ACCEPT)
    assert mtu.report is None


# --- redirects --------------------------------------------------------------------------------

WEB = Rule(1001, 1002, TCP, 80, l7="http")


def proxied(*rules, **kwargs):
    return World(*(rules or (WEB,)), http_proxy_port=15006, **kwargs)


def test_a_flow_with_l7_rules_goes_to_the_proxy_and_is_told_once():
    world = proxied()
    first = world.a(syn())
    assert first.verdict == Redirect(15006)
    assert first.report is not None
    again = world.a(syn())
    assert again.verdict == Redirect(15006)
    assert again.report is None
    assert world.a(segment()).verdict == Redirect(15006)


def test_without_a_proxy_the_flow_is_closed():
    reason = DropReason.PROXY_REDIRECTION_NOT_SUPPORTED_FOR_PROTOCOL
    is_drop(World(WEB).a(syn()), reason, "no proxy")


@pytest.mark.parametrize("kind", ["listener", "kafka"])
def test_what_the_proxy_cannot_judge_is_closed(kind):
    reason = DropReason.PROXY_REDIRECTION_NOT_SUPPORTED_FOR_PROTOCOL
    world = proxied(Rule(1001, 1002, TCP, 80, l7=kind))
    is_drop(world.a(syn()), reason, kind)
    world = proxied(Rule(1001, 1002, UDP, 53, l7=kind))
    is_drop(world.a(udp()), reason, kind)


def test_http_over_udp_and_two_kinds_at_once_are_closed():
    """Who wrote http for UDP did not mean it to pass, and two parsers cannot both have a flow."""
    reason = DropReason.PROXY_REDIRECTION_NOT_SUPPORTED_FOR_PROTOCOL
    is_drop(proxied(Rule(1001, 1002, UDP, 53, l7="http")).a(udp()), reason, "TCP only")
    both = (Rule(1001, 1002, TCP, 80, l7="http"), Rule(1001, 1002, TCP, 80, l7="dns"))
    is_drop(proxied(*both).a(syn()), reason, "several kinds: dns, http")


def test_every_datagram_of_a_dns_flow_goes_to_the_proxy():
    """There is no socket for each client that the kernel could find by itself."""
    world = proxied(Rule(1001, 1002, UDP, 53, l7="dns"))
    for _ in range(3):
        assert world.a(udp()).verdict == Redirect(15006)
    assert len(world.tracker) == 1
    is_drop(world.b(udp(B4, A4, port=4000, sport=53)), DropReason.INVALID_PACKET_DROPPED)


def test_a_segment_without_a_flow_does_not_reach_the_proxy():
    """Whatever the proxy's kernel answered, nobody would have been told of it."""
    world = proxied()
    for flags in ("A", "PA", "R", "F", "SA", "", "SF", "RA"):
        is_drop(world.a(segment(flags=flags)), DropReason.INVALID_PACKET_DROPPED)
    is_drop(world.a(segment(port=81)), DropReason.INVALID_PACKET_DROPPED)


@pytest.mark.parametrize("known", [False, True])
def test_our_own_kernel_may_reset_for_the_server_and_nobody_else(known):
    world = proxied()
    if known:
        world.a(syn())
    reset = ip(B4, A4) / inet.TCP(sport=80, dport=4000, flags="R", seq=501)
    assert world.node(reset) is QUIETLY
    is_drop(world.b(reset), DropReason.INVALID_PACKET_DROPPED)


def test_a_direct_flow_that_now_needs_the_proxy_is_sent_there_if_none_is_reset():
    world = proxied(Rule(1001, 1002, TCP, 80))
    world.pipeline.settings = PipelineSettings(resets=Resets.NONE)
    handshake(world)
    world.change(WEB)
    moved = world.a(segment())
    assert moved.verdict == Redirect(15006)
    assert moved.report is not None
    answer = segment(B4, A4, 4000, 80, seq=501, ack=101)
    is_drop(world.b(answer), DropReason.INVALID_PACKET_DROPPED, "only the proxy")
    error = ip(B4, A4) / inet.ICMP(type=3, code=1) / syn()
    is_drop(world.b(error), DropReason.INVALID_PACKET_DROPPED)


# --- source addresses -------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b", "stranger"), [(A4, B4, "10.7.7.7"), (A6, B6, "fd77::7")])
def test_an_endpoint_may_use_its_own_addresses_only(a, b, stranger):
    world = World(Rule(0, 1002), Rule(0, 1001))
    is_drop(world.a(udp(stranger, b)), DropReason.INVALID_SOURCE_IP, "default/a")
    is_drop(world.b(udp(a, b)), DropReason.INVALID_SOURCE_IP, "default/b")
    is_drop(world.w(udp(a, b)), DropReason.INVALID_SOURCE_IP, "default/a")
    assert world.a(udp(a, b)).verdict is ACCEPT
    assert world.w(udp(stranger, b)).verdict is ACCEPT


def test_an_endpoint_is_not_blamed_for_who_used_its_address():
    world = World(Rule(0, 1002))
    view = world.pipeline.view
    by_b = packet_event(world.b(udp(A4, B4)).report, view, 1)
    assert (by_b.source_identity, by_b.source_endpoint) == (1002, 2)
    by_w = packet_event(world.w(udp(A4, B4)).report, view, 1)
    assert (by_w.source_identity, by_w.source_endpoint) == (0, 0)


def test_our_own_packets_may_bear_any_address():
    """The kernel resets a proxied connection in the name of the server."""
    world = World(Rule(0, 1002))
    assert world.node(udp(A4, B4)).verdict is ACCEPT


def test_an_endpoint_whose_interface_is_not_known_is_believed_anywhere_but_beside_another():

    world = World(Rule(0, 1002))
    old = world.pipeline.view.snapshot
    unknown = msgspec.structs.replace(old.endpoints[0], interface="", interface_index=0)
    new = msgspec.structs.replace(old, revision=9, endpoints=(unknown, old.endpoints[1]))
    world.pipeline.view = View(new)
    assert world.w(udp(A4, B4)).verdict is ACCEPT
    is_drop(world.b(udp(A4, B4)), DropReason.INVALID_SOURCE_IP)


def test_link_local_traffic_of_an_endpoint_is_asked_about_as_the_endpoints():
    world = World(Rule(1001, 1002, UDP))
    packet = ip("fe80::a", B6) / inet.UDP(sport=1, dport=2)
    decision = world.a(packet)
    assert decision.verdict is ACCEPT
    assert decision.report.decision.source.identity == 1001
    world.change()
    is_drop(world.a(packet), DropReason.POLICY_DENIED)


def test_dhcp_passes_as_the_endpoints_own_and_nothing_else_from_nowhere():
    world = World()
    discover = ip("0.0.0.0", "255.255.255.255") / inet.UDP(sport=68, dport=67)
    assert world.a(discover).report.decision.source.identity == 1001
    is_drop(world.a(udp("0.0.0.0", B4)), DropReason.INVALID_SOURCE_IP)
    is_drop(world.a(udp("::", B6)), DropReason.INVALID_SOURCE_IP)


# --- bytes ------------------------------------------------------------------------------------


def test_every_fault_has_a_reason():
    assert set(FAULT_REASON) == set(Fault)


def test_a_fragment_that_was_not_reassembled_is_dropped_by_its_name():
    world = World(Rule(0, 1002))
    decision = world.a(IP(src=A4, dst=B4, flags="MF", frag=0) / inet.UDP() / Raw(b"x" * 32))
    is_drop(decision, DropReason.IP_FRAGMENTATION_NOT_SUPPORTED, "fragment")
    event = packet_event(decision.report, world.pipeline.view, 1)
    assert (event.source_identity, event.destination_identity) == (1001, 1002)


def test_a_header_beyond_what_was_copied_is_dropped_not_guessed():
    """A peer accepts such packets (research, kube-network-policies): a bypass per packet."""
    world = World(Rule(0, 1002))
    options = inet6.IPv6ExtHdrDestOpt(options=[inet6.PadN(optdata=b"\0" * 250)])
    packet = bytes(ip(A6, B6) / options / inet.TCP(dport=22, flags="S"))
    assert len(packet) > 256
    decision = world.at(ON_A, packet, cut=256)
    is_drop(decision, DropReason.CT_TRUNCATED_OR_INVALID_HEADER)
    whole = World(Rule(0, 1002))
    assert whole.at(ON_A, packet).verdict is ACCEPT


SAMPLES = [
    bytes(packet)
    for packet in (
        syn(), syn(A6, B6), udp(), udp(A6, B6),
        ip(A4, B4) / inet.ICMP() / Raw(b"x"),
        ip(A6, B6) / inet6.ICMPv6EchoRequest(),
        ip(A4, B4) / inet.ICMP(type=3, code=4) / udp(),
        ip(A6, B6) / inet6.ICMPv6PacketTooBig() / udp(A6, B6),
        ip("fe80::1", "ff02::1", hlim=255) / inet6.ICMPv6ND_NS(tgt=A6),
        ip(A6, B6) / inet6.IPv6ExtHdrHopByHop() / inet6.IPv6ExtHdrFragment() / inet.TCP(),
    )
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=120),
        st.builds(
            lambda sample, at, value, cut: (
                sample[: at % len(sample)] + bytes((value,)) + sample[at % len(sample) + 1 :]
            )[: cut % (len(sample) + 1)],
            st.sampled_from(SAMPLES), st.integers(0, 200), st.integers(0, 255), st.integers(0, 200),
        ),
    ),
    st.sampled_from([0, ON_A, 12, ON_W, 4711]),
    st.booleans(),
)  # fmt: skip
def test_any_bytes_have_a_decision(data, interface, complete):
    """`decide` is total, and what it says can be told."""
    world = World(Rule(0, 1002), WEB, http_proxy_port=15006, workers=2)
    hook = 3 if interface == 0 else 0
    decision = world.pipeline.decide(data, interface, hook, 1.0, complete)
    assert isinstance(decision.verdict, (type(ACCEPT), Drop, Redirect, PassOn))
    if isinstance(decision.verdict, Drop):
        assert decision.report is not None
    if decision.report is not None:
        event = packet_event(decision.report, world.pipeline.view, 5)
        assert event.verdict in set(Verdict)


@pytest.mark.parametrize("sample", SAMPLES, ids=range(len(SAMPLES)))
def test_no_part_of_a_packet_passes(sample):
    """A cut packet is dropped wherever it is cut."""
    for cut in range(len(sample)):
        world = World(Rule(0, 1002))
        verdict = world.at(ON_A, sample[:cut]).verdict
        assert isinstance(verdict, Drop), cut


def test_everything_is_counted():
    world = World(Rule(1001, 1002, TCP, 80))
    handshake(world)
    world.a(syn(port=81))
    world.a(b"")
    counts = world.pipeline.counts
    assert counts.forwarded_count == 3
    assert counts.forwarded_bytes == 120
    assert counts.dropped == {
        DropReason.POLICY_DENIED: 1,
        DropReason.CT_TRUNCATED_OR_INVALID_HEADER: 1,
    }


def test_the_snapshot_of_the_test_world_is_valid():
    assert snapshot().revision == 1


NODE = "10.0.0.254"
NOWHERE = "10.8.8.8"


def node_world(*, workers=1, closed=True):
    """A world whose node is an endpoint that b alone may reach, or (`closed` False) everybody."""
    world = World(workers=workers, local_addresses=(parse_address(NODE),))
    host = EndpointRow(65_536, "node", "", 1, (parse_address(NODE),))
    entry = EntryRow(Action.ALLOW, Tier.NORMAL, 0.0, 1002 if closed else 0, 0, 0, 65535, "", -1, 0)
    ingress = DirectionRow(True, True, (entry,), (0,))
    policy = PolicyRow(1, ingress, DirectionRow(False, False))
    known = snapshot(closed=(), local_addresses=(parse_address(NODE),))
    world.pipeline.view = View(
        msgspec.structs.replace(
            known, endpoints=(*known.endpoints, host), policies=(*known.policies, policy)
        )
    )
    return world


def middle(source, destination, flags="PA"):
    return ip(source, destination) / inet.TCP(sport=4000, dport=22, flags=flags, seq=5, ack=9)


def test_the_node_is_asked_about_as_an_endpoint():
    """Host firewall: its ingress counts for endpoints and for the world."""
    world = node_world()
    assert world.b(syn(B4, NODE)).verdict is ACCEPT
    for decision in (world.a(syn(A4, NODE)), world.w(syn(W4, NODE))):
        assert decision.verdict == Drop(DropReason.POLICY_DENIED)


def test_a_connection_of_the_node_may_be_older_than_we_are_where_policy_allows_it():
    """A remote login survives the start of the firewall; a segment that opens is tracked."""
    assert node_world(closed=False).w(middle(W4, NODE)).verdict is ACCEPT
    assert node_world(closed=False).at(HERE, middle(NODE, W4)).verdict is ACCEPT
    refused = node_world().w(middle(W4, NODE)).verdict
    assert isinstance(refused, Drop)
    assert isinstance(node_world(closed=False).w(middle(W4, NODE, "SA")).verdict, Drop)


def test_between_an_endpoint_and_the_node_a_flow_begins_at_its_beginning():
    """Only what concerns the node alone is older than we are."""
    assert isinstance(node_world(closed=False).a(middle(A4, NODE)).verdict, Drop)
    assert isinstance(node_world(closed=False).w(middle(W4, A4)).verdict, Drop)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_node_may_report_errors_about_flows_that_nobody_manages(workers):
    """Time exceeded for a packet that is only forwarded here; the other way it stays a misfit."""
    error = ip(NODE, W4) / inet.ICMP(type=11) / udp(W4, NOWHERE)
    sent = node_world(workers=workers).at(HERE, error).verdict
    assert sent == (ACCEPT if workers == 1 else PassOn(ACCEPT))
    back = node_world().w(ip(W4, NODE) / inet.ICMP(type=11) / udp(NODE, NOWHERE)).verdict
    assert isinstance(back, Drop)


def test_what_came_through_a_bridge_is_not_redirected_and_says_so():
    world = proxied()
    decision = world.a(syn())
    assert decision.verdict == Redirect(15006)
    refused = world.pipeline.beyond_proxy(decision.report)
    is_drop(refused, DropReason.PROXY_REDIRECTION_NOT_SUPPORTED_FOR_PROTOCOL, "through a bridge")
    assert world.pipeline.counts.redirected_count == 0
    assert world.pipeline.beyond_proxy(None).report is None


@pytest.mark.parametrize(("a", "b"), ENDS)
def test_of_the_proxys_packets_only_the_source_is_judged(a, b):
    """No flow, no policy: whether the address lives where the packet came from."""
    world = World()
    answer = bytes(segment(b, a, port=4000, sport=80, flags="SA"))
    pipeline = world.pipeline
    assert pipeline.admit(answer, ON_B).verdict is ACCEPT
    is_drop(pipeline.admit(answer, ON_A), DropReason.INVALID_SOURCE_IP)
    is_drop(pipeline.admit(answer, ON_W), DropReason.INVALID_SOURCE_IP)
    is_drop(pipeline.admit(answer[:30], ON_B), DropReason.CT_TRUNCATED_OR_INVALID_HEADER)
    assert len(pipeline.tracker) == 0
    pipeline.view = None
    is_drop(pipeline.admit(answer, ON_B), DropReason.DROP_EP_NOT_READY)
