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

BUFFER_BYTES = 256 * 1024
"""Read from one socket at once."""

ACCEPTS_PER_TURN = 8
"""Connections accepted at once, about 1 ms with their first requests."""

PAUSE_S = 1.0
"""After a socket could not be read or accepted from, no descriptor or memory for one: it stays
ready, and would be called for in every turn. asyncio's ACCEPT_RETRY_DELAY."""

_OF_THE_CONNECTION = frozenset(
    (
        errno.ECONNABORTED, errno.EPROTO, errno.ENOPROTOOPT, errno.ENETDOWN, errno.ENETUNREACH,
        errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENONET, errno.EOPNOTSUPP, errno.EPERM,
    )
)  # fmt: skip
"""What accept(2) tells of a connection that is gone, or that a firewall forbids: the next one may
be well."""

log = logging.getLogger(__name__)


class Watched(Protocol):
    """Who is told of a descriptor's events."""

    def ready(self, events: int) -> None:
        """Look what there is to do; `events` of epoll(7)."""
        ...

    def fail(self, error: Exception) -> None:
        """Take that `ready` raised: end, and do not raise."""
        ...


class Poller:
    """Watches descriptors for the running loop.

    Attributes:
        buffer: to read into, for whoever is called, until it returns. To have the kernel fill a
            piece of memory that is made for it takes longer than to copy what came out of this one:
            64 KiB in 10 us instead of 106, most of that for pages of which nothing is used.
    """

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(BUFFER_BYTES))
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

    def pause(self, descriptor: int, events: int, who: Watched) -> asyncio.TimerHandle:
        """Tell nothing for `PAUSE_S`; until then the handle can be cancelled."""
        self.forget(descriptor)
        return self._loop.call_later(PAUSE_S, self.watch, descriptor, events, who)

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
        self._reopening: asyncio.TimerHandle | None = None
        poller.watch(sock.fileno(), READ, self)

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
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _OF_THE_CONNECTION:
                    continue
                log.error("cannot accept: %s", error)  # noqa: TRY400 - the text says it all
                self._reopening = self._poller.pause(self._sock.fileno(), READ, self)
                return
            sock.setblocking(False)
            self._enter(sock, client)

    def fail(self, error: Exception) -> None:
        """Go on: one connection failed, which is taken from the queue already."""
