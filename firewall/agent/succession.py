"""How one set of datapath workers follows another while packets wait.

Theory of operation. A queue is read by one process, so the next workers get queues of their own, in
the other of two banks. They are started, bind their queues, load the snapshot and wait. Then one
transaction per family turns the rules to their queues. What is in the queues of the earlier workers
by then is theirs to decide; they are drained and end. Meanwhile new packets wait, and are not lost:
a queue holds `queue_length`. When the last of the earlier workers has ended, the kernel's conntrack
knows every flow that they let pass, those that are being opened included; the next workers take
them over and begin to read.

Flows that the kernel carries are carried all the time: the generation is left as it is.

If the agent dies in between, the next one finds workers in both banks. Those stay that are as they
should be, those with packets first; the others end.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from firewall.agent.config import Config
from firewall.agent.lineup import BANK_SIZE, specs
from firewall.agent.orphans import end_orphans
from firewall.agent.process import command_of
from firewall.agent.publisher import Publisher
from firewall.agent.worker import VERSION, Worker, is_worker, worker_sockets
from firewall.control.agent_channel import AgentChannel
from firewall.control.unix import ChannelError, listener_pid

GREETING_S = 3.0
"""Time for a running worker to say who it is, on a busy machine; one that hangs is replaced."""

START_S = 20.0
"""Time for the next workers to be ready; then they follow, ready or not."""

PAUSE_S = 10.0
"""After this time the next workers read their queues, even if nobody tells them to. The earlier
ones have at most about seven seconds to end."""


class Plan(NamedTuple):
    """What the datapath workers of this run are.

    Attributes:
        bank: which queues they have.
        follows: others run now; they are to end when ours are ready.
        outdated: processes that shall not be adopted.
    """

    bank: int
    follows: bool
    outdated: frozenset[int]


class Running(NamedTuple):
    """A worker that was found: its process, its command line, and its version ("": it hangs)."""

    pid: int
    arguments: tuple[str, ...]
    version: str


async def plan(config: Config, installed_queue: int | None, *, renew: bool) -> Plan:
    """Look at who runs, and say who shall; the arguments are those of `choose`."""
    found = {path: await _running(path, config.run_dir) for path in worker_sockets(config.run_dir)}
    running = {path: one for path, one in found.items() if one is not None}
    return choose(config, running, installed_queue, renew=renew)


def choose(
    config: Config, running: Mapping[Path, Running], installed_queue: int | None, *, renew: bool
) -> Plan:
    """Say who shall run.

    Args:
        config: who shall run by it.
        running: who runs, by socket.
        installed_queue: the first queue that the rules feed now; None = there are no rules.
        renew: adopt nobody.
    """
    outdated = frozenset(one.pid for one in running.values()) if renew else frozenset()
    datapath = {path: one for path, one in running.items() if path.name.startswith("datapath-")}
    if not datapath:
        return Plan(0, follows=False, outdated=outdated)
    in_second = installed_queue is not None and installed_queue >= config.queue_base + BANK_SIZE
    fed = 1 if in_second else 0
    if not renew:
        for bank in (fed, 1 - fed):
            wanted = _datapath(config, bank)
            ours = {path: one for path, one in datapath.items() if path in wanted}
            if ours and all(
                (one.arguments, one.version) == (wanted[path], VERSION)
                for path, one in ours.items()
            ):
                return Plan(bank, follows=len(ours) < len(datapath), outdated=outdated)
    return Plan(1 - fed, follows=True, outdated=outdated)


async def follow(
    workers: Iterable[Worker],
    publisher: Publisher,
    install: Callable[[], Awaitable[None]],
    run_dir: Path,
    keep: Iterable[Path],
) -> list[int]:
    """Have `workers`, which are being started, follow those that run; return whose time is over.

    Args:
        workers: all of this run.
        publisher: knows when they are ready.
        install: turns the rules to their queues.
        run_dir: where the sockets are.
        keep: the sockets of `workers`.

    Raises:
        KernelError: the rules cannot be changed.
    """
    heirs = [worker for worker in workers if worker.spec.kind == "datapath"]
    await publisher.enforced(1, heirs, START_S)
    await _tell(heirs, PAUSE_S)
    try:
        await install()
        return await end_orphans(run_dir, keep)
    finally:
        await _tell(heirs, 0.0)


async def _tell(workers: list[Worker], for_s: float) -> None:
    """Have workers pause, and wait until they do; one that has died needs no telling."""
    pauses = [worker.channel.pause(for_s) for worker in workers]
    for answer in await asyncio.gather(*pauses, return_exceptions=True):
        if isinstance(answer, BaseException) and not isinstance(
            answer, (ChannelError, TimeoutError)
        ):
            raise answer


def _datapath(config: Config, bank: int) -> dict[Path, tuple[str, ...]]:
    """Return the command line that belongs to each socket of a bank."""
    return {
        spec.socket_path: spec.arguments for spec in specs(config, bank) if spec.kind == "datapath"
    }


async def _running(path: Path, run_dir: Path) -> Running | None:
    """Return who listens at a socket, if it is a worker of ours."""
    try:
        pid = listener_pid(path)
    except ChannelError:
        return None
    arguments = command_of(pid) if pid else ()
    if not is_worker(arguments, run_dir):
        return None
    channel = AgentChannel(path)
    version = ""
    with contextlib.suppress(ChannelError, TimeoutError):
        version = (await channel.connect(GREETING_S)).version
    channel.close()
    return Running(pid, arguments, version)
