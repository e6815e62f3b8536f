"""The kernel's flows: messages become tuples, and only living flows are taken over."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers import inet
from scapy.layers.inet import IP

from conntrack.address import parse_address
from conntrack.flow import FlowTuple
from conntrack.packet import parse
from conntrack.tcp_states import TcpState
from conntrack.tracker import LINUX, STRICT, CtState, Tracker
from firewall.datapath.ctnetlink import KernelFlow, decode, take_over, tuples_in

A, B, C = (parse_address(f"10.0.0.{last}") for last in (1, 2, 3))


def attribute(kind: int, *parts: bytes, nested: bool = False) -> bytes:
    body = b"".join(parts)
    head = struct.pack("=HH", 4 + len(body), kind | (0x8000 if nested else 0))
    return head + body + b"\0" * (-len(body) % 4)


def u16(value: int) -> bytes:
    return struct.pack("!H", value)


def u32(value: int) -> bytes:
    return struct.pack("!I", value)


def entry(
    protocol: int,
    source: bytes,
    destination: bytes,
    *ports,
    state: int = 0,
    status: int = 14,
    reply_source: bytes = b"",
    reply_ports: tuple[bytes, ...] = (),
):
    """A message as ctnetlink builds it (nf_conntrack_netlink.c, ctnetlink_fill_info)."""
    first = 1 if len(source) == 4 else 3
    number = attribute(1, bytes((protocol,)))
    numbers = attribute(2, number, *ports, nested=True)
    there = reply_ports or [
        attribute({2: 3, 3: 2}.get(port[2], port[2]), port[4:6]) for port in ports if port[2] < 4
    ]
    back = attribute(2, number, *(there or ports), nested=True)
    info = attribute(4, attribute(1, attribute(1, bytes((state,))), nested=True), nested=True)

    def addresses(source: bytes, destination: bytes) -> bytes:
        return attribute(
            1, attribute(first, source), attribute(first + 1, destination), nested=True
        )

    return (
        attribute(1, addresses(source, destination), numbers, nested=True)
        + attribute(2, addresses(reply_source or destination, source), back, nested=True)
        + attribute(3, u32(status))
        + (info if state else b"")
        + attribute(7, u32(300))
    )


def test_a_tcp_flow_is_read():
    data = entry(6, A, B, attribute(2, u16(4000)), attribute(3, u16(80)), state=3)
    assert decode(data) == KernelFlow(FlowTuple(A, B, 6, 4000, 80), 0, 3, 300, True, True)


def test_an_icmpv6_query_is_read_with_identifier_and_type():
    source, destination = parse_address("fd00::1"), parse_address("fd00::2")
    ports = attribute(7, u16(77)), attribute(8, b"\x80"), attribute(9, b"\0")
    flow = decode(entry(58, source, destination, *ports, status=8))
    assert flow.original == FlowTuple(source, destination, 58, 77, 77)
    assert (flow.icmp_type, flow.seen_reply, flow.assured) == (128, False, False)


def test_the_destination_of_a_translated_flow_is_who_answers():
    """Policy is asked about the backend, not about the address that stood for it."""
    ports = attribute(2, u16(4000)), attribute(3, u16(80))
    answering = attribute(2, u16(8080)), attribute(3, u16(4000))
    data = entry(6, A, B, *ports, state=3, reply_source=C, reply_ports=answering)
    assert decode(data).original == FlowTuple(A, C, 6, 4000, 8080)


def test_both_tuples_of_a_translated_flow_can_be_had():
    """What was dialed, and where answers go to."""
    message = entry(6, A, C, attribute(2, u16(4000)), attribute(3, u16(8000)), reply_source=B)
    assert tuples_in(message) == (
        FlowTuple(A, C, 6, 4000, 8000),
        FlowTuple(B, A, 6, 8000, 4000),
    )
    assert tuples_in(b"") is None


def test_mark_and_counters_are_read_where_they_are():
    counters = [attribute(1, bytes(7) + b"\x05"), attribute(2, bytes(6) + b"\x01\x00")]
    data = entry(6, A, B, attribute(2, u16(1)), attribute(3, u16(2)), state=3)
    bare = decode(data)
    assert (bare.mark, bare.packets, bare.bytes) == (0, None, None)
    more = b"".join(attribute(kind, *counters, nested=True) for kind in (9, 10))
    flow = decode(data + attribute(8, u32(0x1C000007)) + more)
    assert (flow.mark, flow.packets, flow.bytes) == (0x1C000007, (5, 5), (256, 256))


def test_a_dying_flow_is_left_out():
    assert decode(entry(17, A, B, status=14 | 512)) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_left_out(data):
    assert decode(data) is None or isinstance(decode(data), KernelFlow)


def segment(flags, sequence, acknowledgment, *, back=False, data=b""):
    ends = (
        {"src": "10.0.0.2", "dst": "10.0.0.1"} if back else {"src": "10.0.0.1", "dst": "10.0.0.2"}
    )
    ports = {"sport": 2, "dport": 1} if back else {"sport": 1, "dport": 2}
    numbers = {"seq": sequence, "ack": acknowledgment}
    return parse(
        bytes(IP(**ends) / inet.TCP(flags=flags, **ports, **numbers) / data), complete=True
    )


WAITING = {
    TcpState.SYN_SENT: [segment("SA", 5000, 1001, back=True), segment("A", 1001, 5001)],
    TcpState.SYN_RECV: [
        segment("SA", 5000, 1001, back=True),
        segment("A", 1001, 5001),
        segment("PA", 1001, 5001, data=b"word"),
        segment("A", 5001, 1005, back=True),
    ],
    TcpState.ESTABLISHED: [
        segment("PA", 1001, 5001, data=b"word"),
        segment("A", 5001, 1005, back=True),
    ],
    TcpState.TIME_WAIT: [
        segment("PA", 5001, 1001, back=True, data=b"word"),
        segment("A", 1001, 5005),
        segment("FA", 1001, 5005),
        segment("FA", 5005, 1002, back=True),
        segment("A", 1002, 5006),
    ],
    TcpState.CLOSE: [segment("PA", 1001, 5001, data=b"word"), segment("RA", 5001, 1005, back=True)],
}
"""What may be in the queue, by the latest state that the kernel may think its flow is in."""


@pytest.mark.parametrize("profile", [STRICT, LINUX])
@pytest.mark.parametrize("state", [state for state in TcpState if state])
def test_what_waited_while_the_kernel_went_ahead_passes(state, profile):
    tracker = Tracker(profile)
    flow = KernelFlow(FlowTuple(A, B, 6, 1, 2), 0, state, 300, True, True)
    assert take_over(flow, tracker, 0.0) is not None
    closing = state in range(TcpState.FIN_WAIT, TcpState.CLOSE)
    for packet in WAITING.get(TcpState.TIME_WAIT if closing else state, ()):
        tracked = tracker.track(packet, 1.0)
        assert tracked.ctstate is not CtState.INVALID, tracked.reason
        tracker.confirm(tracked, 1.0)


def test_a_flow_that_is_over_may_leave_early():
    tracker = Tracker(limit_count=2)
    for port, state in ((1, TcpState.TIME_WAIT), (2, TcpState.ESTABLISHED)):
        take_over(KernelFlow(FlowTuple(A, B, 6, port, 9), 0, state, 300, True, True), tracker, 0.0)
    third = KernelFlow(FlowTuple(A, C, 6, 3, 9), 0, TcpState.ESTABLISHED, 300, True, True)
    assert take_over(third, tracker, 1.0) is not None
    assert {entry.original.source_port for entry in tracker.entries()} == {2, 3}


@pytest.mark.parametrize("profile", [STRICT, LINUX])
def test_a_flow_taken_over_lives_no_longer_than_one_of_our_own(profile):
    tracker = Tracker(profile)
    flow = KernelFlow(FlowTuple(A, B, 6, 1, 2), 0, TcpState.ESTABLISHED, 10**9, True, True)
    take_over(flow, tracker, 0.0)
    (found,) = tracker.entries()
    assert found.expires_at == profile.timeouts.tcp[TcpState.ESTABLISHED]
    assert found.decision is None
