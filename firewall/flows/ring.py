"""The last flows, in bounded memory, for any number of readers that lose nothing silently.

Every flow gets the next sequence number; the ring keeps the newest `capacity`. A reader remembers
the number it wants next. If the ring has moved past it, the reader is told how many it missed
(`Response.lost_events`), at the place in the stream where they are missing. What a worker could not
even deliver is recorded the same way, as an item of its own.

The ring holds notes; readers and filters see the records that are made of them.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from firewall.flows.flow import Flow, Response, lost
from firewall.flows.note import Note

RATE_WINDOW_S = 60
"""Flows per second are averaged over the last minute, as Hubble's status does."""

RING_SOURCE = "HUBBLE_RING_BUFFER"
"""flow.proto LostEventSource: a reader was slower than the flows."""

QUEUE_SOURCE = "OBSERVER_EVENTS_QUEUE"
"""flow.proto LostEventSource: a worker could not deliver its events."""

Item = Flow | Response


class Status(NamedTuple):
    """What `status` shows; `lost_count` is what workers could not deliver."""

    seen_count: int
    max_count: int
    current_count: int
    per_second: float
    lost_count: int


class _Slot(NamedTuple):
    time_ns: int
    held: Note | Response

    @property
    def item(self) -> Item:
        """What a reader gets."""
        return self.held.flow if isinstance(self.held, Note) else self.held


_SLOT_TIME = attrgetter("time_ns")


class Ring:
    """Keeps the newest flows.

    Args:
        capacity: how many; at least 1.
        node_name: stands in records of losses.
    """

    def __init__(self, capacity: int = 4095, node_name: str = "") -> None:
        if capacity < 1:
            raise ValueError(f"a ring holds at least one flow, not {capacity}")
        self.capacity = capacity
        self.node_name = node_name
        self._slots: deque[_Slot] = deque(maxlen=capacity)
        self._next = 0
        self._seen_count = 0
        self._lost_count = 0
        self._seconds: deque[tuple[int, int]] = deque()

    @property
    def oldest(self) -> int:
        """The sequence number of the oldest item that is still there."""
        return self._next - len(self._slots)

    @property
    def newest(self) -> int:
        """The sequence number that the next item will get."""
        return self._next

    def append(self, note: Note, now: float) -> None:
        """Add a flow.

        Args:
            note: its event.
            now: monotonic seconds, for the rate.
        """
        self._put(note.event.time_ns, note)
        self._seen_count += 1
        second = int(now)
        if self._seconds and self._seconds[-1][0] >= second:
            last, count = self._seconds[-1]
            self._seconds[-1] = (last, count + 1)
        else:
            self._seconds.append((second, 1))
            self._forget(now)

    def append_lost(self, count: int, time_ns: int, source: str = QUEUE_SOURCE) -> None:
        """Record flows that never arrived.

        Args:
            count: how many; 0 is ignored.
            time_ns: wall clock of the report.
            source: where they were lost.
        """
        if count > 0:
            self._lost_count += count
            response = lost(
                source, count, first_ns=time_ns, last_ns=time_ns, node_name=self.node_name
            )
            self._put(time_ns, response)

    def _put(self, time_ns: int, held: Note | Response) -> None:
        self._slots.append(_Slot(time_ns, held))
        self._next += 1

    def _forget(self, now: float) -> None:
        while self._seconds and self._seconds[0][0] <= now - RATE_WINDOW_S:
            self._seconds.popleft()

    def status(self, now: float) -> Status:
        """Count; `now` is monotonic seconds."""
        self._forget(now)
        recent = sum(count for _, count in self._seconds)
        return Status(
            seen_count=self._seen_count,
            max_count=self.capacity,
            current_count=len(self._slots),
            per_second=recent / RATE_WINDOW_S,
            lost_count=self._lost_count,
        )

    def notes(self) -> list[Note]:
        """Return the flows as they were noted, in the order of their arrival."""
        return [slot.held for slot in self._slots if isinstance(slot.held, Note)]

    def from_sequence(self, start: int, limit: int) -> list[tuple[int, Item]]:
        """Return up to `limit` (wall-clock ns, item) from sequence number `start` on."""
        first = max(start - self.oldest, 0)
        return [(slot.time_ns, slot.item) for slot in islice(self._slots, first, first + limit)]

    def select(
        self,
        matches: Callable[[Flow], bool] | None = None,
        *,
        first: int | None = None,
        last: int | None = None,
        since_ns: int | None = None,
        until_ns: int | None = None,
    ) -> list[Item]:
        """Return what the ring holds now, oldest first.

        Flows arrive in batches from several workers, so the order of arrival is not that of time.

        Args:
            matches: a filter; records of losses always pass it.
            first: only the oldest so many matching flows.
            last: only the newest so many; not together with `first`.
            since_ns: nothing older (wall clock).
            until_ns: nothing newer (wall clock).

        Raises:
            ValueError: `first` and `last` together, or one of them negative.
        """
        if first is not None and last is not None:
            raise ValueError("first and last exclude each other")
        if (first or 0) < 0 or (last or 0) < 0:
            raise ValueError("first and last count flows: they are not negative")
        limit = first if last is None else last
        found: list[_Slot] = []
        flow_count = 0
        slots = sorted(self._slots, key=_SLOT_TIME)
        for slot in slots if last is None else reversed(slots):
            time_ns, held = slot
            if limit is not None and flow_count >= limit:
                break
            if since_ns is not None and time_ns < since_ns:
                continue
            if until_ns is not None and time_ns > until_ns:
                continue
            if isinstance(held, Note):
                if matches is not None and not matches(held.flow):
                    continue
                flow_count += 1
            found.append(slot)
        if last is not None:
            found.reverse()
        return [slot.item for slot in found]

    def reader(
        self, matches: Callable[[Flow], bool] | None = None, *, at: int | None = None
    ) -> "Reader":
        """Return a reader of everything from now on, or from sequence number `at`."""
        return Reader(self, matches, self._next if at is None else at)


class Reader:
    """Follows a ring at its own speed."""

    __slots__ = ("_last_ns", "_matches", "_next", "_ring")

    def __init__(self, ring: Ring, matches: Callable[[Flow], bool] | None, at: int) -> None:
        self._ring = ring
        self._matches = matches
        self._next = at
        self._last_ns = 0

    def take(self, limit: int = 1000) -> list[Item]:
        """Return what has come since the last call, oldest first; [] if nothing has.

        Flows that were overwritten before this reader came are counted in a loss record in front.

        Args:
            limit: look at no more than so many items in one call; at least 1.
        """
        return list(self._take(limit))

    @property
    def behind_count(self) -> int:
        """How many items wait for this reader, lost ones included."""
        return self._ring.newest - self._next

    def _take(self, limit: int) -> Iterator[Item]:
        ring = self._ring
        missed = ring.oldest - self._next
        self._next = max(self._next, ring.oldest)
        coming = ring.from_sequence(self._next, limit)
        if missed > 0:
            resumed_ns = coming[0][0]
            yield lost(
                RING_SOURCE,
                missed,
                first_ns=self._last_ns or resumed_ns,
                last_ns=resumed_ns,
                node_name=ring.node_name,
            )
        for time_ns, item in coming:
            self._next += 1
            self._last_ns = time_ns
            if not isinstance(item, Flow) or self._matches is None or self._matches(item):
                yield item
