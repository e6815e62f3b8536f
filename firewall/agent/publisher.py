"""Writes snapshots, announces them, and knows who enforces which.

The file comes first, durably, then the announcement: a worker that starts in between reads the new
file and says so in its greeting. Revisions only rise, also over restarts: the first one is above
the file's and above what any adopted worker enforces, so an acknowledgement cannot be mistaken for
one of an earlier life.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from firewall.agent.snapshot_writer import SnapshotWriter
from firewall.agent.worker import Worker, WorkerState
from firewall.control.journal import fields
from firewall.control.messages import Acknowledged, Hello
from firewall.control.unix import ChannelClosedError
from firewall.policy.snapshot import Snapshot, SnapshotError
from firewall.policy.snapshot_file import decode

ANNOUNCE_S = 2.0
"""A worker whose socket is full that long does not read; the supervisor will notice."""

log = logging.getLogger(__name__)


class Publisher:
    """The one writer of the snapshot file.

    Attributes:
        snapshot: the last one published, or the one an earlier life left, or an empty one.
        last: what an earlier life left, None = there was none.
        published: whether this life has published one.
        listeners: called with every snapshot that comes into force.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.snapshot = Snapshot()
        self.last: Snapshot | None = None
        self.published = False
        self.listeners: list[Callable[[Snapshot], None]] = []
        self._writer = SnapshotWriter(path)
        self._writing = asyncio.Lock()
        self._folding: asyncio.Task[None] | None = None
        self._moved = asyncio.Condition()

    def restore(self) -> None:
        """Read what an earlier life left.

        A damaged file is kept aside and made anew: everything in it follows from other files. Only
        its generation is lost, and flows that bypass us may carry it; the wall clock gives one
        that they hardly carry.
        """
        try:
            self.snapshot = self.last = decode(self.path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, SnapshotError) as error:
            aside = self.path.with_name(f"{self.path.name}.unusable")
            self.path.rename(aside)
            self.last = Snapshot(generation=int(time.time()))
            log.warning("snapshot is made anew", extra=fields(error=error, kept=aside))

    @property
    def revision(self) -> int:
        """Revision of `snapshot`; the next one must be higher."""
        return self.snapshot.revision

    async def publish(self, snapshot: Snapshot, workers: Iterable[Worker]) -> None:
        """Write a snapshot and tell every worker that is connected.

        Raises:
            OSError: it could not be written; the old one stands and nobody was told.
        """
        async with self._writing:
            await asyncio.to_thread(self._writer.write, snapshot)
        self.snapshot = snapshot
        self.published = True
        for listener in self.listeners:
            listener(snapshot)
        for worker in tuple(workers):  # one that hands over may end meanwhile
            await self._announce(worker)
        if self._writer.wants_folding and (self._folding is None or self._folding.done()):
            self._folding = asyncio.create_task(self._fold())

    async def _fold(self) -> None:
        """Write the file anew while nobody waits; if that fails, it stands as it is."""
        async with self._writing:
            try:
                await asyncio.to_thread(self._writer.fold)
            except OSError as error:
                log.warning("snapshot is not folded", extra=fields(error=error))

    async def greet(self, worker: Worker, hello: Hello) -> None:
        """Bring a worker that has just connected up to date."""
        if self.published and hello.revision != self.revision:
            await self._announce(worker)
        await self.wake()

    async def acknowledge(self, worker: Worker, message: Acknowledged) -> None:
        """Note what a worker enforces, or why it does not."""
        if message.error:
            worker.error = f"refused snapshot {message.revision}: {message.error}"
            log.error(
                "snapshot refused",
                extra=fields(
                    worker=worker.spec.name, revision=message.revision, error=message.error
                ),
            )
        else:
            worker.revision = message.revision
            worker.error = ""
        await self.wake()

    async def enforced(self, revision: int, workers: list[Worker], timeout_s: float) -> bool:
        """Wait until every worker enforces at least `revision`; say whether that happened."""
        if timeout_s <= 0:
            return enforced_by_all(revision, workers)
        try:
            async with asyncio.timeout(timeout_s), self._moved:
                await self._moved.wait_for(lambda: enforced_by_all(revision, workers))
        except TimeoutError:
            return False
        return True

    async def _announce(self, worker: Worker) -> None:
        """Tell one worker; one that goes away meanwhile hears of it in its next life."""
        if not worker.channel.connected:
            return
        with contextlib.suppress(ChannelClosedError, TimeoutError):
            async with asyncio.timeout(ANNOUNCE_S):
                await worker.channel.announce(self.revision, self.path)

    async def wake(self) -> None:
        """Have those look again who wait for a revision to be enforced."""
        async with self._moved:
            self._moved.notify_all()


def enforced_by_all(revision: int, workers: Iterable[Worker]) -> bool:
    """Say whether every worker runs and enforces at least `revision`."""
    return all(
        worker.state in (WorkerState.RUNNING, WorkerState.LEAVING) and worker.revision >= revision
        for worker in workers
    )
