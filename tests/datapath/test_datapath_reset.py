"""Connections that passed directly, and may no longer: both ends are told by RST."""

from math import inf

import pytest
from datapath_world import A4, A6, B4, B6, ON_A, TCP, Rule, World
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import inet
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6

from conntrack.address import parse_address
from conntrack.packet import parse
from firewall.datapath.pipeline import PREROUTING, PipelineSettings, Resets
from firewall.datapath.reset import ends_of, readdressed, resets
from firewall.datapath.silence import BUDGET_COUNT, DELAY_S, PAUSE_S, ROUND_COUNT, Silence
from firewall.datapath.verdict import ACCEPT, Drop, Redirect, Reset

ENDS = [(A4, B4), (A6, B6)]
DIRECT = Rule(1001, 1002, TCP, 80)
HTTP = Rule(1001, 1002, TCP, 80, l7="http")
PROXY = {"http_proxy_port": 15006}


def ip(source, destination):
    return (IPv6 if ":" in source else IP)(src=source, dst=destination)


def syn(ends=ENDS[0], seq=100):
    return ip(*ends) / inet.TCP(sport=4000, dport=80, flags="S", seq=seq)


def segment(ends=ENDS[0], **fields):
    fields = {"flags": "PA", "seq": 101, "ack": 501} | fields
    return ip(*ends) / inet.TCP(sport=4000, dport=80, **fields) / b"data"


def established(ends=ENDS[0], wanted=Resets.L7):
    world = World(DIRECT, **PROXY)
    world.pipeline.settings = PipelineSettings(resets=wanted)
    assert world.a(syn(ends)).verdict is ACCEPT
    assert world.b(reply(ends, flags="SA", seq=500)).verdict is ACCEPT
    assert world.a(segment(ends, flags="A")).verdict is ACCEPT
    return world


def reply(ends, **fields):
    fields = {"flags": "A", "seq": 501, "ack": 101} | fields
    return ip(*reversed(ends)) / inet.TCP(sport=80, dport=4000, **fields)


def summaries(decision):
    """(source, destination, sequence number, acknowledgment or None) of each RST."""
    assert isinstance(decision.verdict, Reset), decision
    found = []
    for data in decision.verdict.segments:
        packet = (IP if data[0] >> 4 == 4 else IPv6)(data)
        tcp = packet[inet.TCP]
        assert tcp.flags.R
        assert tcp.flags.S is tcp.flags.F is tcp.flags.P is False
        found.append((packet.src, packet.dst, tcp.seq, tcp.ack if tcp.flags.A else None))
    return found


@pytest.mark.parametrize("ends", ENDS)
def test_the_clients_next_segment_ends_the_connection_at_both_ends(ends):
    """Its own last acknowledgment for the sender, its own number for the receiver."""
    a, b = ends
    world = established(ends)
    world.change(HTTP)
    decision = world.a(segment(ends))
    assert summaries(decision) == [(b, a, 501, None), (a, b, 101, 501)]
    assert isinstance(decision.report.verdict, Drop)
    assert "older than the L7 rules" in decision.report.verdict.detail
    assert world.pipeline.counts.reset_count == 1


@pytest.mark.parametrize("ends", ENDS)
def test_the_servers_next_segment_does_so_too(ends):
    """A client that only listens must not wait for its keepalive."""
    a, b = ends
    world = established(ends)
    world.change(HTTP)
    assert summaries(world.b(reply(ends))) == [(a, b, 101, None), (b, a, 501, 101)]


def test_whatever_still_comes_is_answered_so_until_the_client_begins_anew():
    world = established()
    world.change(HTTP)
    for _ in range(2):
        assert isinstance(world.a(segment()).verdict, Reset)
        assert isinstance(world.b(reply(ENDS[0])).verdict, Reset)
    world.change(HTTP)  # another revision of the same
    assert isinstance(world.b(reply(ENDS[0])).verdict, Reset)
    fresh = world.a(syn(seq=9_000_000))
    assert fresh.verdict == Redirect(15006)
    assert fresh.report is not None
    assert world.a(segment(seq=9_000_001, ack=1)).verdict == Redirect(15006)


def test_the_rst_of_one_end_reaches_the_other_and_is_not_answered():
    world = established()
    world.change(HTTP)
    decision = world.a(segment(flags="R", seq=101, ack=0))
    assert summaries(decision) == [(A4, B4, 101, None)]


def test_a_flow_that_was_redirected_from_its_first_packet_on_is_not_reset():
    """The proxy has it."""
    world = World(HTTP, **PROXY)
    assert world.a(syn()).verdict == Redirect(15006)
    world.change(HTTP, DIRECT)
    assert not isinstance(world.a(segment()).verdict, Reset)


@pytest.mark.parametrize(
    ("wanted", "rules", "kind"),
    [
        (Resets.NONE, [HTTP], Redirect),
        (Resets.L7, [], Drop),
        (Resets.ALL, [], Reset),
        (Resets.ALL, [HTTP], Reset),
    ],
)
def test_what_is_reset_is_a_setting(wanted, rules, kind):
    world = established(wanted=wanted)
    world.change(*rules)
    assert isinstance(world.a(segment()).verdict, kind)


@given(
    st.sampled_from(ENDS),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["A", "PA", "FA", "SA", "S", "F", "R", "RA", ""]),
    st.binary(max_size=5),
)
def test_what_is_sent_has_right_checksums_and_numbers(ends, seq, ack, flags, payload):
    """By scapy's arithmetic and our own parser; RFC 9293 3.10.7.1 says which number."""
    a, b = ends
    header = inet.TCP(sport=4000, dport=80, flags=flags, seq=seq, ack=ack)
    parsed = parse(bytes(ip(a, b) / header / payload))
    made = resets(parsed)
    assert len(made) == (1 if "R" in flags else 2)
    for data in made:
        layer = (IP if data[0] >> 4 == 4 else IPv6)(data)
        said = layer[inet.TCP].chksum
        del layer[inet.TCP].chksum
        assert type(layer)(bytes(layer))[inet.TCP].chksum == said
    onward = parse(made[-1])
    assert (onward.source, onward.sequence) == (parsed.source, seq)
    if "R" not in flags:
        back = parse(made[0])
        if "A" in flags:
            assert back.sequence == ack
        else:
            length = parsed.payload_bytes + ("S" in flags) + ("F" in flags)
            assert back.acknowledgment == (seq + length) % 2**32


# --- connections on which nobody speaks ----------------------------------------------------------


def asked(silence, now):
    """(source, destination, sequence number, acknowledgment) of each question of a round."""
    found = []
    for data in silence.round(now):
        packet = (IP if data[0] >> 4 == 4 else IPv6)(data)
        tcp = packet[inet.TCP]
        sum_there = tcp.chksum
        del tcp.chksum
        assert (IP if packet.version == 4 else IPv6)(bytes(packet))[inet.TCP].chksum == sum_there
        assert (str(tcp.flags), len(tcp.payload)) == ("A", 0)
        found.append((packet.src, packet.dst, tcp.seq, tcp.ack))
    return found


@pytest.mark.parametrize("ends", ENDS)
def test_both_ends_are_asked_with_a_number_that_they_have_already(ends):
    """RFC 9293 3.8.4: the next number less one."""
    a, b = ends
    world = established(ends)
    silence = Silence(world.pipeline)
    assert silence.due_at == inf
    world.change(HTTP)
    silence.begin(world.now)
    assert silence.due_at == world.now + DELAY_S
    assert asked(silence, silence.due_at) == [(a, b, 100, 501), (b, a, 500, 101)]
    assert silence.due_at == inf
    assert isinstance(world.b(reply(ends)).verdict, Reset)  # what the end says to it


@pytest.mark.parametrize(("wanted", "rules"), [
    (Resets.L7, [DIRECT]), (Resets.L7, []), (Resets.NONE, [HTTP]),
])  # fmt: skip
def test_connections_that_may_pass_or_are_not_to_be_reset_stay_as_they_are(wanted, rules):
    world = established(wanted=wanted)
    silence = Silence(world.pipeline)
    world.change(*rules)
    (entry,) = world.tracker.entries()
    before = entry.decision, entry.revision
    silence.begin(world.now)
    assert silence.round(world.now + DELAY_S) == []
    assert (entry.decision, entry.revision) == before
    assert silence.due_at == inf


def test_a_connection_that_lost_its_permission_altogether_is_asked_where_all_are_reset():
    world = established(wanted=Resets.ALL)
    silence = Silence(world.pipeline)
    world.change()
    silence.begin(world.now)
    assert len(silence.round(world.now + DELAY_S)) == 2


def test_what_the_kernel_carries_is_asked_until_one_of_its_packets_comes_here():
    """Its rules change after the snapshot; but not for ever, if the end is gone."""
    world = established()
    silence = Silence(world.pipeline)
    (entry,) = world.tracker.entries()
    world.pipeline.offloaded.give(entry, world.now)
    world.change(HTTP)
    silence.begin(world.now)
    times = 0
    while silence.due_at < inf:
        assert len(silence.round(silence.due_at)) == 2
        times += 1
    assert times == ROUND_COUNT
    silence.begin(world.now)
    assert len(silence.round(silence.due_at)) == 2
    assert isinstance(world.b(reply(ENDS[0])).verdict, Reset)
    assert not entry.offloaded
    silence.round(silence.due_at)
    assert silence.due_at == inf


def test_a_large_table_is_gone_over_in_small_rounds_and_dead_flows_are_passed_over():
    world = established()
    for port in range(5000, 5000 + 2 * BUDGET_COUNT):
        opening = IP(src=A4, dst=B4) / inet.TCP(sport=port, dport=80, flags="S")
        data = bytes(opening)
        assert world.pipeline.decide(data, ON_A, PREROUTING, world.now).verdict is ACCEPT
    silence = Silence(world.pipeline)
    world.change(HTTP)
    silence.begin(world.now)
    first = next(iter(world.tracker.entries()))
    world.tracker.remove(first)
    sizes, at = [], silence.due_at
    while silence.due_at < inf:
        sizes.append(len(silence.round(at)) // 2)
        assert silence.due_at in {at + PAUSE_S, inf}
        at += PAUSE_S
    assert sizes == [BUDGET_COUNT, BUDGET_COUNT, 0]


@pytest.mark.parametrize("ends", ENDS)
def test_a_segment_can_be_given_to_other_ends(ends):
    """Those by which the kernel knows a connection, so that it translates the segment."""
    onward = resets(parse(bytes(segment(ends, flags="PA"))))[1]
    made = ends_of(onward)
    assert (made.source, made.source_port) == (parse_address(ends[0]), 4000)
    other = made._replace(destination=made.source, destination_port=8000)
    packet = readdressed(onward, other)
    assert ends_of(packet) == other
    if len(other.source) == 4:
        packet = bytes(IP(packet[:10] + bytes(2) + packet[12:]))  # the kernel fills it in
    read = parse(packet, verify=len(other.source) == 16)
    before = parse(onward)
    assert (read.sequence, read.acknowledgment) == (before.sequence, before.acknowledgment)
    assert read.tcp_flags == before.tcp_flags
