"""Keeps the workers alive, and takes over those that a dead agent left running.

Theory of operation. A worker must outlive the agent, so it gets a session of its own and is found
again by its socket, not by parenthood: at start the supervisor first tries the socket. Who listens
there is adopted if it is the same program with the same arguments and version, else it is drained
and replaced. Nobody is looked at or ended who is not held (`process`).

Sockets on which a worker accepts connections are made once, here, and given to each process that
serves as this worker, so that nobody is refused while one follows the other. A worker that is
replaced hands over: it stops accepting and leaves its control socket's path, the next one starts at
once, and the old one ends when it has finished what it began. A new agent borrows the sockets from
the workers that it finds.

A worker that dies is started again at once, then with growing pauses. Meanwhile its queue has no
listener and the kernel drops what would go there: fail closed.
"""

import asyncio
import contextlib
import logging
import subprocess
import time
from collections.abc import Awaitable, Callable, Container, Iterable

from firewall.agent.process import KILL_AFTER_S, command_of, ending, exited, held, terminate
from firewall.agent.worker import DRAIN_S, Worker, WorkerSpec, WorkerState, drain, is_worker, spawn
from firewall.control.agent_channel import CONNECT_INTERVAL_S, AgentChannel
from firewall.control.inheritance import close_all
from firewall.control.journal import fields
from firewall.control.messages import FromWorker, Hello
from firewall.control.unix import ChannelClosedError, ChannelError, listener_pid

START_TIMEOUT_S = 20.0
"""A worker that does not listen by then is taken for stuck: imports take about 0.3 s."""

HANDOVER_S = 600.0
"""What a worker gets that hands over to another. Envoy --drain-time-s 600."""

RETIRE_S = 5.0
"""Time for a worker that hands over to stop accepting and to leave its control socket's path."""

BACKOFF_FIRST_S = 0.1
"""Pause before the second start in a row; doubled for every further one."""

BACKOFF_MAX_S = 5.0
"""Longest pause between two starts: a cause that was mended is noticed within it."""

HEARTBEAT_S = 5.0
"""Pause between two questions after a worker's health, and the time it has to answer."""

MISSED_BEATS = 3
"""A worker that leaves so many unanswered in a row hangs, and is replaced."""

VAIN_COUNT = 4
"""Starts in a row that came to nothing: the cause will not go by itself. With the pauses between
them they take 2-3 s."""

STEADY_S = 10.0
"""A worker that lived this long begins with the first pause again."""

log = logging.getLogger(__name__)


class Supervisor:
    """Runs the workers of `specs`.

    Args:
        specs: what shall run.
        version: the version that every worker must have.
        received: awaited with each message of a worker, its greeting included; while it works, the
            worker's further messages wait.
        left: awaited when a worker that had handed over is none of `workers` any more.
        outdated: processes that are not to be adopted, whatever they are.
    """

    def __init__(
        self,
        specs: Iterable[WorkerSpec],
        version: str,
        received: Callable[[Worker, FromWorker], Awaitable[None]],
        left: Callable[[], Awaitable[None]],
        outdated: Container[int] = (),
    ) -> None:
        self.workers = [Worker(spec) for spec in specs]
        self._version = version
        self._received = received
        self._left = left
        self._outdated = outdated
        self._tasks: list[asyncio.Task[None]] = []
        self._ending: set[Worker] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()

    def start(self) -> None:
        """Begin to adopt or start every worker."""
        self._tasks = [
            asyncio.create_task(self._keep(worker), name=worker.spec.name)
            for worker in self.workers
        ]

    async def stop(self, deadline_s: float, kind: str | None = None) -> None:
        """Drain and end every worker, or every one of a kind."""
        chosen = [worker for worker in self.workers if kind in (None, worker.spec.kind)]
        self._ending.update(chosen)
        for worker in chosen:  # what would wait to be accepted is refused now
            close_all(worker.sockets.values())
            worker.sockets = {}
        await asyncio.gather(*(self._end(worker, deadline_s) for worker in chosen))

    async def in_vain(self, kind: str) -> list[Worker]:
        """Wait until workers of a kind were started VAIN_COUNT times in vain; return those."""
        while True:
            self._ended.clear()
            found = [w for w in self.workers if w.spec.kind == kind and w.vain_count >= VAIN_COUNT]
            if found:
                return found
            await self._ended.wait()

    async def release(self) -> None:
        """Let go of the workers; those that run go on running."""
        self._ending.update(self.workers)
        tasks = [*self._tasks, *self._leaving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in self.workers:
            worker.channel.close()
            close_all(worker.sockets.values())

    def renew(self, spec: WorkerSpec) -> None:
        """Have the worker of this kind and number hand over to one with these arguments."""
        for worker in self.workers:
            if worker.spec[:2] == spec[:2] and worker.spec.arguments != spec.arguments:
                worker.spec = spec
                worker.renewal.set()

    async def _end(self, worker: Worker, deadline_s: float) -> None:
        """Drain one worker and see that it ends."""
        worker.state = WorkerState.DRAINING
        if worker.pid:
            with contextlib.suppress(ProcessLookupError), held(worker.pid) as process:
                await drain(worker.channel, process, deadline_s)
        worker.state = WorkerState.STOPPED

    async def _keep(self, worker: Worker) -> None:
        """Adopt or start one worker, again and again."""
        pause_s = 0.0
        while worker not in self._ending:
            began = time.monotonic()
            try:
                if await self._attend(worker):
                    continue
            except (ChannelError, OSError, TimeoutError) as error:
                worker.error = str(error) or type(error).__name__
                log.warning(
                    "worker failed", extra=fields(worker=worker.spec.name, error=worker.error)
                )
            except Exception as error:
                worker.error = f"supervision failed: {error!r}"
                log.exception("supervision failed", extra=fields(worker=worker.spec.name))
            if worker in self._ending:
                return
            worker.pid = 0
            worker.state = WorkerState.WAITING
            worker.restarts_count += 1
            worker.vain_count += 1
            self._ended.set()
            if time.monotonic() - began > STEADY_S:
                pause_s = 0.0
            await asyncio.sleep(pause_s)
            pause_s = min(max(2 * pause_s, BACKOFF_FIRST_S), BACKOFF_MAX_S)

    async def _attend(self, worker: Worker) -> bool:
        """Serve one life of a worker: its process has ended, or (True) has handed over."""
        worker.state = WorkerState.STARTING
        worker.renewal.clear()
        child: subprocess.Popen[bytes] | None = None
        pid = await self._adoptable(worker)
        worker.adopted = bool(pid)
        if not pid:
            if worker.spec.listen is not None:
                worker.sockets = worker.spec.listen(worker.sockets)
            child = spawn(worker.spec, worker.sockets)
            pid = child.pid
        worker.pid = pid
        try:
            with held(pid) as process:
                if await self._converse(worker, process):
                    await self._hand_over(worker, child)
                    return True
        finally:
            if child is not None:
                code = child.poll()
                worker.error = f"ended with {ending(code)}" if code is not None else worker.error
        if worker not in self._ending:
            log.error(
                "worker ended", extra=fields(worker=worker.spec.name, pid=pid, error=worker.error)
            )
        return False

    async def _hand_over(
        self, worker: Worker, child: subprocess.Popen[bytes] | None = None
    ) -> None:
        """Have the process of a worker accept nothing more, and leave it to end in its own time.

        Until then it is one of `workers`: policy reaches what it serves.
        """
        old = Worker(worker.spec)
        old.state, old.pid, old.version = WorkerState.LEAVING, worker.pid, worker.version
        old.revision = worker.revision
        old.channel, worker.channel = worker.channel, AgentChannel(worker.spec.socket_path)
        self.workers.append(old)
        task = asyncio.create_task(self._see_off(old, child), name=f"{old.spec.name} leaving")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        with contextlib.suppress(ChannelError):
            await old.channel.drain(HANDOVER_S)
        for _ in range(int(RETIRE_S / CONNECT_INTERVAL_S)):
            if not worker.spec.socket_path.exists():
                break
            await asyncio.sleep(CONNECT_INTERVAL_S)
        log.info("worker hands over", extra=fields(worker=worker.spec.name, pid=old.pid))

    async def _see_off(self, old: Worker, child: subprocess.Popen[bytes] | None) -> None:
        """Listen to a process that has handed over until it ends."""
        try:
            with held(old.pid) as process:
                ended = asyncio.create_task(exited(process))
                talking = asyncio.create_task(self._listen_to(old))
                try:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(asyncio.shield(ended), HANDOVER_S + KILL_AFTER_S)
                    if not ended.done():
                        await terminate(process)
                finally:
                    ended.cancel()
                    talking.cancel()
        except ProcessLookupError:
            pass
        finally:
            self.workers.remove(old)
            old.channel.close()
            if child is not None:
                child.poll()
            await self._left()

    async def _listen_to(self, worker: Worker) -> None:
        async for message in worker.channel:
            await self._received(worker, message)

    async def _adoptable(self, worker: Worker) -> int:
        """Return the pid of a running worker that can go on, after ending one that cannot."""
        path = worker.spec.socket_path
        pid = listener_pid(path)
        if not pid:
            return 0
        with contextlib.suppress(ProcessLookupError), held(pid) as process:
            found = command_of(pid)
            if not is_worker(found, path.parent):
                raise ChannelError(f"{path}: process {pid} listens there and is no worker of ours")
            greeting = await worker.channel.connect(START_TIMEOUT_S)
            fits = found == worker.spec.arguments and greeting.version == self._version
            if fits and pid not in self._outdated:
                log.info("worker adopted", extra=fields(worker=worker.spec.name, pid=pid))
                return pid
            log.info(
                "worker replaced",  # it has other arguments, another version, or is outdated
                extra=fields(worker=worker.spec.name, pid=pid, version=greeting.version),
            )
            if worker.spec.listen is None:
                await drain(worker.channel, process, DRAIN_S)
            else:
                await self._take_over(worker, pid, greeting)
        return 0

    async def _take_over(self, worker: Worker, pid: int, greeting: Hello) -> None:
        """Have a process of an earlier agent hand over to one that we start."""
        worker.pid, worker.version, worker.revision = pid, greeting.version, greeting.revision
        listening = asyncio.create_task(self._listen_to(worker))
        try:
            await self._borrow(worker)
        finally:
            listening.cancel()
        await self._hand_over(worker)

    async def _borrow(self, worker: Worker) -> None:
        """Take copies of the sockets of a process that an earlier agent started."""
        try:
            worker.sockets = await worker.channel.borrow()
        except (ChannelError, TimeoutError) as error:
            log.warning(
                "sockets not taken over", extra=fields(worker=worker.spec.name, error=str(error))
            )

    async def _converse(self, worker: Worker, process: int) -> bool:
        """Pass on what a worker says until its process ends, or (True) shall hand over."""
        ended = asyncio.create_task(exited(process))
        renewing = asyncio.create_task(worker.renewal.wait())
        beating = asyncio.create_task(self._listen_to_heart(worker, process))
        try:
            while not ended.done():
                talking = asyncio.create_task(self._talk(worker))
                await asyncio.wait({ended, talking, renewing}, return_when=asyncio.FIRST_COMPLETED)
                if not talking.done():
                    talking.cancel()
                with contextlib.suppress(asyncio.CancelledError, ChannelClosedError):
                    await talking
                if renewing.done() and worker.channel.connected and not ended.done():
                    return True
        except TimeoutError:
            # It never listened: end it here, or it would stand in its successor's way.
            await terminate(process)
            raise
        finally:
            ended.cancel()
            beating.cancel()
            renewing.cancel()
            if not (renewing.done() and worker.channel.connected):
                worker.channel.close()
        return False

    async def _listen_to_heart(self, worker: Worker, process: int) -> None:
        """End a worker that runs and does not answer; its successor will."""
        missed = 0
        while missed < MISSED_BEATS:
            await asyncio.sleep(HEARTBEAT_S)
            if worker.state is not WorkerState.RUNNING:
                continue
            try:
                await worker.channel.ask("status", HEARTBEAT_S)
                missed = 0
            except TimeoutError:
                missed += 1
            except ChannelClosedError:
                continue
        log.error("worker hangs: replaced", extra=fields(worker=worker.spec.name, pid=worker.pid))
        await terminate(process)

    async def _talk(self, worker: Worker) -> None:
        """Connect and pass messages on until the connection ends."""
        greeting = worker.channel.hello if worker.channel.connected else None
        if greeting is None:
            greeting = await worker.channel.connect(START_TIMEOUT_S)
        worker.version = greeting.version
        worker.revision = greeting.revision
        worker.state = WorkerState.RUNNING
        worker.error = ""
        worker.vain_count = 0
        await self._received(worker, greeting)
        listening = asyncio.create_task(self._listen_to(worker))
        try:
            if worker.spec.listen is not None and not worker.sockets:
                await self._borrow(worker)
            await listening
        finally:
            listening.cancel()
