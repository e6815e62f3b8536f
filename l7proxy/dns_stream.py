"""DNS over TCP: messages with their length in front, many on one connection (RFC 7766).

A client's connection has one to the server behind it, in the client's name, opened with the first
question that is allowed and opened again if the server closes it. Questions are passed on as they
come, each under an id of its own, and answers as they come; their order is nobody's promise. What
is not read from the client while too much is open, or while it does not read itself, waits in the
kernel.
"""

import asyncio
import random
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

from l7proxy import dns, upstream
from l7proxy.accesslog import Ends, SocketAddress
from l7proxy.dns_desk import Desk, Lesson, Pending
from l7proxy.limits import Limits
from l7proxy.poller import WRITE, Poller
from l7proxy.wire import Wire

TCP = 6

LENGTH_BYTES = 2
"""RFC 1035 section 4.2.2: the length before each message, network order."""

_draw = random.SystemRandom().randrange


class Host(Protocol):
    """What a connection asks of its worker."""

    limits: Limits
    poller: Poller
    mark: int

    def admit_stream(self, stream: "DnsStream") -> Desk | None:
        """Take a new connection; None: it must be reset."""
        ...

    def forget(self, connection: "DnsStream") -> None:
        """Let go of a connection that has ended."""
        ...

    def hold(self, lesson: Lesson | None, send: Callable[[], None]) -> None:
        """Call `send` when every worker enforces the lesson, or when waiting is over."""
        ...


class Frames:
    """Messages out of a stream of bytes, wherever it is cut. Pure."""

    def __init__(self) -> None:
        self._held = bytearray()

    def add(self, data: bytes) -> None:
        """Take more bytes."""
        self._held += data

    def take(self) -> bytes | None:
        """Return the next whole message, None if there is none yet; b"" = its length was 0."""
        held = self._held
        if len(held) < LENGTH_BYTES:
            return None
        end = LENGTH_BYTES + int.from_bytes(held[:LENGTH_BYTES], "big")
        if len(held) < end:
            return None
        message = bytes(held[LENGTH_BYTES:end])
        del held[:end]
        return message


def framed(message: bytes) -> bytes:
    """Return a message with its length in front."""
    return len(message).to_bytes(LENGTH_BYTES, "big") + message


class DnsStream(asyncio.Protocol):
    """A client's connection.

    Args:
        host: the worker.
        client: the peer's address.
        server: the original destination.
        ends: the same, as records have it.
    """

    def __init__(
        self, host: Host, client: SocketAddress, server: SocketAddress, ends: Ends
    ) -> None:
        self._host = host
        self._desk: Desk | None = None
        self._transport: asyncio.Transport | None = None
        self._frames = Frames()
        self._open: dict[int, Pending] = {}
        self._server: _ServerStream | None = None
        self._paused = False
        self._writable = True
        self._draining = False
        self._ended = False  # the client sent FIN: what is open is answered yet
        self._held_count = 0
        self._idle_at = 0.0
        self.client = client
        self.server = server
        self.ends = ends

    # --- the client's socket ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the worker say whether there is room."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=self._host.limits.buffer_bytes)
        self._idle_at = time.monotonic()
        self._desk = self._host.admit_stream(self)
        if self._desk is None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take questions."""
        self._frames.add(data)
        self._work()

    def _work(self) -> None:
        """Judge what was read, as long as not too much is open."""
        assert self._transport is not None
        while not self._full() and not self._transport.is_closing():
            message = self._frames.take()
            if message is None:
                break
            self._question(message)
        self._set_reading()

    def _full(self) -> bool:
        most = self._host.limits.dns_pending_count_per_connection
        return len(self._open) + self._held_count >= most or not self._writable or self._draining

    def _set_reading(self) -> None:
        transport = self._transport
        assert transport is not None
        if transport.is_closing() or self._ended or self._full() == self._paused:
            return
        self._paused = self._full()
        if self._paused:
            transport.pause_reading()
        else:
            transport.resume_reading()

    def _question(self, message: bytes) -> None:
        assert self._desk is not None
        now = time.monotonic()
        self._idle_at = now
        begun = self._desk.begin(message, self.ends, TCP, now)
        if begun.reply:
            self._send(begun.reply)
        if begun.close:
            self._abort()
        if begun.pending is not None:
            self._ask(begun.pending)

    def _ask(self, pending: Pending) -> None:
        pending.number = _draw(65_536)
        while pending.number in self._open:
            pending.number = _draw(65_536)
        self._open[pending.number] = pending
        message = framed(dns.with_id(pending.query.wire, pending.number))
        if self._server is None:
            self._server = _ServerStream(self, self._host.poller)
            self._server.write(message)
            self._server.dial(self._host.mark)
        else:
            self._server.write(message)

    def _fail_all(self, detail: str) -> None:
        """Answer SERVFAIL to what the server was asked and will not answer."""
        assert self._desk is not None
        opened, self._open = self._open, {}
        now = time.monotonic()
        for pending in opened.values():
            self._send(self._desk.fail(pending, detail, now))
        self._settled()

    def _send(self, message: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(framed(message))

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def eof_received(self) -> bool:
        """Answer what is open, then close."""
        self._ended = True
        self._settled()
        return True

    def pause_writing(self) -> None:
        """Read no questions while the client reads no answers."""
        self._writable = False
        self._set_reading()
        if self._server is not None:
            self._server.pause()

    def resume_writing(self) -> None:
        """Go on."""
        self._writable = True
        if self._server is not None:
            self._server.resume()
        self._work()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Forget everything that was open."""
        if self._server is not None:
            self._server.abort()
            self._server = None
        if self._desk is not None:
            for pending in self._open.values():
                self._desk.abandon(pending)
            self._open.clear()
            self._host.forget(self)

    # --- the server's socket ---------------------------------------------------------------------

    def answered(self, message: bytes) -> None:
        """Take a message of the server."""
        assert self._desk is not None
        number = int.from_bytes(message[:2], "big")
        pending = self._open.get(number)
        if pending is None:
            return
        finished = self._desk.finish(pending, message, time.monotonic())
        if finished is None:
            return
        del self._open[number]
        reply = finished.reply
        self._held_count += 1
        self._host.hold(finished.lesson, lambda: self._deliver(reply))

    def _deliver(self, reply: bytes) -> None:
        self._held_count -= 1
        self._idle_at = time.monotonic()
        self._send(reply)
        self._settled()

    def _settled(self) -> None:
        """Go on after something was answered."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._work()
        if not self._open and not self._held_count and (self._ended or self._draining):
            transport.close()

    def server_lost(self, server: "_ServerStream", reason: str) -> None:
        """Note that the server's connection has ended, or did not come about."""
        if server is self._server:
            self._server = None
            if self._open:
                self._fail_all(reason)

    # --- events of the worker --------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Let time pass."""
        limits = self._host.limits
        assert self._desk is not None
        if self._server is not None:
            self._server.tick(now, limits.connect_timeout_s)
        late = [p for p in self._open.values() if now - p.asked_at >= limits.dns_timeout_s]
        for pending in late:
            del self._open[pending.number]
            self._desk.expire(pending, now)
        if late:
            self._settled()
        if not self._open and not self._held_count:
            if now - self._idle_at >= limits.dns_idle_timeout_s and self._transport is not None:
                self._transport.close()
        elif not self._writable and now - self._idle_at >= limits.dns_idle_timeout_s:
            self._abort()

    def policy_changed(self, now: float) -> None:
        """Reset the connection if it is not redirected for dns rules any more."""
        assert self._desk is not None
        if not self._desk.serves(self.ends, TCP):
            self._abort()
        self._idle_at = max(self._idle_at, now - self._host.limits.dns_idle_timeout_s)

    def drain(self, now: float) -> None:
        """A client that has just connected is still answered."""

    def finish(self, now: float) -> None:  # noqa: ARG002 - as other connections have it
        """Answer what is open, then close."""
        self._draining = True
        self._settled()


class _ServerStream(asyncio.Protocol):
    """The connection to the server, and what waits until there is one."""

    def __init__(self, client: DnsStream, poller: Poller) -> None:
        self._client = client
        self._poller = poller
        self._frames = Frames()
        self._waiting: list[bytes] = []
        self._dialling: socket.socket | None = None
        self._dialled_at = 0.0
        self._transport: Wire | None = None

    # --- until it is open ------------------------------------------------------------------------

    def dial(self, mark: int) -> None:
        """Connect in the client's name, though not from within this call.

        A failure is told as the end of the connection.
        """
        self._dialled_at = time.monotonic()
        try:
            self._dialling = upstream.open_socket(self._client.client, mark)
        except OSError as error:
            self._poller.later(partial(self._give_up, str(error)))
            return
        self._poller.watch(self._dialling.fileno(), WRITE, self)

    def ready(self, events: int) -> None:  # noqa: ARG002 - as any that is watched
        """Connect, or look what became of it."""
        sock = self._dialling
        assert sock is not None
        try:
            if not upstream.connected(sock, self._client.server):
                return
        except OSError as error:
            self._give_up(str(error))
            return
        self._poller.forget(sock.fileno())
        self._dialling = None
        Wire(self._poller, sock, self)

    def fail(self, error: Exception) -> None:
        """End after an error of our own."""
        self._give_up(f"internal error: {error}")

    def tick(self, now: float, timeout_s: float) -> None:
        """Give up a server that does not take the connection."""
        if self._dialling is not None and now - self._dialled_at >= timeout_s:
            self._give_up("connection timed out")

    def _give_up(self, reason: str) -> None:
        self.abort()
        self._client.server_lost(self, reason)

    # --- the server's events ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, Wire)
        self._transport = transport
        for message in self._waiting:
            transport.write(message)
        self._waiting.clear()

    def data_received(self, data: bytes) -> None:
        self._frames.add(data)
        while (message := self._frames.take()) is not None:
            self._client.answered(message)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        self._client.server_lost(self, "the server closed the connection")

    # --- what is asked of it ---------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._transport is None:
            self._waiting.append(data)
        elif not self._transport.is_closing():
            self._transport.write(data)

    def abort(self) -> None:
        if self._dialling is not None:
            self._poller.forget(self._dialling.fileno())
            self._dialling.close()
            self._dialling = None
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()
