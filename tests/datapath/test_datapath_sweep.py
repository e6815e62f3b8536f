"""Dead flows leave the table soon, and in portions: what the worker's loop does between packets."""

import struct

import pytest

from conntrack.packet import parse
from conntrack.tracker import STRICT, Tracker
from firewall.datapath import sweep
from firewall.datapath.sweep import Sweep

DEAD_AT = 1.0 + STRICT.timeouts.udp


def datagram(number: int) -> bytes:
    head = struct.pack("!BBHHHBBHII", 0x45, 0, 28, 0, 0, 64, 17, 0, 0x0A000000 + number, 0x0B000001)
    return head + struct.pack("!HHHH", 4000, 53, 8, 0)


def tracker_of(count: int) -> Tracker:
    """A tracker with as many unanswered datagrams, all of the same moment."""
    tracker = Tracker(STRICT)
    for number in range(count):
        tracker.confirm(tracker.track(parse(datagram(number)), 1.0), 1.0)
    return tracker


def rounds(one: Sweep, until: float) -> list[float]:
    """Let a loop that is never late run; the times of its rounds."""
    times = []
    while one.due_at <= until:
        times.append(one.due_at)
        one.round(one.due_at)
    return times


def test_what_lives_is_looked_at_without_haste() -> None:
    tracker = tracker_of(5000)
    one = Sweep(tracker, 2.0)
    times = rounds(one, 4.0)
    assert len(times) == pytest.approx(2.0 / sweep.PAUSE_S, abs=2)
    assert len(tracker) == 5000
    assert one.lag_s == 0


def test_many_dead_flows_are_gone_within_seconds() -> None:
    """At the slow pace they would be there for ten times as long."""
    count = 10_000
    tracker = tracker_of(count)
    one = Sweep(tracker, DEAD_AT)
    rounds(one, DEAD_AT + 2.5)
    assert len(tracker) == 0
    assert tracker.counters.expired == count


def test_a_round_removes_a_bounded_part() -> None:
    tracker = tracker_of(5000)
    one = Sweep(tracker, DEAD_AT)
    before = len(tracker)
    one.round(DEAD_AT)
    assert 0 < before - len(tracker) <= 2 * sweep.MANY_COUNT
    assert one.pause_s == sweep.BEHIND_PAUSE_S


def test_when_the_dead_have_left_the_pace_is_slow_again() -> None:
    one = Sweep(tracker_of(1000), DEAD_AT)
    rounds(one, DEAD_AT + 5)
    assert one.pause_s == sweep.PAUSE_S


def test_a_lag_is_shown_for_a_while_and_then_forgotten() -> None:
    one = Sweep(tracker_of(10), DEAD_AT)
    one.round(DEAD_AT + 3)
    one.round(DEAD_AT + 4)
    assert one.lag_s == pytest.approx(3, abs=0.01)
    one.round(DEAD_AT + 3 + sweep.LAG_S)
    assert one.lag_s == 0
