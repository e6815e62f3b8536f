"""The tracker as the datapath uses it: what is refused, what is related, what two packets do."""

import dataclasses
import struct
from pathlib import Path

import packet_script
import pytest
from packet_script import Ends

from conntrack.flow import Direction, FlowTuple
from conntrack.packet import Packet, parse
from conntrack.tcp_states import TcpState
from conntrack.tcp_window import NO_FIN, UNKNOWN, make, pack, unpack
from conntrack.tracker import LINUX, READY_COUNT, STRICT, CtState, Tracked, Tracker

A4, B4, C4 = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2)), bytes((10, 0, 0, 3))
A6, B6 = bytes(15) + b"\1", bytes(15) + b"\2"
LINK6, GROUP6 = b"\xfe\x80" + bytes(13) + b"\1", b"\xff\x02" + bytes(13) + b"\1"
NOW = 50.0


def v4(
    protocol: int, source: bytes, destination: bytes, body: bytes, options: bytes = b""
) -> Packet:
    head = struct.pack(
        "!BBHHHBBH", 0x45 + len(options) // 4, 0, 20 + len(options) + len(body), 1, 0, 64,
        protocol, 0,
    )  # fmt: skip
    return parse(head + source + destination + options + body)


def v6(protocol: int, source: bytes, destination: bytes, body: bytes, hops: int = 64) -> Packet:
    head = struct.pack("!IHBB", 6 << 28, len(body), protocol, hops)
    return parse(head + source + destination + body)


def udp(source: bytes, destination: bytes, sport: int = 4000, dport: int = 53) -> Packet:
    return v4(17, source, destination, struct.pack("!HHHH", sport, dport, 8, 1))


def tcp(source: bytes, destination: bytes, sport: int, dport: int, numbers: str) -> Packet:
    flags, seq, ack = numbers.split()
    bits = sum({"F": 1, "S": 2, "R": 4, "A": 16}[letter] for letter in flags)
    body = struct.pack("!HHIIBBHHH", sport, dport, int(seq), int(ack), 0x50, bits, 65535, 0, 0)
    return v4(6, source, destination, body)


def feed(tracker: Tracker, packet: Packet, now: float = NOW) -> Tracked:
    tracked = tracker.track(packet, now)
    tracker.confirm(tracked, now)
    return tracked


def establish(tracker: Tracker) -> None:
    feed(tracker, tcp(A4, B4, 4000, 80, "S 1000 0"))
    feed(tracker, tcp(B4, A4, 80, 4000, "SA 5000 1001"))
    last = feed(tracker, tcp(A4, B4, 4000, 80, "A 1001 5001"))
    assert last.ctstate == CtState.ESTABLISHED


def error(quoted: bytes, *, kind: int = 3, code: int = 1, rest: int = 0, to: bytes = A4) -> Packet:
    return v4(1, C4, to, struct.pack("!BBHI", kind, code, 0, rest) + quoted)


def quote(seq: int, size: int = 28) -> bytes:
    body = struct.pack("!HHIIBBHHH", 4000, 80, seq, 5001, 0x50, 16, 65535, 0, 0)
    return (struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, 6, 0) + A4 + B4 + body)[:size]


STRICT_REFUSES = [
    (v4(17, A4, B4, struct.pack("!HHHH", 1, 2, 8, 1), b"\x01\x83\x03\x00"), "source route"),
    (v6(17, A6, B6, struct.pack("!HHHH", 1, 2, 8, 0)), "without checksum"),
    (v6(43, A6, B6, bytes((17, 0, 0, 0, 0, 0, 0, 0)) + udp(A4, B4).key[8:12] + b"\0\x08\0\x01"),
     "routing header type 0"),
    (tcp(A4, A4, 80, 80, "S 1 0"), "itself"),
    (tcp(A4, B4, 0, 80, "S 1 0"), "port 0"),
    (tcp(A4, B4, 4000, 0, "S 1 0"), "port 0"),
    (udp(A4, B4, 4000, 0), "port 0"),
]  # fmt: skip


@pytest.mark.parametrize(("packet", "reason"), STRICT_REFUSES)
def test_strict_says_why_it_refuses_what_linux_accepts(packet: Packet, reason: str) -> None:
    """RFC 7126, 8200 8.1, 5095, 1122 3.2.1.3, 6335."""
    tracked = Tracker(STRICT).track(packet, NOW)
    assert tracked.ctstate == CtState.INVALID
    assert reason in tracked.reason
    assert Tracker(LINUX).track(packet, NOW).ctstate == CtState.NEW


def test_a_source_route_is_refused_inside_a_flow_too() -> None:
    """A flow that was accepted does not open the door for odd packets."""
    tracker = Tracker(STRICT)
    feed(tracker, udp(A4, B4))
    body = struct.pack("!HHHH", 4000, 53, 8, 1)
    assert feed(tracker, v4(17, A4, B4, body, b"\x01\x89\x03\x00")).ctstate == CtState.INVALID


def test_an_answer_makes_udp_two_sided_and_time_makes_it_a_stream() -> None:
    """RFC 4787 REQ-5: 120 s, after two seconds of exchange."""
    tracker = Tracker(STRICT)
    assert feed(tracker, udp(A4, B4), 0.0).ctstate == CtState.NEW
    entry = tracker.find(FlowTuple(A4, B4, 17, 4000, 53))
    assert entry is not None
    assert feed(tracker, udp(B4, A4, 53, 4000), 0.1).ctstate == CtState.REPLY
    assert feed(tracker, udp(A4, B4), 0.2).ctstate == CtState.ESTABLISHED
    assert (entry.assured, entry.expires_at) == (False, 30.2)
    feed(tracker, udp(A4, B4), 3.0)
    assert (entry.assured, entry.expires_at) == (True, 123.0)
    assert entry.packets == (3, 1)
    assert entry.bytes == (84, 28)


def test_three_first_packets_at_once_are_one_flow() -> None:
    """A burst is tracked before the first verdict; none of it may be lost or doubled."""
    tracker = Tracker(STRICT)
    burst = [tracker.track(udp(A4, B4), NOW) for _ in range(3)]
    assert {tracked.entry for tracked in burst} == {None}
    entries = {tracker.confirm(tracked, NOW) for tracked in burst}
    assert len(entries) == 1
    assert len(tracker) == 1
    assert next(iter(tracker.entries())).packets == (3, 0)


def test_crossing_first_packets_are_one_flow() -> None:
    """Both sides send at once: who is confirmed first is ORIGINAL."""
    tracker = Tracker(STRICT)
    there, back = tracker.track(udp(A4, B4), NOW), tracker.track(udp(B4, A4, 53, 4000), NOW)
    first, second = tracker.confirm(there, NOW), tracker.confirm(back, NOW)
    assert first is second
    assert first is not None
    assert first.seen_reply


@pytest.mark.parametrize(("writes", "state"), [(False, "SYN_RECV"), (True, "SYN_SENT")])
def test_a_forged_answer_spoils_a_handshake_only_where_it_does_in_linux(writes, state) -> None:
    """INVALID leaves numbers behind in nf_conntrack, before which the true answer looks old."""
    tracker = Tracker(dataclasses.replace(LINUX, invalid_writes=writes))
    feed(tracker, tcp(A4, B4, 4000, 80, "S 1000 0"))
    forged = feed(tracker, tcp(B4, A4, 80, 4000, "SA 2147483648 9999999"))
    assert forged.ctstate == CtState.INVALID
    feed(tracker, tcp(B4, A4, 80, 4000, "SA 5000 1001"))
    (entry,) = tracker.entries()
    assert entry.state_name == state


def test_a_removed_flow_is_a_stranger() -> None:
    """What policy revokes does not come back by itself."""
    tracker = Tracker(STRICT)
    establish(tracker)
    (entry,) = tracker.entries()
    waiting = tracker.track(tcp(A4, B4, 4000, 80, "A 1001 5001"), NOW)
    tracker.remove(entry)
    tracker.remove(entry)
    assert len(tracker) == 0
    assert tracker.confirm(waiting, NOW) is None
    again = tracker.track(tcp(A4, B4, 4000, 80, "A 1001 5001"), NOW)
    assert again.ctstate == CtState.INVALID


def test_the_callers_slots_are_never_touched() -> None:
    """decision, revision and offloaded belong to the datapath."""
    tracker = Tracker(STRICT)
    establish(tracker)
    (entry,) = tracker.entries()
    entry.decision, entry.revision = "accepted", 7
    feed(tracker, tcp(A4, B4, 4000, 80, "FA 1001 5001"))
    assert (entry.decision, entry.revision, entry.offloaded) == ("accepted", 7, False)
    assert entry.tcp_state is TcpState.FIN_WAIT


def test_a_reused_port_is_a_new_flow_with_a_new_decision() -> None:
    """TIME_WAIT: the old entry stays until the new SYN is accepted."""
    tracker = Tracker(STRICT)
    establish(tracker)
    (old,) = tracker.entries()
    feed(tracker, tcp(A4, B4, 4000, 80, "FA 1001 5001"))
    feed(tracker, tcp(B4, A4, 80, 4000, "FA 5001 1002"))
    feed(tracker, tcp(A4, B4, 4000, 80, "A 1002 5002"))
    asked = tracker.track(tcp(A4, B4, 4000, 80, "S 9000 0"), NOW)
    assert (asked.ctstate, asked.entry, asked.replaces) == (CtState.NEW, None, old)
    assert list(tracker.entries()) == [old]
    new = tracker.confirm(asked, NOW)
    assert new is not old
    assert list(tracker.entries()) == [new]


GENUINE = [(1001, "no data in flight"), (1000, "keepalive")]
FORGED = [(999, "below"), (1002, "never sent"), (0x80000000, "far away")]


@pytest.mark.parametrize(("seq", "why"), GENUINE)
def test_an_error_about_a_sent_segment_is_related(seq: int, why: str) -> None:
    """And it changes nothing, not even the timer."""
    tracker = Tracker(STRICT)
    establish(tracker)
    (entry,) = tracker.entries()
    before = entry.expires_at
    tracked = feed(tracker, error(quote(seq)), NOW + 5)
    assert (tracked.ctstate, tracked.entry) == (CtState.RELATED_REPLY, entry), why
    assert tracked.direction is Direction.REPLY
    assert entry.expires_at == before


@pytest.mark.parametrize(("seq", "why"), FORGED)
def test_an_error_about_a_segment_never_sent_is_invalid(seq: int, why: str) -> None:
    """RFC 5927 4.1; Linux accepts it."""
    for profile, expected in ((STRICT, CtState.INVALID), (LINUX, CtState.RELATED_REPLY)):
        tracker = Tracker(profile)
        establish(tracker)
        assert feed(tracker, error(quote(seq))).ctstate == expected, why


NOT_TO_BE_OBEYED = [
    (error(quote(1001), kind=4, code=0), "source quench"),
    (error(quote(1001), kind=5, code=1), "redirect"),
    (error(quote(1001), kind=3, code=16), "no such"),
    (error(quote(1001), kind=3, code=4, rest=68), "path MTU"),
    (error(quote(1001, 24)), "sequence"),
]


@pytest.mark.parametrize(("packet", "reason"), NOT_TO_BE_OBEYED)
def test_strict_refuses_errors_that_nobody_should_obey(packet: Packet, reason: str) -> None:
    """RFC 6633, 1812 5.2.7.2, 792."""
    tracker = Tracker(STRICT)
    establish(tracker)
    tracked = feed(tracker, packet)
    assert tracked.ctstate == CtState.INVALID
    assert reason in tracked.reason


def test_an_error_that_goes_elsewhere_is_invalid() -> None:
    """Else a flow of A would let anybody reach C."""
    tracker = Tracker(LINUX)
    establish(tracker)
    assert feed(tracker, error(quote(1001), to=C4)).ctstate == CtState.INVALID


@pytest.mark.parametrize(
    ("kind", "hops"),
    [(135, 255), (136, 255), (134, 255), (143, 1), (131, 1), (151, 1), (152, 1), (153, 1)],
)
def test_discovery_is_untracked_on_its_link_only(kind: int, hops: int) -> None:
    """RFC 4861 6.1 and RFC 3810 6.2: another hop limit has crossed a router."""
    body = bytes((kind, 0, 0, 0)) + bytes(20)
    tracker = Tracker(STRICT)
    assert feed(tracker, v6(58, LINK6, GROUP6, body, hops)).ctstate == CtState.UNTRACKED
    assert feed(tracker, v6(58, LINK6, GROUP6, body, 64)).ctstate == CtState.INVALID
    assert len(tracker) == 0


def test_an_echo_flow_is_its_identifier_and_type() -> None:
    """Another identifier or query is another flow; an answer without a query is none."""
    tracker = Tracker(STRICT)
    echo, answer = b"\x08\0\0\0\0\x07\0\1", b"\0\0\0\0\0\x07\0\1"
    assert feed(tracker, v4(1, B4, A4, answer)).ctstate == CtState.INVALID
    assert feed(tracker, v4(1, A4, B4, echo)).ctstate == CtState.NEW
    assert feed(tracker, v4(1, A4, B4, b"\x0d\0\0\0\0\x07\0\1" + bytes(12))).ctstate == CtState.NEW
    assert len(tracker) == 2
    assert feed(tracker, v4(1, B4, A4, answer)).ctstate == CtState.REPLY
    assert feed(tracker, v4(1, B4, A4, b"\0\0\0\0\0\x08\0\1")).ctstate == CtState.INVALID
    entry = tracker.find(FlowTuple(A4, B4, 1, 7, 7), icmp_type=8)
    assert entry is not None
    assert entry.seen_reply


def test_endless_tcp_options_are_read_once() -> None:
    """An option of length 0 stops the walk, and the SYN is still a SYN."""
    options = b"\x03\x00" + bytes(38)
    body = struct.pack("!HHIIBBHHH", 4000, 80, 1, 0, 0xF0, 2, 512, 0, 0) + options
    assert feed(Tracker(STRICT), v4(6, A4, B4, body)).ctstate == CtState.NEW


def test_windows_that_are_packed_come_back_as_they_were() -> None:
    """Every field at its edges; an unknown reply side is left out."""
    edges = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
    for number in edges:
        for scale, flags, fin in ((0, 0, NO_FIN), (14, 63, 0), (7, 8, 0xFFFFFFFF), (14, 1, 5)):
            one = make(number, number, number, number, scale, flags, number, fin)
            assert unpack(pack((one, UNKNOWN))) == (one, UNKNOWN)
            assert unpack(pack((UNKNOWN, one))) == (UNKNOWN, one)
            assert len(pack((one, UNKNOWN))) == 26


def test_packing_changes_no_answer() -> None:
    """Windows are packed between every two segments of a flow, and the flow goes on."""
    tracker = Tracker()
    ends = Ends()

    def said(text: str) -> str:
        step = packet_script._segment(Path("here"), 1, f"{text} -> NEW")
        tracked = tracker.track(parse(ends.build(step)), 1.0)
        for entry in tracker.entries():
            entry.pack()  # between a packet and its verdict, too
        tracker.confirm(tracked, 1.0)
        for entry in tracker.entries():
            entry.pack()
            assert entry.packed is not None
        return tracked.ctstate.name

    assert said("> S 0:0") == "NEW"
    assert said("< S. 0:0 ack 1") == "REPLY"
    assert said("> . 1:1 ack 1") == "ESTABLISHED"
    assert said("> . 1:1 ack 2") == "INVALID"
    assert said("> P. 1:11 ack 1") == "ESTABLISHED"
    assert said("< R 70000:70000") == "INVALID"
    assert said("< R 1:1") == "REPLY"
    assert said("> S 90000:90000") == "NEW"


def test_only_so_many_flows_are_kept_unpacked() -> None:
    """The others take half the memory; whoever speaks again is unpacked again."""
    tracker = Tracker()
    ends = Ends()
    lines = ("> S 0:0 -> NEW", "< S. 0:0 ack 1 -> REPLY")
    steps = [packet_script._segment(Path("here"), 1, line) for line in lines]
    for port in range(1, READY_COUNT + 100):
        ends.client_port = port
        for step in steps:
            tracker.confirm(tracker.track(parse(ends.build(step)), 1.0), 1.0)
    ready = [entry for entry in tracker.entries() if entry.windows is not None]
    assert len(tracker) == READY_COUNT + 99
    assert len(ready) == READY_COUNT
