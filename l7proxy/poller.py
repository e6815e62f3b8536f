"""Every socket of a worker's connections, in one epoll instance that the event loop watches.

asyncio and uvloop make a transport, a handle, a future or a task of each thing that happens to a
socket. A proxy has many short connections and no use for those: here an event is a method call, and
a turn of the loop takes all that are due. Everything else (timers, DNS datagrams, the agent, TLS
helpers) stays with the loop, which sees one descriptor that becomes readable.

What is called here may close any descriptor and open another with the same number while a batch is
worked off, so an event may reach a newcomer that it was not meant for. Whoever is watched must take
an event as a hint to look. Source: epoll(7), "Questions and answers", 6.
"""

import asyncio
import errno
import logging
import select
import socket
from collections.abc import Callable
from typing import Protocol

from l7proxy.accesslog import SocketAddress

READ, WRITE = select.EPOLLIN, select.EPOLLOUT

EVENTS_PER_TURN = 64
"""Taken at once: about 2 ms of requests, after which the loop may look at something else."""

ACCEPTS_PER_TURN = 8
"""Connections accepted at once, about 1 ms with their first requests."""

ACCEPT_PAUSE_S = 1.0
"""After accept(2) found no descriptor or memory; asyncio's ACCEPT_RETRY_DELAY."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger(__name__)


class Watched(Protocol):
    """Who is told of a descriptor's events."""

    def ready(self, events: int) -> None:
        """Look what there is to do; `events` of epoll(7)."""
        ...

    def fail(self, error: Exception) -> None:
        """Take that `ready` raised: end, and do not raise."""
        ...


class Reader:
    """Somebody who only wants to be called when there is something to read."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def ready(self, events: int) -> None:  # noqa: ARG002 - as any that is watched
        """Call."""
        self._call()

    def fail(self, error: Exception) -> None:
        """Go on."""


class Poller:
    """Watches descriptors for the running loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._watched: dict[int, Watched] = {}
        self._later: list[Callable[[], None]] = []
        self._working = False
        self._loop.add_reader(self._epoll.fileno(), self._work)

    def watch(self, descriptor: int, events: int, who: Watched) -> None:
        """Tell `who` of these events, and of nothing else, from now on."""
        if descriptor in self._watched:
            self._epoll.modify(descriptor, events)
        else:
            self._epoll.register(descriptor, events)
        self._watched[descriptor] = who

    def forget(self, descriptor: int) -> None:
        """Tell nothing more. To be called while the descriptor is open."""
        if self._watched.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def closed(self, descriptor: int) -> None:
        """Take that the only copy of a descriptor was closed; epoll has forgotten it already."""
        self._watched.pop(descriptor, None)

    def later(self, call: Callable[[], None]) -> None:
        """Call this when what is being done now is done, not from within it."""
        if not self._working and not self._later:
            self._loop.call_soon(self._call_later)
        self._later.append(call)

    def close(self) -> None:
        """Watch nothing more."""
        if not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()

    def _work(self) -> None:
        watched = self._watched
        self._working = True
        try:
            for descriptor, events in self._epoll.poll(0, EVENTS_PER_TURN):
                who = watched.get(descriptor)
                if who is None:
                    continue
                try:
                    who.ready(events)
                except Exception as error:  # ends one connection, not those of the whole worker
                    log.exception("internal error")
                    who.fail(error)
        finally:
            self._working = False
        if self._later:
            self._call_later()

    def _call_later(self) -> None:
        while self._later:
            calls, self._later = self._later, []
            for call in calls:
                try:
                    call()
                except Exception:  # as above
                    log.exception("internal error")


class Door:
    """A listening socket; `enter` gets each connection, not blocking, and its peer's address."""

    def __init__(
        self,
        poller: Poller,
        sock: socket.socket,
        enter: Callable[[socket.socket, SocketAddress], None],
    ) -> None:
        self._poller = poller
        self._sock = sock
        self._enter = enter
        self._loop = asyncio.get_running_loop()
        self._reopening: asyncio.TimerHandle | None = None
        self._open()

    def _open(self) -> None:
        self._reopening = None
        self._poller.watch(self._sock.fileno(), READ, self)

    def close(self) -> None:
        """Accept nothing more. The socket may live on in another process, with what waits in it."""
        if self._reopening is not None:
            self._reopening.cancel()
        if self._sock.fileno() >= 0:
            # Closing alone would not end the watch: it ends with the last copy of the descriptor.
            self._poller.forget(self._sock.fileno())
            self._sock.close()

    def ready(self, events: int) -> None:  # noqa: ARG002 - as any that is watched
        """Accept what waits, up to a limit."""
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, client = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                log.error("cannot accept: %s", error)  # noqa: TRY400 - the text says it all
                self._poller.forget(self._sock.fileno())
                self._reopening = self._loop.call_later(ACCEPT_PAUSE_S, self._open)
                return
            sock.setblocking(False)
            self._enter(sock, client)

    def fail(self, error: Exception) -> None:
        """Go on: one connection failed, or a call of the kernel."""
