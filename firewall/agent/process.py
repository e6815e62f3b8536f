"""Processes held so that no signal ever reaches a stranger who inherited the number.

A process is held by a pidfd (pidfd_open(2)) from before it is looked at until after its last
signal.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

KILL_AFTER_S = 3.0
"""Further time between SIGTERM and SIGKILL for one that does not end."""


@contextlib.contextmanager
def held(pid: int) -> Iterator[int]:
    """Hold a process while the block runs; the value is its pidfd.

    Raises:
        ProcessLookupError: it is gone already.
    """
    process = os.pidfd_open(pid)
    try:
        yield process
    finally:
        os.close(process)


async def exited(process: int) -> None:
    """Wait until a held process has ended."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    watched = os.dup(process)  # epoll knows a descriptor once; two may wait for one process
    loop.add_reader(watched, done.set)
    try:
        await done.wait()
    finally:
        loop.remove_reader(watched)
        os.close(watched)


async def terminate(process: int) -> None:
    """End a held process: SIGTERM, and SIGKILL if it does not listen."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            signal.pidfd_send_signal(process, number)
        except ProcessLookupError:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(exited(process), KILL_AFTER_S)
            return


def reap(process: int) -> None:
    """Take leave of a child that an earlier agent had in this very process (SIGUSR2)."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, process, os.WEXITED | os.WNOHANG)


def command_of(pid: int) -> tuple[str, ...]:
    """Return a process's arguments after the interpreter, () if it is gone."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(os.fsdecode(part) for part in raw.rstrip(b"\0").split(b"\0")[1:])


def ending(code: int) -> str:
    """Name how a child ended."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
