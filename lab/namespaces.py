"""Network namespaces as values, and the few system calls that the standard library lacks.

A network namespace belongs to a thread, and a socket stays in the namespace in which it was opened.
So nothing has to live inside a host to speak for it: a thread enters the namespace, opens the
socket, ends, and the socket is used from anywhere. That is what makes a packet from a host cost
one `send`, not one interpreter start.

Sources: unshare(2), setns(2), mount(2), prctl(2), network_namespaces(7), packet(7).
"""

import ctypes
import fcntl
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNS = 0x0002_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000
"""Kinds of namespace, from linux/sched.h."""

MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x4_0000
"""Mount flags, from linux/mount.h."""

_MNT_DETACH = 2
_PR_SET_PDEATHSIG = 1
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_IFF_RUNNING = 0x40

NAMED = Path("/run/netns")
"""Where `ip netns` looks for names (ip-netns(8))."""

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, call: str, subject: str = "") -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}", subject or None)


def unshare(flags: int) -> None:
    """Leave the namespaces named by `flags` for new ones.

    Raises:
        OSError: the kernel refuses, e.g. EPERM without the right to do so.
    """
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    """Put the file system `source` of type `kind` on `target`; the rest as in its manual.

    Raises:
        OSError: the kernel refuses; the error carries `target`.
    """
    result = _libc.mount(
        source.encode(),
        os.fsencode(target),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    _checked(result, "mount", str(target))


def unmount(target: Path) -> None:
    """Take away what is mounted on `target`, now or when its last user has gone.

    Raises:
        OSError: nothing is mounted there.
    """
    _checked(_libc.umount2(os.fsencode(target), ctypes.c_int(_MNT_DETACH)), "umount2", str(target))


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends.

    The kernel forgets the wish when the credentials change, so call it after that (prctl(2)).
    """
    _checked(
        _libc.prctl(ctypes.c_int(_PR_SET_PDEATHSIG), ctypes.c_ulong(signal.SIGKILL), 0, 0, 0),
        "prctl",
    )


def raise_loopback() -> None:
    """Set `lo` of the calling thread's namespace up (netdevice(7))."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def is_running(interface: str) -> bool:
    """Whether an interface of the calling thread's namespace can send: up, and so is its peer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", interface.encode(), 0)
        answer = fcntl.ioctl(control, _SIOCGIFFLAGS, request)
    _, flags = struct.unpack_from("16sh", answer)
    return bool(flags & _IFF_RUNNING)


class Namespace:
    """One named network namespace, for as long as this value is not closed.

    Attributes:
        name: As `ip netns list` prints it.
        path: The file that setns(2) and `nsenter --net=` take.
    """

    def __init__(self, name: str) -> None:
        """Make the namespace, loopback up; raises OSError if the name is taken or not allowed."""
        self.name = name
        self.path = NAMED / name
        NAMED.mkdir(parents=True, exist_ok=True)
        self.path.touch(exist_ok=False)
        try:
            _in_thread(self._make)
        except BaseException:
            self.path.unlink()
            raise
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.inode = os.fstat(self._descriptor).st_ino

    def _make(self) -> None:
        unshare(CLONE_NEWNET)
        mount("/proc/thread-self/ns/net", self.path, "", MS_BIND)
        raise_loopback()

    def within(self, function: Callable[[], T]) -> T:
        """Run `function` in a thread that is inside the namespace; its result or exception."""

        def enter() -> T:
            _checked(_libc.setns(self._descriptor, ctypes.c_int(CLONE_NEWNET)), "setns", self.name)
            return function()

        return _in_thread(enter)

    def open_socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Open a socket that belongs to this namespace and is usable from any thread."""
        return self.within(lambda: socket.socket(family, kind, protocol))

    def set(self, **settings: str) -> None:
        """Write `net.*` sysctls of the namespace; `ipv4__ip_forward="1"`, two underscores a slash.

        Raises:
            OSError: the kernel has no such setting.
        """

        def write() -> None:
            for name, value in settings.items():
                Path("/proc/sys/net", name.replace("__", "/")).write_text(value, encoding="ascii")

        self.within(write)

    def processes(self) -> list[int]:
        """Pids, in the reader's /proc, of the processes that are in this namespace."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError):
                    if (entry / "ns/net").stat().st_ino == self.inode:
                        found.append(int(entry.name))
        return found

    def close(self) -> None:
        """Drop the name; the kernel frees the namespace with its last process and socket."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            unmount(self.path)
            self.path.unlink()


def _in_thread(function: Callable[[], T]) -> T:
    """Run `function` in a thread of its own, whose namespaces end with it."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(function())
        except BaseException as error:  # noqa: BLE001 (carried to the caller's thread)
            failure.append(error)

    thread = threading.Thread(target=body, name="namespace")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
