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
from l7proxy.judgement import Judge
from l7proxy.limits import Limits
from l7proxy.metrics import Metrics
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
        "_close_at",
        "_connecting",
        "_host",
        "_performing",
        "_queue",
        "_transport",
        "_upstream",
        "client",
        "ends",
        "exchange",
        "server",
    )

    def __init__(self, host: Host) -> None:
        self._host = host
        self._transport: asyncio.Transport | None = None
        self._upstream: UpstreamConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._queue: deque[Command] = deque()
        self._performing = False
        self._admitted = False
        self._close_at = float("inf")
        self.client: SocketAddress = ("", 0)
        self.server: SocketAddress = ("", 0)
        self.ends = Ends(b"", 0, b"", 0)
        self.exchange: Exchange | None = None

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
        self.exchange = Exchange(judge, limits, self._host.new_request_id, now)
        self.perform(self.exchange.policy_changed(now))

    def data_received(self, data: bytes) -> None:
        """Pass bytes of the client on."""
        if self.exchange is not None:
            self.perform(self.exchange.client_data(bytes(data), time.monotonic()))

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
            case SendUpstream(data):
                if self._upstream is not None:
                    self._upstream.write(data)
            case Log(record):
                self._host.metrics.observe(record)
                self._host.report(record, self.ends)
            case OpenUpstream():
                self._connecting = asyncio.get_running_loop().create_task(self._connect())
            case CloseUpstream(reset):
                self._close_upstream(reset=reset)
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
            case PauseUpstream():
                if self._upstream is not None:
                    self._upstream.pause()
            case ResumeUpstream():
                if self._upstream is not None:
                    self._upstream.resume()
            case Count(name):
                self._host.metrics.add(name)
            case _:
                assert_never(command)

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

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock = await upstream.connect(self.client, self.server, self._host.mark)
            _, opened = await loop.create_connection(lambda: UpstreamConnection(self), sock=sock)
        except OSError as error:
            self._connecting = None
            failure = ConnectFailure.REFUSED
            if isinstance(error, TimeoutError):
                failure = ConnectFailure.TIMEOUT
            log.debug("no connection to %s: %s", self.server, error)
            self._upstream_failed(failure)
            return
        except Exception:
            log.exception("no connection to %s: internal error", self.server)
            self._connecting = None
            self._upstream_failed(ConnectFailure.REFUSED)
            return
        self._connecting = None
        self._upstream = opened
        self._host.metrics.upstream_opened()
        assert self.exchange is not None
        self.perform(self.exchange.upstream_opened(time.monotonic()))

    def _upstream_failed(self, failure: ConnectFailure) -> None:
        assert self.exchange is not None
        self.perform(self.exchange.upstream_failed(failure, time.monotonic()))

    def _close_upstream(self, *, reset: bool) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._upstream is not None:
            self._upstream.close(reset=reset)
            self._upstream = None
            self._host.metrics.upstream_closed()


class UpstreamConnection(asyncio.Protocol):
    """The connection to the server; silent once its owner has closed it."""

    __slots__ = ("_closed", "_owner", "_transport")

    def __init__(self, owner: ClientConnection) -> None:
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._closed = False

    @property
    def _exchange(self) -> Exchange | None:
        return None if self._closed else self._owner.exchange

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Pass bytes of the server on."""
        if (exchange := self._exchange) is not None:
            self._owner.perform(exchange.upstream_data(bytes(data), time.monotonic()))

    def eof_received(self) -> bool:
        """Pass the server's FIN on; True: the exchange says when to close."""
        if (exchange := self._exchange) is not None:
            self._owner.perform(exchange.upstream_ended(time.monotonic()))
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Pass the loss on, unless it was our doing."""
        if (exchange := self._exchange) is not None:
            self._owner.perform(exchange.upstream_lost(time.monotonic()))

    def pause_writing(self) -> None:
        """Pass on that the server reads too slowly."""
        if (exchange := self._exchange) is not None:
            commands = exchange.upstream_blocked(blocked=True, now=time.monotonic())
            self._owner.perform(commands)

    def resume_writing(self) -> None:
        """Pass on that the server has caught up."""
        if (exchange := self._exchange) is not None:
            commands = exchange.upstream_blocked(blocked=False, now=time.monotonic())
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
