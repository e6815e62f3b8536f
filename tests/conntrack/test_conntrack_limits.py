"""A full table: who leaves, who stays (shared vectors limits.yaml, goals G11 to G15)."""

import random
import struct

import pytest

from conntrack.flow import FlowTuple
from conntrack.packet import Packet, parse
from conntrack.tcp_states import TcpState
from conntrack.tracker import STRICT, CtState, Tracker

SERVER = bytes((10, 201, 2, 2))
FLOODER = bytes((10, 201, 1, 2))
NOW = 100.0


def segment(
    source: bytes, port: int, flags: int, seq: int, ack: int, *, back: bool = False
) -> Packet:
    ends = SERVER + source if back else source + SERVER
    ports = (80, port) if back else (port, 80)
    body = struct.pack("!HHIIBBHHH", *ports, seq, ack, 0x50, flags, 65535, 0, 0)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, 6, 0)
    return parse(head + ends + body)


def feed(tracker: Tracker, packet: Packet, now: float = NOW) -> str:
    """Class of a packet, or DROP if there was no room for it."""
    tracked = tracker.track(packet, now)
    entry = tracker.confirm(tracked, now)
    if tracked.ctstate == CtState.NEW and entry is None:
        return "DROP"
    return tracked.ctstate.name


def establish(tracker: Tracker, source: bytes, port: int) -> list[str]:
    return [
        feed(tracker, segment(source, port, 0x02, 1000, 0)),
        feed(tracker, segment(source, port, 0x12, 5000, 1001, back=True)),
        feed(tracker, segment(source, port, 0x10, 1001, 5001)),
    ]


def close(tracker: Tracker, source: bytes, port: int) -> None:
    feed(tracker, segment(source, port, 0x11, 1001, 5001))
    feed(tracker, segment(source, port, 0x11, 5001, 1002, back=True))
    feed(tracker, segment(source, port, 0x10, 1002, 5002))


def host(number: int) -> bytes:
    return bytes((10, 9, number >> 8, number & 255))


def test_a_full_table_of_half_open_flows_admits_a_new_one() -> None:
    """limit-unassured-evicted: 1000 SYN more, as many evicted, never over the limit."""
    tracker = Tracker(STRICT, limit_count=64)
    assert {feed(tracker, segment(FLOODER, p, 2, 1, 0)) for p in range(1, 65)} == {"NEW"}
    assert len(tracker) == 64
    for port in range(100, 1100):
        assert feed(tracker, segment(FLOODER, port, 2, 1, 0)) == "NEW"
        assert len(tracker) <= 64
    assert tracker.counters.evicted == 1000


def test_established_flows_survive_a_flood() -> None:
    """limit-assured-never-evicted: the flood is dropped, every flow goes on."""
    tracker = Tracker(STRICT, limit_count=64)
    for number in range(64):
        assert establish(tracker, host(number), 4000)[-1] == "ESTABLISHED"
    assert {feed(tracker, segment(FLOODER, p, 2, 1, 0)) for p in range(1, 1001)} == {"DROP"}
    assert tracker.counters.refused == 1000
    for number in range(64):
        assert feed(tracker, segment(host(number), 4000, 0x10, 1001, 5001)) == "ESTABLISHED"


def test_closed_flows_leave_before_anybody_else() -> None:
    """limit-closing-evicted-under-pressure, and half-open ones stay meanwhile."""
    tracker = Tracker(STRICT, limit_count=64)
    for number in range(62):
        establish(tracker, host(number), 4000)
        close(tracker, host(number), 4000)
    assert {entry.tcp_state for entry in tracker.entries()} == {TcpState.TIME_WAIT}
    assert {feed(tracker, segment(FLOODER, p, 2, 1, 0)) for p in range(1, 65)} == {"NEW"}
    assert len(tracker) == 64
    assert {entry.tcp_state for entry in tracker.entries()} == {TcpState.SYN_SENT}


def test_one_source_has_its_share_and_no_more() -> None:
    """limit-per-source: the flooder evicts himself, another host is not touched."""
    tracker = Tracker(STRICT, limit_count=64, source_limit_count=16)
    for port in range(1, 65):
        feed(tracker, segment(FLOODER, port, 2, 1, 0))
        assert len(tracker) <= 16
    for port in range(1, 9):
        assert feed(tracker, segment(host(1), port, 2, 1, 0)) == "NEW"
    sources = [entry.original.source for entry in tracker.entries()]
    assert sources.count(host(1)) == 8


def test_the_flooder_loses_his_own_entries_first() -> None:
    """Without a share, too: under pressure the source with the most entries gives one."""
    tracker = Tracker(STRICT, limit_count=64)
    for number in range(10):
        feed(tracker, segment(host(number), 4000, 2, 1000, 0))
    for port in range(1, 5000):
        feed(tracker, segment(FLOODER, port, 2, 1, 0))
    for number in range(10):
        assert feed(tracker, segment(host(number), 4000, 0x12, 5000, 1001, back=True)) == "REPLY"


def test_handshakes_succeed_during_a_flood_from_random_sources() -> None:
    """G11: spoofed sources have one entry each, like everybody; the oldest leave."""
    tracker = Tracker(STRICT, limit_count=1000)
    succeeded = 0
    for number in range(200):
        feed(tracker, segment(host(number), 4000, 2, 1000, 0))
        for spoofed in range(50):
            source = bytes((172, 16 + number % 16, number, spoofed))
            feed(tracker, segment(source, spoofed + 1, 2, 1, 0))
        feed(tracker, segment(host(number), 4000, 0x12, 5000, 1001, back=True))
        final = feed(tracker, segment(host(number), 4000, 0x10, 1001, 5001))
        succeeded += final == "ESTABLISHED"
    assert succeeded >= 198
    alive = [entry for entry in tracker.entries() if entry.assured]
    assert len(alive) == succeeded


def test_a_half_open_flow_cannot_be_kept_alive() -> None:
    """G15: no sequence of packets without a handshake outlives SYN_SENT + SYN_RECV."""
    tracker = Tracker(STRICT)
    first = segment(FLOODER, 1, 2, 1000, 0)
    feed(tracker, first, 0.0)
    entry = tracker.track(first, 0.0).entry
    assert entry is not None
    for now in range(1, 200):
        if entry.serial < 0 or now >= entry.expires_at:
            break
        for packet in (
            segment(FLOODER, 1, 0x02, 1000, 0),
            segment(FLOODER, 1, 0x12, 5000, 1001, back=True),
            segment(FLOODER, 1, 0x10, 5001, 1001, back=True),
            segment(FLOODER, 1, 0x18, 5001, 1001, back=True),
        ):
            feed(tracker, packet, float(now))
    timeouts = STRICT.timeouts.tcp
    assert now <= timeouts[TcpState.SYN_SENT] + timeouts[TcpState.SYN_RECV]


@pytest.mark.parametrize("seed", range(3))
def test_no_sequence_of_packets_keeps_a_half_open_flow_alive(seed: int) -> None:
    """G15 for a client and a server who say anything but the last ACK of the handshake."""
    chance = random.Random(seed)
    timeouts = STRICT.timeouts.tcp
    longest_s = timeouts[TcpState.SYN_SENT] + timeouts[TcpState.SYN_RECV] + timeouts[TcpState.CLOSE]
    for _ in range(40):
        tracker, now, isn = Tracker(STRICT), 0.0, chance.choice((1000, 2**32 - 1))
        for _ in range(120):
            now += chance.choice((0.1, 1.0, 3.0))
            back = chance.random() < 0.6
            sequence = (5000 if back else isn) + chance.choice((0, 0, 1, 2, 1000, -1))
            # A client that acknowledges nothing the server has said, or the handshake is complete.
            ack = isn + chance.choice((0, 1, 1, 1, 2)) if back else chance.choice((0, 1, 4000))
            flags = chance.choice((0x02, 0x12, 0x10, 0x18, 0x04, 0x14, 0x11))
            if back and flags == 0x02:
                continue  # it would open a flow of its own
            wrapped = sequence % 2**32, ack % 2**32
            feed(tracker, segment(FLOODER, 1, flags, *wrapped, back=back), now)
            for entry in tracker.entries():
                assert not entry.assured
                assert min(now, entry.expires_at) - entry.created_at <= longest_s


def test_expiry_does_a_bounded_share_of_the_work() -> None:
    """A budget of n looks at n keys; repeated, it finds everything."""
    tracker = Tracker(STRICT)
    for port in range(1, 2001):
        feed(tracker, segment(host(port), port, 2, 1, 0), 0.0)
    assert tracker.expire(1000.0, budget=100) <= 100
    assert len(tracker) >= 1900
    while tracker.expire(1000.0, budget=500):
        pass
    assert len(tracker) == 0
    assert tracker.counters.expired == 2000


def test_a_sweep_says_how_late_it_came() -> None:
    """The longest that something lay dead; 0 where nothing did."""
    tracker = Tracker(STRICT)
    feed(tracker, segment(host(1), 1, 2, 1, 0), 0.0)
    feed(tracker, segment(host(2), 2, 2, 1, 0), 5.0)
    silence_s = STRICT.timeouts.tcp[TcpState.SYN_SENT]
    assert tracker.expire(silence_s + 9.0) == 2
    assert tracker.counters.lag_s == 9.0
    assert tracker.expire(silence_s + 9.0) == 0
    assert tracker.counters.lag_s == 0.0


def test_what_is_dead_does_not_exist_before_it_is_swept() -> None:
    """Lookup checks the time, so the sweep may take as long as it wants."""
    tracker = Tracker(STRICT)
    establish(tracker, host(1), 4000)
    late = NOW + 8000
    assert feed(tracker, segment(host(1), 4000, 0x10, 1001, 5001), late) == "INVALID"
    assert feed(tracker, segment(host(1), 4000, 2, 9000, 0), late) == "NEW"
    assert len(tracker) == 1


def test_an_offloaded_flow_lives_until_its_caller_says_otherwise() -> None:
    """The kernel carries it: silence here means nothing, and numbers are learnt anew."""
    tracker = Tracker(STRICT)
    establish(tracker, host(1), 4000)
    (entry,) = tracker.entries()
    entry.offloaded = True
    late = NOW + 1e6
    while tracker.expire(late):
        pass
    assert len(tracker) == 1
    assert feed(tracker, segment(host(1), 4000, 0x10, 700000000, 800000000), late) == "ESTABLISHED"
    entry.offloaded = False
    assert feed(tracker, segment(host(1), 4000, 0x10, 700000000, 800000000), late) == "ESTABLISHED"
    back = segment(host(1), 4000, 0x10, 800000000, 700000000, back=True)
    assert feed(tracker, back, late) == "REPLY"
    far = segment(host(1), 4000, 0x18, 801000000, 700000000, back=True)
    assert feed(tracker, far, late) == "INVALID"


def test_what_was_sent_while_the_kernel_carried_a_flow_may_be_acknowledged() -> None:
    """Met again at a segment that is repeated; the other side's window bounds what was sent."""
    tracker = Tracker(STRICT)
    establish(tracker, host(1), 4000)
    (entry,) = tracker.entries()
    entry.offloaded = True
    assert feed(tracker, segment(host(1), 4000, 0x10, 20_000, 5001)) == "ESTABLISHED"
    entry.offloaded = False
    beyond = segment(host(1), 4000, 0x10, 5001, 20_000 + 65_536, back=True)
    assert feed(tracker, beyond) == "INVALID"
    within = segment(host(1), 4000, 0x10, 5001, 20_000 + 65_535, back=True)
    assert feed(tracker, within) == "REPLY"
    assert feed(tracker, segment(host(1), 4000, 0x10, 20_000, 5001)) == "ESTABLISHED"


def test_a_restored_flow_goes_on() -> None:
    """G17: flows read from the kernel's table continue without a handshake."""
    tracker = Tracker(STRICT)
    flow = FlowTuple(host(1), SERVER, 6, 4000, 80)
    entry = tracker.restore(flow, NOW, timeout_s=3600, state=TcpState.ESTABLISHED)
    assert entry is not None
    assert tracker.find(flow) is entry
    assert feed(tracker, segment(host(1), 4000, 0x10, 77777, 88888)) == "ESTABLISHED"
    assert feed(tracker, segment(host(1), 4000, 0x10, 88888, 77777, back=True)) == "REPLY"
    assert entry.packets == (1, 1)


@pytest.mark.parametrize("count", [0, -1])
def test_a_limit_of_nothing_is_refused(count: int) -> None:
    """A tracker without room would drop everything silently."""
    with pytest.raises(ValueError, match="at least 1"):
        Tracker(STRICT, limit_count=count)
