"""Which flows the kernel may carry, and what the worker still knows of them."""

import msgspec
from datapath_world import A4, ALLOWED, B4, ON_B, TCP, UDP, W4, Carrier, Rule, snapshot
from scapy.layers.inet import IP
from scapy.layers.inet import TCP as SEGMENT
from scapy.layers.inet import UDP as DATAGRAM

from conntrack.address import parse_address
from conntrack.flow import FlowTuple
from firewall.datapath.ctnetlink import KernelFlow
from firewall.datapath.offload import AFTER_COUNT, AGAIN_COUNT, LONGEST_PAUSE_S
from firewall.datapath.pipeline import FORWARD, SETTLED
from firewall.datapath.verdict import ACCEPT, OFFLOAD, Defer, Drop, Redirect, Reset
from firewall.policy.snapshot import DirectionRow, PolicyRow
from firewall.policy.verdict import DropReason
from firewall.policy.view import View


def kernel(timeout_s: int = 30, **more) -> KernelFlow:
    """What the kernel says about that flow."""
    ends = parse_address(A4), parse_address(B4)
    return KernelFlow(FlowTuple(*ends, UDP, 4000, 53), 0, 0, timeout_s, True, True, **more)


def test_an_answered_flow_is_given_away_after_a_few_packets():
    carrier = Carrier(ALLOWED)
    assert carrier.until_carried() == AFTER_COUNT
    assert carrier.entry.offloaded
    assert len(carrier.pipeline.offloaded) == 1


def test_an_unanswered_flow_is_not_given_away():
    carrier = Carrier(ALLOWED)
    assert all(carrier.ask() is ACCEPT for _ in range(5 * AGAIN_COUNT))


def test_an_audited_flow_is_looked_at_all_the_time():
    carrier = Carrier(Rule(7, 1002), policy_audit_mode=True)
    for _ in range(AGAIN_COUNT):
        assert carrier.ask() is ACCEPT
        assert carrier.answer() is ACCEPT


def test_a_flow_with_http_rules_goes_to_the_proxy():
    carrier = Carrier(Rule(1001, 1002, TCP, 80, l7="http"), http_proxy_port=15006)
    syn = IP(src=A4, dst=B4) / SEGMENT(sport=1, dport=80, flags="S")
    for _ in range(2 * AFTER_COUNT):
        assert isinstance(carrier.feed(syn), Redirect)


def test_packets_that_come_all_the_same_pass_and_mark_the_flow_again_now_and_then():
    carrier = Carrier(ALLOWED)
    carrier.until_carried()
    verdicts = [carrier.ask() for _ in range(2 * AGAIN_COUNT)]
    assert sum(verdict is OFFLOAD for verdict in verdicts) == 2
    assert all(verdict in (ACCEPT, OFFLOAD) for verdict in verdicts)


def test_after_a_change_the_first_packet_marks_the_flow_again_or_is_dropped():
    carrier = Carrier(ALLOWED)
    carrier.until_carried()
    carrier.change(ALLOWED)
    assert carrier.answer() is OFFLOAD
    carrier.change()
    verdict = carrier.ask()
    assert isinstance(verdict, Drop)
    assert verdict.reason is DropReason.POLICY_DENIED
    assert not carrier.entry.offloaded
    assert len(carrier.pipeline.offloaded) == 0


def test_what_the_kernel_calls_invalid_is_believed_of_a_carried_flow_only():
    carrier = Carrier(ALLOWED)
    assert carrier.ask(suspect=True) is ACCEPT
    carrier.until_carried()
    verdict = carrier.answer(suspect=True)
    assert isinstance(verdict, Drop)
    assert verdict.reason is DropReason.INVALID_PACKET_DROPPED


def test_a_carried_flow_lives_as_the_kernel_says():
    carrier = Carrier(ALLOWED)
    carrier.until_carried()
    offloaded, entry = carrier.pipeline.offloaded, carrier.entry
    later = carrier.now + 10_000  # nothing was seen here for hours
    carrier.tracker.expire(later)
    assert len(carrier.tracker) == 1
    offloaded.dump_begins(later)
    offloaded.found(kernel(7, packets=(500, 400), bytes=(5000, 4000)), later)
    offloaded.dump_ends(later)
    assert (entry.expires_at, entry.packets, entry.bytes) == (later + 7, (500, 400), (5000, 4000))
    assert offloaded.next_dump_at == later + 7  # sooner than usual: it may end then
    offloaded.dump_begins(later + 8)
    offloaded.dump_ends(later + 8)
    assert not entry.offloaded
    carrier.tracker.expire(later + 8)
    assert len(carrier.tracker) == 0


def test_a_flow_that_somebody_deleted_from_the_kernel_goes_on_here():
    carrier = Carrier(ALLOWED)
    carrier.until_carried()
    offloaded = carrier.pipeline.offloaded
    for seconds, found in ((1, True), (2, False)):
        offloaded.dump_begins(carrier.now + seconds)
        if found:
            offloaded.found(kernel(100), carrier.now + seconds)
        offloaded.dump_ends(carrier.now + seconds)
    carrier.now += 50
    assert not carrier.entry.offloaded
    assert carrier.answer() is OFFLOAD  # of a flow that is known: it is given away once more


def test_a_dump_that_failed_says_nothing():
    carrier = Carrier(ALLOWED)
    carrier.until_carried()
    offloaded = carrier.pipeline.offloaded
    offloaded.dump_begins(carrier.now + 1)
    offloaded.dump_ends(carrier.now + 1, whole=False)
    assert carrier.entry.offloaded
    assert offloaded.next_dump_at == carrier.now + 1 + LONGEST_PAUSE_S


def test_the_end_of_a_connection_brings_it_back():
    carrier = Carrier(ALLOWED)
    ends = {"sport": 4000, "dport": 80}, {"sport": 80, "dport": 4000}

    def a(flags: str, seq: int, ack: int):
        return carrier.feed(IP(src=A4, dst=B4) / SEGMENT(**ends[0], flags=flags, seq=seq, ack=ack))

    def b(flags: str, seq: int, ack: int):
        return carrier.feed(IP(src=B4, dst=A4) / SEGMENT(**ends[1], flags=flags, seq=seq, ack=ack))

    a("S", 100, 0)
    b("SA", 500, 101)
    verdicts = [a("A", 101, 501) for _ in range(AFTER_COUNT)]
    assert OFFLOAD in verdicts
    assert a("FA", 90_101, 70_501) is ACCEPT  # far beyond what was seen here
    assert not carrier.entry.offloaded
    assert b("A", 70_501, 90_102) is ACCEPT


def test_what_policy_would_drop_is_deferred_until_its_destination_is_known():
    carrier = Carrier()
    before = snapshot()
    closed = DirectionRow(True, True, (), (0,))
    policies = (PolicyRow(1001, DirectionRow(False, False), closed),)
    carrier.pipeline.view = View(msgspec.structs.replace(before, policies=policies))
    service = IP(src=A4, dst=W4) / DATAGRAM(sport=1, dport=2)
    assert isinstance(carrier.feed(service), Defer)
    assert len(carrier.tracker) == 0
    for hook in (SETTLED, FORWARD):
        assert isinstance(carrier.feed(service, hook=hook), Drop)
    neighbour = IP(src=A4, dst=B4) / DATAGRAM(sport=1, dport=2)
    assert isinstance(carrier.feed(neighbour), Drop)  # nobody translates an endpoint's address


def test_behind_the_nat_table_a_translated_destination_goes_to_the_proxy():
    """Each packet that comes, and an older connection is reset there, too."""
    carrier = Carrier(Rule(1001, 1002, TCP, 80, l7="http"), http_proxy_port=15006)
    syn = IP(src=A4, dst=B4) / SEGMENT(sport=1, dport=80, flags="S")
    for _ in range(2):
        assert isinstance(carrier.feed(syn, hook=SETTLED), Redirect)
    older = IP(src=A4, dst=B4) / SEGMENT(sport=2, dport=81, flags="S", seq=1)
    carrier.change(ALLOWED)
    assert carrier.feed(older, hook=SETTLED) is ACCEPT
    web = snapshot(Rule(1001, 1002, TCP, 81, l7="http"), revision=9, http_proxy_port=15006)
    carrier.pipeline.view = View(web)
    older[SEGMENT].flags = "A"
    assert isinstance(carrier.feed(older, hook=SETTLED), Reset)


def test_a_spoofed_source_is_dropped_behind_the_nat_table():
    carrier = Carrier(ALLOWED)
    packet = bytes(IP(src=A4, dst=B4) / DATAGRAM(sport=1, dport=2))
    verdict = carrier.pipeline.decide(packet, ON_B, SETTLED, 1.0).verdict
    assert isinstance(verdict, Drop)
    assert verdict.reason is DropReason.INVALID_SOURCE_IP


def test_further_on_a_translated_destination_cannot_go_to_the_proxy():
    carrier = Carrier(Rule(1001, 1002, TCP, 80, l7="http"), http_proxy_port=15006)
    verdict = carrier.feed(IP(src=A4, dst=B4) / SEGMENT(sport=1, dport=80), hook=FORWARD)
    assert isinstance(verdict, Drop)
    assert "translated" in verdict.detail
    assert len(carrier.tracker) == 0
