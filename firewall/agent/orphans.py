"""Ends workers that nobody wants any more: of an earlier agent, or of a bank that was left."""

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

from firewall.agent.process import command_of, held, reap
from firewall.agent.worker import DRAIN_S, drain, is_worker, worker_sockets
from firewall.control.agent_channel import AgentChannel
from firewall.control.journal import fields
from firewall.control.unix import ChannelError, listener_pid

log = logging.getLogger(__name__)


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
        with contextlib.suppress(ProcessLookupError), held(pid) as process:
            if not is_worker(command_of(pid), run_dir):
                log.warning("process left alone: no worker of ours", extra=fields(pid=pid))
                return 0
            channel = AgentChannel(path)
            with contextlib.suppress(ChannelError, TimeoutError):
                await channel.connect(1.0)
            await drain(channel, process, DRAIN_S)
            reap(process)
    _remove(path)
    return pid


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
