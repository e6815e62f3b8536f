"""The last flows in bounded memory; a loss is told at its place."""

import pytest
from flow_samples import AT_NS, note, packet

from firewall.flows.flow import Response, parse_time
from firewall.flows.ring import QUEUE_SOURCE, RING_SOURCE, Ring

SECOND_NS = 10**9


def numbered(number):
    """A note whose source port is its number, one second after the one before."""
    return note(packet(source_port=number, time_ns=AT_NS + number * SECOND_NS))


def filled(count, capacity=10):
    ring = Ring(capacity, "lab0")
    for number in range(1, count + 1):
        ring.append(numbered(number), float(number))
    return ring


def ports(items):
    return [
        f"lost {item.lost_events.num_events_lost}"
        if isinstance(item, Response)
        else item.l4.tcp.source_port
        for item in items
    ]


def odd(one):
    return one.l4.tcp.source_port % 2 == 1


def test_the_ring_keeps_the_newest():
    ring = filled(13)
    assert ports(ring.select()) == list(range(4, 14))
    assert (ring.oldest, ring.newest) == (3, 13)


def test_last_and_first_count_matching_flows():
    ring = filled(10)
    assert ports(ring.select(last=3)) == [8, 9, 10]
    assert ports(ring.select(odd, last=3)) == [5, 7, 9]
    assert ports(ring.select(odd, first=2)) == [1, 3]
    assert ports(ring.select(last=0)) == []
    assert ports(ring.select(first=99)) == list(range(1, 11))


def test_since_and_until_include_their_moment():
    ring = filled(10)
    since, until = AT_NS + 3 * SECOND_NS, AT_NS + 6 * SECOND_NS
    assert ports(ring.select(since_ns=since, until_ns=until)) == [3, 4, 5, 6]
    assert ports(ring.select(since_ns=since, last=2)) == [9, 10]
    assert ports(ring.select(until_ns=until, last=2)) == [5, 6]


def test_flows_are_listed_by_their_time_not_by_their_arrival():
    """A request's record may arrive before that of the packet that began its connection."""
    ring = Ring(10, "lab0")
    for number in (2, 4, 1, 3):
        ring.append(numbered(number), 1.0)
    assert ports(ring.select()) == [1, 2, 3, 4]
    assert ports(ring.select(last=1)) == [4]
    assert ports(ring.select(last=3)) == [2, 3, 4]
    assert ports(ring.select(first=1)) == [1]
    assert ports(ring.select(first=3)) == [1, 2, 3]


def test_first_and_last_exclude_each_other():
    with pytest.raises(ValueError, match="exclude each other"):
        Ring().select(first=1, last=1)
    with pytest.raises(ValueError, match="not negative"):
        Ring().select(last=-1)
    with pytest.raises(ValueError, match="at least one"):
        Ring(0)


def test_a_reader_gets_what_comes_after_it():
    ring = filled(3)
    reader = ring.reader()
    assert reader.take() == []
    ring.append(numbered(4), 4.0)
    ring.append(numbered(5), 5.0)
    assert reader.behind_count == 2
    assert ports(reader.take()) == [4, 5]
    assert reader.take() == []


def test_a_reader_can_begin_at_the_oldest():
    """--last 2 --follow: what was there, then what comes, with nothing twice or missing."""
    ring = filled(12)
    reader = ring.reader(odd, at=ring.oldest)
    assert ports(reader.take()) == [3, 5, 7, 9, 11]


def test_a_reader_takes_bounded_portions():
    ring = filled(10)
    reader = ring.reader(at=ring.oldest)
    assert [ports(reader.take(4)) for _ in range(4)] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10], []]


def test_a_slow_reader_is_told_how_many_it_missed():
    """Loss is shown in the stream, not hidden."""
    ring = filled(2)
    reader = ring.reader(at=0)
    assert ports(reader.take()) == [1, 2]
    for number in range(3, 20):
        ring.append(numbered(number), float(number))
    items = reader.take(2)
    assert ports(items) == ["lost 7", 10, 11]
    events = items[0].lost_events
    assert events.source == RING_SOURCE
    assert parse_time(events.first) == AT_NS + 2 * SECOND_NS
    assert parse_time(events.last) == AT_NS + 10 * SECOND_NS
    assert items[0].node_name == "lab0"
    assert ports(reader.take()) == list(range(12, 20))


def test_readers_do_not_disturb_each_other():
    ring = filled(5)
    one, two = ring.reader(at=0), ring.reader(odd, at=0)
    assert ports(one.take()) == [1, 2, 3, 4, 5]
    assert ports(two.take()) == [1, 3, 5]


def test_what_a_worker_could_not_deliver_stands_in_the_stream_too():
    ring = filled(2)
    ring.append_lost(4, AT_NS + 2 * SECOND_NS)
    ring.append_lost(0, AT_NS)
    ring.append(numbered(3), 3.0)
    assert ports(ring.select(odd)) == [1, "lost 4", 3]
    assert ports(ring.select(last=1)) == [3]
    assert ports(ring.select(last=2)) == [2, "lost 4", 3]
    assert ring.select()[2].lost_events.source == QUEUE_SOURCE
    assert ring.status(3.0).lost_count == 4


def test_status_counts_what_was_seen_and_what_is_kept():
    status = filled(25).status(25.0)
    assert (status.seen_count, status.max_count, status.current_count) == (25, 10, 10)


def test_the_rate_is_of_the_last_minute():
    ring = Ring(4)
    for number in range(120):
        ring.append(numbered(number), number * 0.5)
    assert ring.status(59.9).per_second == 2.0
    assert ring.status(89.9).per_second == pytest.approx(1.0, abs=0.05)
    assert ring.status(500.0).per_second == 0.0
