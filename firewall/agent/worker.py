"""One worker as the agent sees it: what shall run, what runs, and how it is started and ended."""

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import firewall
from firewall.agent.process import exited, terminate
from firewall.control.agent_channel import AgentChannel
from firewall.control.inheritance import VARIABLE, described
from firewall.control.journal import fields
from firewall.control.unix import ChannelClosedError, ChannelError

DRAIN_S = 3.0
"""What a worker gets to finish what it began."""

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


def spawn(spec: WorkerSpec, sockets: Mapping[str, socket.socket]) -> subprocess.Popen[bytes]:
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


async def ask_each(
    workers: Iterable[Worker], what: str, timeout_s: float
) -> dict[Worker, list[dict[str, object]]]:
    """Ask workers at once (`messages.Ask`); who is gone or does not answer in time is left out."""
    asked = tuple(workers)
    answers = await asyncio.gather(
        *(worker.channel.ask(what, timeout_s) for worker in asked), return_exceptions=True
    )
    found: dict[Worker, list[dict[str, object]]] = {}
    for worker, answer in zip(asked, answers, strict=True):
        if not isinstance(answer, BaseException):
            found[worker] = answer
        elif not isinstance(answer, (ChannelClosedError, TimeoutError)):
            raise answer
    return found


async def drain(channel: AgentChannel, process: int, deadline_s: float) -> None:
    """Ask a worker to finish; insist if it does not."""
    with contextlib.suppress(ChannelError):
        await channel.drain(deadline_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(exited(process), deadline_s + 1)
    await terminate(process)
    channel.close()


def worker_sockets(run_dir: Path) -> list[Path]:
    """Return the socket files of workers in a run directory."""
    return [*run_dir.glob("datapath-*.sock"), *run_dir.glob("l7proxy-*.sock")]


def is_worker(command: tuple[str, ...], run_dir: Path) -> bool:
    """Say whether a command line is that of a worker of this run directory."""
    modules = {"firewall.datapath", "l7proxy.worker"}
    pairs = set(itertools.pairwise(command))
    return any(("-m", module) in pairs for module in modules) and (
        ("--run-dir", str(run_dir)) in pairs
    )
