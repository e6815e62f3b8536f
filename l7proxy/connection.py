"""The shell around an exchange: two sockets, and the commands performed on them.

Every event of the sockets goes to the exchange and what it asks for is done at once, in order. A
command may cause another event while it is performed (a full buffer); its commands wait until the
list at hand is done. Nothing is decided here.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import msgspec

from conntrack.address import format_address
from firewall.policy.course import CLEAR, HTTP
from l7proxy import refusals
from l7proxy.accesslog import Ends, SocketAddress
from l7proxy.certificates import CertificateError, Certificates
from l7proxy.client_hello import ClientHello
from l7proxy.commands import (
    CloseClient,
    CloseUpstream,
    Command,
    ConnectFailure,
    Count,
    Enter,
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
    ShutdownUpstream,
)
from l7proxy.exchange import Exchange
from l7proxy.frames import PREFACE_LINE
from l7proxy.greeting import Greeting
from l7proxy.heads import Heads
from l7proxy.judgement import Judge
from l7proxy.limits import Limits
from l7proxy.metrics import Metrics
from l7proxy.multiplex import Multiplex
from l7proxy.passage import Passage
from l7proxy.poller import Poller
from l7proxy.refusals import Refusal
from l7proxy.second_hello import SecondHello
from l7proxy.secure import SecureTransport
from l7proxy.serverside import (
    Relay,
    TowardsServer,
    Transport,
    UpstreamConnection,
    reset_on_close,
)
from l7proxy.shares import Shares
from l7proxy.tunnel import Tunnel
from l7proxy.wire import Wire

log = logging.getLogger(__name__)


class Host(Protocol):
    """What a connection needs of its worker."""

    limits: Limits
    heads: Heads
    metrics: Metrics
    certificates: Certificates
    poller: Poller
    mark: int
    upstreams: Shares
    handshakes: Shares

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
    """One redirected connection and, behind it, the one to its server.

    Args:
        host: the worker.
        client: the peer's address.
        server: the original destination.
        ends: the same, as records have it.
    """

    __slots__ = (
        "_admitted",
        "_begun",
        "_close_at",
        "_course",
        "_greeting",
        "_host",
        "_judge",
        "_leave_at",
        "_leaving",
        "_performing",
        "_queue",
        "_shaking_hands",
        "_sni",
        "_transport",
        "_transport_failure",
        "_upstreams",
        "client",
        "ends",
        "exchange",
        "server",
    )

    def __init__(
        self, host: Host, client: SocketAddress, server: SocketAddress, ends: Ends
    ) -> None:
        self._host = host
        self._transport: Transport | None = None
        self._course = HTTP
        self._sni: str | None = None
        self._shaking_hands = False
        self._transport_failure = ""
        self._upstreams: dict[int, UpstreamConnection] = {}
        self._judge: Judge | None = None
        self._begun: bytes | None = b""
        self._queue: list[Command] = []
        self._performing = False
        self._admitted = False
        self._close_at = float("inf")
        self._leave_at = float("inf")
        self._leaving = False
        self.client = client
        self.server = server
        self.ends = ends
        self._greeting: Greeting | None = None
        self.exchange: Relay | None = None

    # --- the client's socket ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Judge the connection before anything is read from it."""
        assert isinstance(transport, Wire)
        self._transport = transport
        limits = self._host.limits
        transport.set_write_buffer_limits(high=limits.buffer_bytes)
        self._admitted = True
        judge = self._host.admit(self)
        if judge is None:
            self._close(reset=True)
            return
        now = time.monotonic()
        self._judge = judge
        if limits.connection_duration_s:
            self._leave_at = now + limits.connection_duration_s
        if judge.looks:
            self._begun = None
            self._greeting = Greeting(judge, limits, now)
            self.perform(self._greeting.start(now))
            return
        judge.take(CLEAR)
        host = self._host
        self.exchange = Exchange(judge, limits, host.new_request_id, now, host.heads)
        if not judge.connection().connected:  # else the event, which costs more, says nothing
            self.perform(self.exchange.policy_changed(now))

    def data_received(self, data: bytes) -> None:
        """Pass bytes of the client on."""
        if self._begun is not None:
            data = self._choose(data)
        if (core := self._core) is not None:
            self.perform(core.client_data(data, time.monotonic()))

    @property
    def _core(self) -> Relay | Greeting | None:
        """What the client's events go to."""
        return self.exchange or self._greeting

    def _choose(self, data: bytes) -> bytes:
        """Serve HTTP/2 if the first bytes are its preface; return what to pass on.

        While they may still become it, the exchange for HTTP/1 has them too: no part of the
        preface's first line makes it do anything.
        """
        assert self._begun is not None
        begun = self._begun + data
        if begun.startswith(PREFACE_LINE) and self._judge is not None:
            self._begun = None
            self.exchange = self._multiplex(self._judge, time.monotonic())
            return begun
        self._begun = begun if PREFACE_LINE.startswith(begun) else None
        return data

    def _multiplex(self, judge: Judge, now: float) -> Multiplex:
        """Return what serves HTTP/2."""
        host, limits, scheme = self._host, self._host.limits, b"http"
        if self._course.originate is not None:
            scheme = b"https"
            if limits.h2_upstream == "auto":
                limits = replace(limits, h2_upstream="prefer")  # ALPN tells at no risk
        return Multiplex(judge, limits, host.new_request_id, now, scheme)

    def eof_received(self) -> bool:
        """Pass the client's FIN on; True: the transport stays open for our answers."""
        if (core := self._core) is not None:
            self.perform(core.client_ended(time.monotonic()))
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Pass the end of the client's connection on, and end everything behind it."""
        if (core := self._core) is not None:
            self.perform(core.client_lost(time.monotonic()))
        if self._admitted:
            self._shaken(done=False)
            self._host.forget(self)

    def pause_writing(self) -> None:
        """Pass on that the client reads too slowly."""
        if (core := self._core) is not None:
            self.perform(core.client_blocked(blocked=True, now=time.monotonic()))

    def resume_writing(self) -> None:
        """Pass on that the client has caught up."""
        if (core := self._core) is not None:
            self.perform(core.client_blocked(blocked=False, now=time.monotonic()))

    # --- events of the worker --------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Let time pass; called a few times a second."""
        if (core := self._core) is not None and now >= core.deadline:
            self.perform(core.tick(now))
        if now >= self._leave_at:
            self._leave(now)
        if now >= self._close_at and self._transport is not None:
            self._transport.abort()

    def _leave(self, now: float) -> None:
        """End a connection that has lasted long enough: announce it, then take nothing more."""
        self._leave_at = float("inf")
        if self._leaving:
            self.finish(now)
            return
        self._leaving = True
        self._leave_at = now + self._host.limits.drain_gap_s
        self._host.metrics.add("http_downstream_cx_max_duration_reached")
        self.drain(now)

    def policy_changed(self, now: float) -> None:
        """End the connection if the snapshot in force forbids it."""
        if (core := self._core) is not None:
            self.perform(core.policy_changed(now))

    def finish(self, now: float) -> None:
        """Take no further request."""
        if (core := self._core) is not None:
            self.perform(core.finish(now))

    def drain(self, now: float) -> None:
        """Finish what has begun, then close."""
        if (core := self._core) is not None:
            self.perform(core.drain(now))

    # --- commands --------------------------------------------------------------------------------

    def perform(self, commands: list[Command]) -> None:
        """Do what the exchange asks for, in order."""
        if self._performing:
            self._queue.extend(commands)
            return
        self._performing = True
        table = self.PERFORM
        try:
            while commands:
                for command in commands:
                    table[type(command)](self, command)
                commands = self._queue
                if commands:
                    self._queue = []
        finally:
            self._performing = False

    def _send_client(self, command: SendClient) -> None:
        assert self._transport is not None
        self._transport.write(command.data)

    def _send_upstream(self, command: SendUpstream) -> None:
        if (connection := self._upstreams.get(command.link)) is not None:
            connection.write(command.data)

    def _log(self, command: Log) -> None:
        record = command.record
        if self._course is not HTTP:
            record = self._completed(record)
        self._host.report(record, self.ends)

    def _shutdown_client(self, _: ShutdownClient) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.write_eof()

    def _close_client(self, command: CloseClient) -> None:
        self.exchange = self._greeting = None
        self._close(reset=command.reset)

    def _pause_client(self, _: PauseClient) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def _resume_client(self, _: ResumeClient) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def _pause_upstream(self, command: PauseUpstream) -> None:
        if (connection := self._upstreams.get(command.link)) is not None:
            connection.pause()

    def _resume_upstream(self, command: ResumeUpstream) -> None:
        if (connection := self._upstreams.get(command.link)) is not None:
            connection.resume()

    def _shutdown_upstream(self, command: ShutdownUpstream) -> None:
        if (connection := self._upstreams.get(command.link)) is not None:
            connection.shutdown()

    def _count(self, command: Count) -> None:
        self._host.metrics.add(command.name)

    def _hand_over(self, command: HandOver) -> None:
        assert self._judge is not None
        now = time.monotonic()
        ongoing, early = command.ongoing, command.early
        self.exchange = tunnel = Tunnel(self._judge, self._host.limits, ongoing, early, now)
        self._queue.extend(tunnel.start(command.head, now))

    # --- TLS -------------------------------------------------------------------------------------

    def _enter(self, command: Enter) -> None:
        """Go on as a greeting says: at once, or once TLS with the client stands."""
        self._course = course = command.course
        hello, data = command.hello, command.data
        self._sni = None if hello is None else hello.server_name
        if course.terminate is None:
            self._serve(hello, data, "")
            return
        greeting, transport, now = self._greeting, self._transport, time.monotonic()
        assert greeting is not None
        assert isinstance(transport, Wire)
        if not self._host.handshakes.take(self.ends.source):
            self.perform(greeting.failed(refusals.TLS_OVERFLOW, now))
            return
        self._shaking_hands = True
        try:
            context = self._host.certificates.towards_clients(course.terminate, http=course.http)
        except CertificateError as error:
            self.perform(greeting.failed(_because(refusals.TLS_SECRET, str(error)), now))
            return
        self._transport = secure = SecureTransport(
            transport, self, context, server_side=True, ready=self._secured, failed=self._insecure
        )
        secure.start(data)

    def _secured(self, protocol: str) -> None:
        """Take that TLS with the client stands, with this protocol of ALPN in it or ""."""
        self._shaken(done=True)
        if self._greeting is not None:
            self._serve(None, b"", protocol)

    def _insecure(self, reason: str) -> None:
        """Take that there will be no TLS with the client."""
        if self._greeting is not None:
            refusal = _because(refusals.TLS_HANDSHAKE, reason)
            self.perform(self._greeting.failed(refusal, time.monotonic()))

    def _shaken(self, *, done: bool) -> None:
        if self._shaking_hands:
            self._shaking_hands = False
            self._host.handshakes.give_back(self.ends.source)
            self._host.metrics.add("ssl_handshake" if done else "ssl_connection_error")

    def _serve(self, hello: ClientHello | None, data: bytes, protocol: str) -> None:
        """Begin to serve; `data` came first."""
        host, judge, course, now = self._host, self._judge, self._course, time.monotonic()
        assert judge is not None
        self._greeting = None
        if not course.http:
            secure = hello is not None or course.terminate is not None
            watch = None
            if hello is not None:
                watch = SecondHello(hello.server_name, host.limits.client_hello_bytes)
            name = "TLS" if secure else "TCP"
            self.exchange = passage = Passage(judge, host.limits, name, watch, now)
            self.perform(passage.start(hello.size_bytes if hello is not None else 0, data, now))
            return
        if protocol == "h2":
            self.exchange = self._multiplex(judge, now)
        else:
            self.exchange = Exchange(
                judge, host.limits, host.new_request_id, now, host.heads,
                secure=course.terminate is not None,
            )  # fmt: skip
        self._begun = None if protocol else b""
        self.perform(self.exchange.policy_changed(now))
        if data:
            self.data_received(data)

    def _completed(self, record: Record) -> Record:
        """Add what only this shell knows of a record's connection."""
        failure = self._transport_failure if record.detail == refusals.UPSTREAM_TLS.detail else ""
        tls = self._sni is not None or self._course.terminate is not None
        name = self._sni or record.server_name
        return msgspec.structs.replace(record, tls=tls, server_name=name, transport_failure=failure)

    # --- ends ------------------------------------------------------------------------------------

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

    def _open_upstream(self, command: OpenUpstream) -> None:
        link, http2 = command.link, command.http2
        connection = UpstreamConnection(self, link)
        if not self._host.upstreams.take(self.ends.source):
            self.upstream_failed(connection, ConnectFailure.OVERFLOW, "there are too many")
            return
        self._upstreams[link] = connection
        secure: TowardsServer | None = None
        if (row := self._course.originate) is not None:
            offered = ("h2", "http/1.1") if http2 else ("http/1.1",)
            try:
                context = self._host.certificates.towards_servers(
                    row, offered if self._course.http else ()
                )
            except CertificateError as error:
                self.upstream_failed(connection, ConnectFailure.TLS, str(error))
                return
            assert self._judge is not None
            name = self._judge.server_name or format_address(self.ends.destination)
            secure = TowardsServer(context, name, http2)
        connection.dial(self._host.poller, self.client, self.server, self._host.mark, secure)

    def upstream_opened(self, connection: UpstreamConnection) -> None:
        """Use a connection to the server."""
        ends = self.ends  # not _replace, which takes three times as long
        self.ends = Ends(*ends[:4], connection.local_port, ends.connection_id, ends.begun_at)
        self._host.metrics.upstream_opened()
        if connection.secure:
            self._host.metrics.add("upstream_ssl_handshake")
        assert self.exchange is not None
        self.perform(self.exchange.upstream_opened(time.monotonic(), connection.link))

    def upstream_failed(
        self, connection: UpstreamConnection, failure: ConnectFailure, reason: str
    ) -> None:
        """Do without."""
        log.debug("no connection to %s: %s", self.server, reason)
        if self._upstreams.get(connection.link) is connection:
            del self._upstreams[connection.link]
            self._host.upstreams.give_back(self.ends.source)
        if failure is ConnectFailure.TLS:
            self._transport_failure = reason
            self._host.metrics.add("upstream_ssl_connection_error")
        assert self.exchange is not None
        self.perform(self.exchange.upstream_failed(failure, time.monotonic(), connection.link))

    def _close_upstream(self, command: CloseUpstream) -> None:
        connection = self._upstreams.pop(command.link, None)
        if connection is not None:
            self._host.upstreams.give_back(self.ends.source)
            if connection.opened:
                self._host.metrics.upstream_closed()
            connection.close(reset=command.reset)

    PERFORM: ClassVar[dict[type[Command], Callable[["ClientConnection", Any], None]]] = {
        SendClient: _send_client,
        SendUpstream: _send_upstream,
        Log: _log,
        OpenUpstream: _open_upstream,
        CloseUpstream: _close_upstream,
        ShutdownUpstream: _shutdown_upstream,
        ShutdownClient: _shutdown_client,
        CloseClient: _close_client,
        PauseClient: _pause_client,
        ResumeClient: _resume_client,
        PauseUpstream: _pause_upstream,
        ResumeUpstream: _resume_upstream,
        HandOver: _hand_over,
        Enter: _enter,
        Count: _count,
    }
    """How each command is performed. A table, because a request makes four: asked in turn, each
    class would take 0.1 us to say no (msgspec's metaclass does not take Python's short way)."""


def _because(refusal: Refusal, reason: str) -> Refusal:
    return refusal._replace(detail=f"{refusal.detail}{{{reason}}}")
