"""The shell around an exchange: two sockets, and the commands performed on them.

Every event of the sockets goes to the exchange and what it asks for is done at once, in order. A
command may cause another event while it is performed (a full buffer); its commands wait until the
list at hand is done. Nothing is decided here.
"""

import asyncio
import logging
import socket
import struct
import time
from collections import deque
from typing import Protocol, assert_never, cast

from conntrack.address import parse_address
from l7proxy import upstream
from l7proxy.accesslog import Ends
from l7proxy.commands import (
    CloseClient,
    CloseUpstream,
    Command,
    ConnectFailure,
    Count,
    HandOver,
    Log,
    OpenUpstream,
    PauseClient,
    PauseUpstream,
    Record,
    ResumeClient,
    ResumeUpstream,
    SendClient,
    SendUpstream,
    ShutdownClient,
)
from l7proxy.exchange import Exchange
from l7proxy.frames import PREFACE_LINE
from l7proxy.judgement import Judge
from l7proxy.limits import Limits
from l7proxy.metrics import Metrics
from l7proxy.multiplex import Multiplex
from l7proxy.ongoing import Ongoing
from l7proxy.tunnel import Tunnel
from l7proxy.upstream import SocketAddress

log = logging.getLogger(__name__)

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""struct linger: on, 0 seconds; close() then sends RST (socket(7))."""


class Host(Protocol):
    """What a connection needs of its worker."""

    limits: Limits
    metrics: Metrics
    mark: int

    def admit(self, connection: "ClientConnection") -> Judge | None:
        """Take a new connection; None: it must be reset."""
        ...

    def forget(self, connection: "ClientConnection") -> None:
        """Let go of a connection that has ended."""
        ...

    def new_request_id(self) -> str:
        """Return an id that no other request has."""
        ...

    def report(self, record: Record, ends: Ends) -> None:
        """Log a record."""
        ...


class ClientConnection(asyncio.Protocol):
    """One redirected connection and, behind it, the one to its server."""

    __slots__ = (
        "_admitted",
        "_begun",
        "_close_at",
        "_connecting",
        "_host",
        "_judge",
        "_performing",
        "_queue",
        "_transport",
        "_upstreams",
        "client",
        "ends",
        "exchange",
        "server",
    )

    def __init__(self, host: Host) -> None:
        self._host = host
        self._transport: asyncio.Transport | None = None
        self._upstreams: dict[int, UpstreamConnection] = {}
        self._connecting: dict[int, asyncio.Task[None]] = {}
        self._judge: Judge | None = None
        self._begun: bytes | None = b""
        self._queue: deque[Command] = deque()
        self._performing = False
        self._admitted = False
        self._close_at = float("inf")
        self.client: SocketAddress = ("", 0)
        self.server: SocketAddress = ("", 0)
        self.ends = Ends(b"", 0, b"", 0)
        self.exchange: Exchange | Multiplex | Tunnel | None = None

    # --- the client's socket ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Judge the connection before anything is read from it."""
        self._transport = cast("asyncio.Transport", transport)
        limits = self._host.limits
        self._transport.set_write_buffer_limits(high=limits.buffer_bytes)
        client = transport.get_extra_info("peername")
        server = transport.get_extra_info("sockname")
        if not client or not server:  # gone before it was accepted
            self._transport.abort()
            return
        self.client, self.server = client, server
        self.ends = Ends(_packed(client), client[1], _packed(server), server[1])
        self._admitted = True
        judge = self._host.admit(self)
        if judge is None:
            self._close(reset=True)
            return
        now = time.monotonic()
        self._judge = judge
        self.exchange = Exchange(judge, limits, self._host.new_request_id, now)
        self.perform(self.exchange.policy_changed(now))

    def data_received(self, data: bytes) -> None:
        """Pass bytes of the client on."""
        if self._begun is not None:
            data = self._choose(bytes(data))
        if self.exchange is not None:
            self.perform(self.exchange.client_data(bytes(data), time.monotonic()))

    def _choose(self, data: bytes) -> bytes:
        """Serve HTTP/2 if the first bytes are its preface; return what to pass on.

        While they may still become it, the exchange for HTTP/1 has them too: no part of the
        preface's first line makes it do anything.
        """
        assert self._begun is not None
        begun = self._begun + data
        if begun.startswith(PREFACE_LINE) and self._judge is not None:
            self._begun = None
            host = self._host
            now = time.monotonic()
            self.exchange = Multiplex(self._judge, host.limits, host.new_request_id, now)
            return begun
        self._begun = begun if PREFACE_LINE.startswith(begun) else None
        return data

    def eof_received(self) -> bool:
        """Pass the client's FIN on; True: the transport stays open for our answers."""
        if self.exchange is not None:
            self.perform(self.exchange.client_ended(time.monotonic()))
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Pass the end of the client's connection on, and end everything behind it."""
        if self.exchange is not None:
            self.perform(self.exchange.client_lost(time.monotonic()))
        if self._admitted:
            self._host.forget(self)

    def pause_writing(self) -> None:
        """Pass on that the client reads too slowly."""
        if self.exchange is not None:
            self.perform(self.exchange.client_blocked(blocked=True, now=time.monotonic()))

    def resume_writing(self) -> None:
        """Pass on that the client has caught up."""
        if self.exchange is not None:
            self.perform(self.exchange.client_blocked(blocked=False, now=time.monotonic()))

    # --- events of the worker --------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Let time pass; called a few times a second."""
        if self.exchange is not None and now >= self.exchange.deadline:
            self.perform(self.exchange.tick(now))
        if now >= self._close_at and self._transport is not None:
            self._transport.abort()

    def policy_changed(self, now: float) -> None:
        """End the connection if the snapshot in force forbids it."""
        if self.exchange is not None:
            self.perform(self.exchange.policy_changed(now))

    def drain(self, now: float) -> None:
        """Finish what has begun, then close."""
        if self.exchange is not None:
            self.perform(self.exchange.drain(now))

    # --- commands --------------------------------------------------------------------------------

    def perform(self, commands: list[Command]) -> None:
        """Do what the exchange asks for, in order."""
        if self._performing or not commands:
            self._queue.extend(commands)
            return
        self._performing = True
        try:
            for command in commands:
                self._perform(command)
            while self._queue:
                self._perform(self._queue.popleft())
        finally:
            self._performing = False

    def _perform(self, command: Command) -> None:
        transport = self._transport
        assert transport is not None
        match command:
            case SendClient(data):
                transport.write(data)
            case SendUpstream(data, link):
                if (connection := self._upstreams.get(link)) is not None:
                    connection.write(data)
            case Log(record):
                self._host.metrics.observe(record)
                self._host.report(record, self.ends)
            case OpenUpstream(link):
                task = asyncio.get_running_loop().create_task(self._connect(link))
                self._connecting[link] = task
            case CloseUpstream(reset, link):
                self._close_upstream(link, reset=reset)
            case ShutdownClient():
                if not transport.is_closing():
                    transport.write_eof()
            case CloseClient(reset):
                self._close(reset=reset)
            case PauseClient():
                if not transport.is_closing():
                    transport.pause_reading()
            case ResumeClient():
                if not transport.is_closing():
                    transport.resume_reading()
            case PauseUpstream(link):
                if (connection := self._upstreams.get(link)) is not None:
                    connection.pause()
            case ResumeUpstream(link):
                if (connection := self._upstreams.get(link)) is not None:
                    connection.resume()
            case HandOver(ongoing, head, early):
                self._hand_over(ongoing, head, early)
            case Count(name):
                self._host.metrics.add(name)
            case _:
                assert_never(command)

    def _hand_over(self, ongoing: Ongoing, head: bytes, early: bytes) -> None:
        assert self._judge is not None
        now = time.monotonic()
        self.exchange = tunnel = Tunnel(self._judge, self._host.limits, ongoing, early, now)
        self._queue.extend(tunnel.start(head, now))

    def _close(self, *, reset: bool) -> None:
        transport = self._transport
        assert transport is not None
        if reset:
            reset_on_close(transport)
            transport.abort()
        else:
            transport.close()
            # close() waits until everything was sent; a client that reads nothing must not keep it.
            self._close_at = time.monotonic() + self._host.limits.stream_idle_timeout_s

    async def _connect(self, link: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock = await upstream.connect(self.client, self.server, self._host.mark)
            _, opened = await loop.create_connection(
                lambda: UpstreamConnection(self, link), sock=sock
            )
        except OSError as error:
            del self._connecting[link]
            failure = ConnectFailure.REFUSED
            if isinstance(error, TimeoutError):
                failure = ConnectFailure.TIMEOUT
            log.debug("no connection to %s: %s", self.server, error)
            self._upstream_failed(failure, link)
            return
        except Exception:
            log.exception("no connection to %s: internal error", self.server)
            del self._connecting[link]
            self._upstream_failed(ConnectFailure.REFUSED, link)
            return
        del self._connecting[link]
        self._upstreams[link] = opened
        self._host.metrics.upstream_opened()
        assert self.exchange is not None
        self.perform(self.exchange.upstream_opened(time.monotonic(), link))

    def _upstream_failed(self, failure: ConnectFailure, link: int) -> None:
        assert self.exchange is not None
        self.perform(self.exchange.upstream_failed(failure, time.monotonic(), link))

    def _close_upstream(self, link: int, *, reset: bool) -> None:
        task = self._connecting.pop(link, None)
        if task is not None:
            task.cancel()
        connection = self._upstreams.pop(link, None)
        if connection is not None:
            connection.close(reset=reset)
            self._host.metrics.upstream_closed()


class UpstreamConnection(asyncio.Protocol):
    """The connection to the server; silent once its owner has closed it."""

    __slots__ = ("_closed", "_link", "_owner", "_transport")

    def __init__(self, owner: ClientConnection, link: int) -> None:
        self._owner = owner
        self._link = link
        self._transport: asyncio.Transport | None = None
        self._closed = False

    @property
    def _exchange(self) -> Exchange | Multiplex | Tunnel | None:
        return None if self._closed else self._owner.exchange

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Pass bytes of the server on."""
        if (exchange := self._exchange) is not None:
            self._owner.perform(exchange.upstream_data(bytes(data), time.monotonic(), self._link))

    def eof_received(self) -> bool:
        """Pass the server's FIN on; True: the exchange says when to close."""
        if (exchange := self._exchange) is not None:
            self._owner.perform(exchange.upstream_ended(time.monotonic(), self._link))
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Pass the loss on, unless it was our doing."""
        if (exchange := self._exchange) is not None:
            self._owner.perform(exchange.upstream_lost(time.monotonic(), self._link))

    def pause_writing(self) -> None:
        """Pass on that the server reads too slowly."""
        if (exchange := self._exchange) is not None:
            commands = exchange.upstream_blocked(True, time.monotonic(), self._link)
            self._owner.perform(commands)

    def resume_writing(self) -> None:
        """Pass on that the server has caught up."""
        if (exchange := self._exchange) is not None:
            commands = exchange.upstream_blocked(False, time.monotonic(), self._link)
            self._owner.perform(commands)

    def write(self, data: bytes) -> None:
        """Send to the server."""
        if self._transport is not None:
            self._transport.write(data)

    def pause(self) -> None:
        """Read nothing more for now."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def close(self, *, reset: bool) -> None:
        """Close; whatever the server still says is not heard."""
        self._closed = True
        if self._transport is None:
            return
        if reset:
            reset_on_close(self._transport)
            self._transport.abort()
        else:
            self._transport.close()


def _packed(address: SocketAddress) -> bytes:
    """The packed address of a socket's end, without the scope of a link-local one."""
    return parse_address(address[0].partition("%")[0])


def reset_on_close(transport: asyncio.Transport) -> None:
    """Have the kernel send RST instead of FIN when this transport is closed."""
    sock = transport.get_extra_info("socket")
    if sock is not None and not transport.is_closing():
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        except OSError:
            log.debug("connection already gone")
