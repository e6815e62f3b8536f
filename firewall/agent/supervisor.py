"""Keeps the workers alive, and takes over those that a dead agent left running.

Theory of operation. A worker must outlive the agent, so it gets a session of its own and is found
again by its socket, not by parenthood: at start the supervisor first tries the socket. Who listens
there is adopted if it is the same program with the same arguments and version, else it is drained
and replaced. A process is held by a pidfd from before it is looked at until after its last signal,
so no signal ever reaches a stranger who inherited the number.

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
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping
from enum import IntEnum
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import firewall
from firewall.control.channel import (
    CONNECT_INTERVAL_S,
    AgentChannel,
    ChannelClosedError,
    ChannelError,
    listener_pid,
)
from firewall.control.inheritance import VARIABLE, close_all, described
from firewall.control.journal import fields
from firewall.control.messages import FromWorker, Hello

START_TIMEOUT_S = 20.0
"""A worker that does not listen by then is taken for stuck: imports take about 0.3 s."""

DRAIN_S = 3.0
"""What a worker gets to finish what it began."""

HANDOVER_S = 600.0
"""What a worker gets that hands over to another. Envoy --drain-time-s 600."""

RETIRE_S = 5.0
"""Time for a worker that hands over to stop accepting and to leave its control socket's path."""

KILL_AFTER_S = 3.0
"""Further time between SIGTERM and SIGKILL for one that does not end."""

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

VERSION = version("bartizan")
"""The version of this program, and the one that its workers must have."""

log = logging.getLogger(__name__)


class WorkerState(IntEnum):
    """Where a worker stands."""

    STARTING = 0
    RUNNING = 1
    DRAINING = 2
    WAITING = 3
    STOPPED = 4
    LEAVING = 5
    """Another process accepts in its place; it serves what it had accepted."""


class WorkerSpec(NamedTuple):
    """What a worker is: its kind and number, its command after the interpreter, its socket.

    `listen` makes the sockets on which it accepts, given those that it had; None: it has none. It
    raises OSError.
    """

    kind: str
    number: int
    arguments: tuple[str, ...]
    socket_path: Path
    listen: Callable[[Mapping[str, socket.socket]], dict[str, socket.socket]] | None = None

    @property
    def name(self) -> str:
        """The name in messages: "datapath-0"."""
        return f"{self.kind}-{self.number}"


class Worker:
    """One worker as the agent sees it.

    Attributes:
        revision: last snapshot revision that it acknowledged.
        error: why it kept an older one, or why it does not run; "" = nothing is wrong.
        restarts_count: how often it had to be started again.
        vain_count: lives in a row that ended before it had greeted.
        sockets: our copies of the sockets on which it accepts.
        renewal: set when it shall hand over to a process with the arguments that `spec` has now.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.state = WorkerState.STARTING
        self.pid = 0
        self.version = ""
        self.revision = 0
        self.error = ""
        self.restarts_count = 0
        self.vain_count = 0
        self.adopted = False
        self.channel = AgentChannel(spec.socket_path)
        self.sockets: dict[str, socket.socket] = {}
        self.renewal = asyncio.Event()


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
            close_all(worker.sockets)
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
            close_all(worker.sockets)

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
            with contextlib.suppress(ProcessLookupError), _held(worker.pid) as process:
                await _drain(worker.channel, process, deadline_s)
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
            child = _spawn(worker.spec, worker.sockets)
            pid = child.pid
        worker.pid = pid
        try:
            with _held(pid) as process:
                if await self._converse(worker, process):
                    await self._hand_over(worker, child)
                    return True
        finally:
            if child is not None:
                code = child.poll()
                worker.error = f"ended with {_ending(code)}" if code is not None else worker.error
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
            with _held(old.pid) as process:
                ended = asyncio.create_task(_exited(process))
                talking = asyncio.create_task(self._listen_to(old))
                try:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(asyncio.shield(ended), HANDOVER_S + KILL_AFTER_S)
                    if not ended.done():
                        await _terminate(process)
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
        with contextlib.suppress(ProcessLookupError), _held(pid) as process:
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
                await _drain(worker.channel, process, DRAIN_S)
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
        ended = asyncio.create_task(_exited(process))
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
            await _terminate(process)
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
        await _terminate(process)

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


async def end_orphans(run_dir: Path, keep: Iterable[Path] = ()) -> list[int]:
    """End the workers of `run_dir` that listen at none of the sockets in `keep`.

    Their socket files go with them; files of dead ones are removed. Processes that are no workers
    of ours are left alone.

    Returns:
        The pids that were ended.
    """
    surplus = sorted(set(worker_sockets(run_dir)) - set(keep))
    ended = await asyncio.gather(*(_end_orphan(path, run_dir) for path in surplus))
    return [pid for pid in ended if pid]


async def _end_orphan(path: Path, run_dir: Path) -> int:
    """End the worker that listens at `path`; return its pid, 0 = there was none of ours."""
    try:
        pid = listener_pid(path)
    except ChannelError as error:
        log.warning("socket left alone", extra=fields(path=path, error=error))
        return 0
    if pid:
        with contextlib.suppress(ProcessLookupError), _held(pid) as process:
            if not is_worker(command_of(pid), run_dir):
                log.warning("process left alone: no worker of ours", extra=fields(pid=pid))
                return 0
            channel = AgentChannel(path)
            with contextlib.suppress(ChannelError, TimeoutError):
                await channel.connect(1.0)
            await _drain(channel, process, DRAIN_S)
            _reap(process)
    _remove(path)
    return pid


def _reap(process: int) -> None:
    """Take leave of a child that an earlier agent had in this very process (SIGUSR2)."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, process, os.WEXITED | os.WNOHANG)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def worker_sockets(run_dir: Path) -> list[Path]:
    """Return the socket files of workers in a run directory."""
    return [*run_dir.glob("datapath-*.sock"), *run_dir.glob("l7proxy-*.sock")]


def command_of(pid: int) -> tuple[str, ...]:
    """Return a process's arguments after the interpreter, () if it is gone."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(os.fsdecode(part) for part in raw.rstrip(b"\0").split(b"\0")[1:])


def is_worker(command: tuple[str, ...], run_dir: Path) -> bool:
    """Say whether a command line is that of a worker of this run directory."""
    modules = {"firewall.datapath.worker", "l7proxy.worker"}
    pairs = set(itertools.pairwise(command))
    return any(("-m", module) in pairs for module in modules) and (
        ("--run-dir", str(run_dir)) in pairs
    )


def _spawn(spec: WorkerSpec, sockets: Mapping[str, socket.socket]) -> subprocess.Popen[bytes]:
    """Start a worker in a session of its own, so that it survives us and our terminal."""
    root = str(Path(firewall.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    child = subprocess.Popen(
        (sys.executable, *spec.arguments),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path, VARIABLE: described(sockets)},
        pass_fds=[sock.fileno() for sock in sockets.values()],
    )
    log.info("worker started", extra=fields(worker=spec.name, pid=child.pid))
    return child


class _held:  # noqa: N801  reads as a statement
    """Hold a process by a pidfd (pidfd_open(2)); ProcessLookupError if it is gone already."""

    def __init__(self, pid: int) -> None:
        self._pidfd = os.pidfd_open(pid)

    def __enter__(self) -> int:
        return self._pidfd

    def __exit__(self, *_: object) -> None:
        os.close(self._pidfd)


async def _exited(process: int) -> None:
    """Wait until a held process has ended."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    watched = os.dup(process)  # epoll knows a descriptor once; two may wait for one process
    loop.add_reader(watched, _settle, done)
    try:
        await done
    finally:
        loop.remove_reader(watched)
        os.close(watched)


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


async def _drain(channel: AgentChannel, process: int, deadline_s: float) -> None:
    """Ask a worker to finish; insist if it does not."""
    with contextlib.suppress(ChannelError):
        await channel.drain(deadline_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_exited(process), deadline_s + 1)
    await _terminate(process)
    channel.close()


async def _terminate(process: int) -> None:
    """End a held process: SIGTERM, and SIGKILL if it does not listen."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            signal.pidfd_send_signal(process, number)
        except ProcessLookupError:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_exited(process), KILL_AFTER_S)
            return


def _ending(code: int) -> str:
    """Name how a child ended."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
