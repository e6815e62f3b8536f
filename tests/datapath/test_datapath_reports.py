"""What is told about a decision, and what a worker answers when asked."""

from datapath_world import A4, B4, ORIGIN, TCP, UDP, W4, Rule, World
from scapy.layers import inet
from scapy.layers.inet import IP

from conntrack.address import parse_address
from firewall.control.framing import datagrams, decode_from_worker
from firewall.control.messages import Answer, Events
from firewall.datapath.answers import WorkerCounts, conntrack_rows, forget_rows, metric_rows
from firewall.datapath.choice import choose
from firewall.datapath.events import packet_event
from firewall.policy.verdict import DropReason, PolicyMatch, TrafficDirection, Verdict


def syn(port=80):
    return IP(src=A4, dst=B4) / inet.TCP(sport=4000, dport=port, flags="SEC", seq=1)


def told(world, decision):
    return packet_event(decision.report, world.pipeline.view, 77)


def test_an_accepted_flow_is_told_with_everything_that_led_to_it():
    world = World(Rule(1001, 1002, TCP, 80))
    event = told(world, world.a(syn()))
    assert (event.time_ns, event.verdict, event.drop_reason) == (77, Verdict.ACCEPT, 0)
    assert (event.source, event.destination) == (parse_address(A4), parse_address(B4))
    assert (event.protocol, event.source_port, event.destination_port) == (6, 4000, 80)
    assert (event.tcp_flags, event.icmp_type, event.length) == (0xC2, -1, 40)
    assert (event.source_identity, event.destination_identity) == (1001, 1002)
    assert (event.source_endpoint, event.destination_endpoint) == (1, 2)
    assert event.direction == TrafficDirection.INGRESS
    assert event.match == PolicyMatch.L3_L4
    assert (event.reply, event.ct_state, event.interface_index) == (False, "new", 11)
    assert event.policy_revision == 101
    assert event.ingress_allowed_by == (ORIGIN,)
    assert event.isolated_by == ()
    assert event.policy_log == ("noted",)


def test_a_refusal_names_who_closed_the_endpoint():
    world = World(Rule(1001, 1002, TCP, 80))
    event = told(world, world.a(syn(81)))
    assert (event.verdict, event.drop_reason) == (Verdict.DROP, DropReason.POLICY_DENIED)
    assert event.isolated_by == (ORIGIN,)
    assert event.match == PolicyMatch.NONE


def test_audited_traffic_is_accepted_and_told_as_audited():
    world = World(policy_audit_mode=True)
    event = told(world, world.a(syn()))
    assert (event.verdict, event.audited) == (Verdict.ACCEPT, True)
    assert event.isolated_by == (ORIGIN,)


def test_a_redirect_is_told_with_the_proxys_port():
    world = World(Rule(0, 1002, TCP, 80, l7="http"), http_proxy_port=15006)
    event = told(world, world.a(syn()))
    assert (event.verdict, event.proxy_port) == (Verdict.REDIRECT, 15006)


def test_a_stranger_is_told_as_the_world():
    world = World(Rule(0, 1002))
    event = told(world, world.w(IP(src=W4, dst=B4) / inet.UDP(sport=1, dport=2)))
    assert (event.source_identity, event.source_endpoint) == (2, 0)


def test_bytes_that_are_no_packet_are_told_too():
    world = World()
    event = told(world, world.a(b"\x00"))
    assert (event.source, event.destination, event.protocol) == (b"", b"", 0)
    assert (event.verdict, event.detail) == (Verdict.DROP, "truncated")


def test_events_fit_the_channel():
    world = World(Rule(1001, 1002, TCP, 80))
    batch = Events(tuple(told(world, world.a(syn(port))) for port in range(80, 90)), 3)
    (datagram,) = datagrams(batch)
    assert decode_from_worker(datagram.payload) == batch


# --- answers ----------------------------------------------------------------------------------


def test_a_flow_is_answered_as_a_row_of_the_table():
    world = World(Rule(1001, 1002, UDP))
    world.a(IP(src=A4, dst=B4) / inet.UDP(sport=1, dport=2))
    world.b(IP(src=B4, dst=A4) / inet.UDP(sport=2, dport=1))
    (row,) = conntrack_rows(world.tracker, world.now, 3)
    assert row["worker"] == 3
    assert (row["protocol"], row["source"], row["destination"]) == (
        "udp", f"{A4}:1", f"{B4}:2",
    )  # fmt: skip
    assert (row["packets"], row["bytes"]) == ((1, 1), (28, 28))
    assert row["state"] == "REPLIED"
    assert row["expires_s"] > 0
    assert (row["source_identity"], row["verdict"]) == (1001, "accept")
    (datagram,) = datagrams(Answer(1, (row,), last=True))
    assert decode_from_worker(datagram.payload).last


def test_a_flow_that_ends_while_it_is_written_down_is_left_out():
    world = World(Rule(1001, 1002, UDP))
    for port in (1, 2, 3):
        world.a(IP(src=A4, dst=B4) / inet.UDP(sport=1, dport=port))
    rows = conntrack_rows(world.tracker, world.now, 0)
    next(rows)
    for entry in list(world.tracker.entries()):
        world.tracker.remove(entry)
    assert list(rows) == []


def test_only_chosen_flows_are_forgotten():
    world = World(Rule(1001, 1002, UDP))
    for port in (1, 2, 3):
        world.a(IP(src=A4, dst=B4) / inet.UDP(sport=port, dport=53))
    a, b = parse_address(A4), parse_address(B4)

    def forgotten(sources, destinations):
        choice = choose(sources, destinations)
        rows = forget_rows(world.tracker, world.pipeline.offloaded, choice, 0)
        return [row["original"] for row in rows]

    assert forgotten(((b, 0),), None) == []
    assert forgotten(((a, 9),), None) == []
    assert forgotten(((a, 2),), ((b, 53),)) == [(a, b, UDP, 2, 53)]
    assert len(world.tracker) == 2
    assert len(forgotten(None, ((b, 0),))) == 2
    assert len(world.tracker) == 0


def test_a_forgotten_flow_is_no_longer_counted_as_offloaded():
    world = World(Rule(1001, 1002, UDP))
    world.a(IP(src=A4, dst=B4) / inet.UDP(sport=1, dport=53))
    (entry,) = world.tracker.entries()
    world.pipeline.offloaded.give(entry, world.now)
    (row,) = forget_rows(world.tracker, world.pipeline.offloaded, choose(None, None), 0)
    assert row["offloaded"] is True
    assert len(world.pipeline.offloaded) == 0


def test_counters_have_names_labels_and_values():
    world = World(Rule(1001, 1002, TCP, 80))
    world.a(syn())
    world.a(syn(81))
    rows = list(metric_rows(world.tracker, world.pipeline.counts, WorkerCounts(4, 3, 5, 6, 0.25)))
    found = {(row["name"], *row["labels"].values()): row["value"] for row in rows}
    assert found["forward_count_total",] == 1
    assert found["forward_bytes_total",] == 40
    assert found["drop_count_total", "POLICY_DENIED"] == 1
    assert found["drop_count_total", "INTERNAL"] == 4
    assert found["internal_errors_total",] == 3
    assert found["verdict_refused_count_total",] == 5
    assert found["datapath_conntrack_entries", "tcp", "SYN_SENT"] == 1
    assert found["datapath_conntrack_inserted_total",] == 1
    assert found["datapath_conntrack_expiry_lag_seconds",] == 0.25


def test_flows_that_leave_early_or_find_no_room_are_counted():
    world = World(Rule(1001, 1002, TCP, 80), limit=2)
    for port in range(4000, 4005):
        world.a(IP(src=A4, dst=B4) / inet.TCP(sport=port, dport=80, flags="S"))
    rows = metric_rows(world.tracker, world.pipeline.counts, WorkerCounts(0, 0, 0, 0, 0.0))
    found = {(row["name"], *row["labels"].values()): row["value"] for row in rows}
    assert found["datapath_conntrack_evicted_total",] == 3
    assert found["datapath_conntrack_refused_total",] == 0
    assert found["datapath_conntrack_entries", "tcp", "SYN_SENT"] == 2
