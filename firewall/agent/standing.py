"""The daemon's standing on its machine: alone in its network namespace, known to systemd.

A network namespace has one firewall, so it has one daemon. Abstract unix sockets belong to a
network namespace (unix(7)), and their name vanishes with the process: binding one is a lock that no
crash leaves behind and that `run_dir` cannot divide. The other's pid comes from SO_PEERCRED.
"""

import os
import socket
import time

from firewall.control.unix import peer_pid

LOCK_NAME = "\0bartizan"
"""Abstract address that the daemon of a network namespace holds."""


class OccupiedError(Exception):
    """Another daemon serves this network namespace already. `pid` is its process, 0 = unknown."""

    def __init__(self, pid: int) -> None:
        whose = f"process {pid}" if pid else "another process"
        super().__init__(
            f"{whose} is the daemon of this network namespace already; "
            "a namespace has one: stop it first, or use the one that runs"
        )
        self.pid = pid


def occupy() -> socket.socket:
    """Take the network namespace; it is held until the socket is closed.

    Raises:
        OccupiedError: another daemon has it.
    """
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        lock.bind(LOCK_NAME)
        lock.listen(1)
    except OSError:
        lock.close()
        raise OccupiedError(occupant()) from None
    return lock


def occupant() -> int:
    """Return the pid of the daemon of this network namespace, 0 if there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(LOCK_NAME)
        except OSError:
            return 0
        return peer_pid(probe)


def tell_systemd(*lines: str) -> None:
    """Send `READY=1`, `STATUS=...` to the service manager, if one asked (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
        try:
            notify.connect(address)
            notify.send("\n".join(lines).encode(), socket.MSG_DONTWAIT)
        except OSError:
            return  # a manager that cannot listen is no reason to stop a firewall


def monotonic_usec() -> str:
    """Return the line that must go with RELOADING=1 (sd_notify(3), Type=notify-reload)."""
    return f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"
