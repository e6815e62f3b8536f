"""Packets for whoever watches: `bartizan monitor`.

Workers put a packet's bytes into its event only while somebody watches: a watch is a lease of
`WATCH_S` that is renewed as long as a reader is there, so that neither a dead agent nor a reader
that left keeps them busy. A reader that is too slow loses packets and is told how many; so it is
with those that a worker could not deliver. Nobody slows the others or the workers.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Iterable

from firewall.agent.worker import Worker, WorkerState, ask_each
from firewall.control.messages import Watch
from firewall.control.unix import ChannelClosedError
from firewall.flows.captured import Captured, to_line
from firewall.flows.event import PacketEvent
from firewall.flows.filters import Filter
from firewall.flows.flow import Flow
from firewall.flows.note import Note

WATCH_S = 4.0
"""How long a worker goes on if nobody renews the watch."""

RENEW_S = 1.0
"""Pause between two renewals, in which a worker that has just started is not watched yet."""

WAITING_MAX_COUNT = 10_000
"""Packets that may wait for a reader: about 10 MB with their flows."""

LINES_PER_WRITE = 200
"""Packets that are written at once."""


class _Reader:
    """Somebody who watches."""

    def __init__(self, matches: Filter | None, *, drops_only: bool) -> None:
        self.matches = matches
        self.drops_only = drops_only
        self.waiting: deque[Captured] = deque()
        self.lost_count = 0
        self.begun = False
        self.more = asyncio.Event()

    def offer(self, event: PacketEvent, flow: Flow) -> None:
        """Keep a packet for this reader, if it is wanted and there is room."""
        if self.drops_only and flow.verdict != "DROPPED":
            return
        if self.matches is not None and not self.matches(flow):
            return
        if not event.packet or len(self.waiting) >= WAITING_MAX_COUNT:
            self.lost_count += 1
            return
        length = max(event.length, len(event.packet))
        self.waiting.append(Captured(event.time_ns, event.packet, length, flow, self.lost_count))
        self.lost_count = 0
        self.more.set()

    def take(self) -> bytes:
        """Return the next lines."""
        count = min(LINES_PER_WRITE, len(self.waiting))
        lines = [to_line(self.waiting.popleft()) for _ in range(count)]
        if self.lost_count and not self.waiting:
            lines.append(to_line(Captured(lost_count=self.lost_count)))
            self.lost_count = 0
        return b"".join(lines)


class Monitor:
    """Hands packets to everybody who watches.

    Args:
        workers: who sees packets.
    """

    def __init__(self, workers: Iterable[Worker]) -> None:
        self._workers = [worker for worker in workers if worker.spec.kind == "datapath"]
        self._readers: set[_Reader] = set()

    @property
    def reader_count(self) -> int:
        """How many watch, after all workers have been told."""
        return sum(reader.begun for reader in self._readers)

    def saw(self, note: Note) -> None:
        """Take an event."""
        if self._readers and isinstance(note.event, PacketEvent):
            for reader in self._readers:
                reader.offer(note.event, note.flow)

    def lost(self, count: int) -> None:
        """Count events that never came: whose they were, nobody knows."""
        for reader in self._readers:
            reader.lost_count += count

    async def stream(
        self, matches: Filter | None, ending: asyncio.Event, *, drops_only: bool
    ) -> AsyncGenerator[bytes, None]:
        """Yield lines (`Captured`) until `ending`; the first one, empty, when all workers watch."""
        reader = _Reader(matches, drops_only=drops_only)
        self._readers.add(reader)
        renewal = asyncio.create_task(self._renew())
        try:
            await self._watch(WATCH_S)
            await self.answered(WATCH_S)
            reader.begun = True
            yield to_line(Captured())
            while not ending.is_set():
                yield reader.take()
                if not reader.waiting:
                    reader.more.clear()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(reader.more.wait(), RENEW_S)
        finally:
            renewal.cancel()
            self._readers.discard(reader)
            if not self._readers:
                await self._watch(0.0)

    async def answered(self, within_s: float) -> None:
        """Wait until the workers have done what they were told, and told what they decided.

        They answer in order. One that does not answer in time is not waited for.
        """
        running = [worker for worker in self._workers if worker.state is WorkerState.RUNNING]
        await ask_each(running, "events", within_s)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            await self._watch(WATCH_S)

    async def _watch(self, for_s: float) -> None:
        """Tell every worker that runs."""
        for worker in self._workers:
            if worker.state is WorkerState.RUNNING:
                with contextlib.suppress(ChannelClosedError):
                    await worker.channel.send(Watch(for_s))
