"""Connections that passed directly, and may no longer: both ends are told by RST."""

import pytest
from datapath_world import A4, A6, B4, B6, TCP, Rule, World
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import inet
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6

from conntrack.packet import parse
from firewall.datapath.pipeline import PipelineSettings, Resets
from firewall.datapath.reset import resets
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
