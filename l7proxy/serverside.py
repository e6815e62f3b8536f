"""The connection to a server as the client's connection has it: events in, bytes out.

Every event goes to the core that serves the client at this moment, and what that asks for is done
by the owner. TLS, where it is spoken, is a layer below: `l7proxy.secure`.
"""

import asyncio
import logging
import socket
import ssl
import struct
import time
from typing import NamedTuple, Protocol

from l7proxy import upstream
from l7proxy.accesslog import SocketAddress
from l7proxy.commands import Command, ConnectFailure
from l7proxy.exchange import Exchange
from l7proxy.multiplex import Multiplex
from l7proxy.passage import Passage
from l7proxy.poller import WRITE, Poller
from l7proxy.secure import SecureTransport
from l7proxy.tunnel import Tunnel
from l7proxy.wire import Wire

log = logging.getLogger(__name__)

Relay = Exchange | Multiplex | Tunnel | Passage
"""What decides what happens to a client connection that is served."""

Transport = asyncio.Transport | SecureTransport

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""struct linger: on, 0 seconds; close() then sends RST (socket(7))."""


class Owner(Protocol):
    """The client's connection."""

    exchange: Relay | None

    def perform(self, commands: list[Command]) -> None:
        """Do what the core asks for, in order."""
        ...

    def upstream_opened(self, connection: "UpstreamConnection") -> None:
        """Take that the connection can be used."""
        ...

    def upstream_failed(
        self, connection: "UpstreamConnection", failure: ConnectFailure, reason: str
    ) -> None:
        """Take that there is none, for a reason that `failure` is a kind of."""
        ...


class TowardsServer(NamedTuple):
    """TLS with a server that must prove to be `name`, a host or an address.

    `http2`: ALPN must choose it, or the connection is of no use.
    """

    context: ssl.SSLContext
    name: str
    http2: bool


class UpstreamConnection(asyncio.Protocol):
    """The connection to the server; silent once its owner has closed it.

    Attributes:
        link: as below.
        local_port: ours, 0 until the socket is connected.
        opened: the owner was told that it can be used.

    Args:
        owner: told of everything, and at once.
        link: the number that the core knows the connection by.
    """

    __slots__ = (
        "_closed", "_dialling", "_owner", "_poller", "_secure", "_server", "_transport", "link",
        "local_port", "opened",
    )  # fmt: skip

    def __init__(self, owner: Owner, link: int) -> None:
        self._owner = owner
        self._transport: Transport | None = None
        self._closed = False
        self._dialling: socket.socket | None = None
        self._poller: Poller | None = None
        self._secure: TowardsServer | None = None
        self._server: SocketAddress = ("", 0)
        self.link = link
        self.local_port = 0
        self.opened = False

    # --- until it is open ------------------------------------------------------------------------

    def dial(
        self,
        poller: Poller,
        client: SocketAddress,
        server: SocketAddress,
        mark: int,
        secure: TowardsServer | None = None,
    ) -> None:
        """Connect in the client's name, and speak TLS if that is wanted.

        The owner is told how it ended: `upstream_opened` or `upstream_failed`, maybe at once.
        """
        self._poller, self._server, self._secure = poller, server, secure
        try:
            self._dialling = sock = upstream.open_socket(client, mark)
            if not upstream.connected(sock, server):
                poller.watch(sock.fileno(), WRITE, self)
                return
        except OSError as error:
            self._fail_to_connect(error)
        else:
            self._connected(poller, sock)

    def ready(self, events: int) -> None:  # noqa: ARG002 - as any that is watched
        """Look what became of connecting."""
        sock, poller = self._dialling, self._poller
        assert sock is not None
        assert poller is not None
        try:
            if not upstream.connected(sock, self._server):
                return
        except OSError as error:
            self._fail_to_connect(error)
            return
        poller.forget(sock.fileno())
        self._connected(poller, sock)

    def fail(self, error: Exception) -> None:
        """End after an error of our own."""
        self._give_up(ConnectFailure.REFUSED, f"internal error: {error}")

    def _connected(self, poller: Poller, sock: socket.socket) -> None:
        self._dialling = None
        self.local_port = sock.getsockname()[1]
        wire = Wire(poller, sock, self)
        if self._secure is None:
            self._open()
            return
        try:
            self._transport = layer = SecureTransport(
                wire,
                self,
                self._secure.context,
                server_side=False,
                server_name=self._secure.name,
                ready=self._secured,
                failed=self._insecure,
            )
        except ValueError as error:  # no name that a certificate could have
            self._insecure(str(error))
        else:
            layer.start(b"")

    def _secured(self, protocol: str) -> None:
        """Take that TLS stands, with this protocol of ALPN in it or ""."""
        assert self._secure is not None
        if self._closed:
            return
        if self._secure.http2 and protocol != "h2":
            self._give_up(ConnectFailure.NO_HTTP2, "the server speaks no HTTP/2")
        else:
            self._open()

    def _open(self) -> None:
        self.opened = True
        self._owner.upstream_opened(self)

    @property
    def secure(self) -> bool:
        """Whether TLS is spoken on it."""
        return self._secure is not None

    def _insecure(self, reason: str) -> None:
        """Take that there will be no TLS."""
        if not self._closed:
            self._give_up(ConnectFailure.TLS, reason)

    def _fail_to_connect(self, error: OSError) -> None:
        late = isinstance(error, TimeoutError)
        self._give_up(ConnectFailure.TIMEOUT if late else ConnectFailure.REFUSED, str(error))

    def _give_up(self, failure: ConnectFailure, reason: str) -> None:
        self.close(reset=True)
        self._owner.upstream_failed(self, failure, reason)

    # --- the server's events ---------------------------------------------------------------------

    @property
    def _exchange(self) -> Relay | None:
        return None if self._closed else self._owner.exchange

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, Wire)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Pass bytes of the server on."""
        owner = self._owner
        if not self._closed and (exchange := owner.exchange) is not None:
            owner.perform(exchange.upstream_data(data, time.monotonic(), self.link))

    def eof_received(self) -> bool:
        """Pass the server's FIN on; True: the exchange says when to close."""
        if (exchange := self._exchange) is not None:
            self._owner.perform(exchange.upstream_ended(time.monotonic(), self.link))
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Pass the loss on, unless it was our doing."""
        if (exchange := self._exchange) is not None:
            self._owner.perform(exchange.upstream_lost(time.monotonic(), self.link))

    def pause_writing(self) -> None:
        """Pass on that the server reads too slowly."""
        if (exchange := self._exchange) is not None:
            commands = exchange.upstream_blocked(True, time.monotonic(), self.link)
            self._owner.perform(commands)

    def resume_writing(self) -> None:
        """Pass on that the server has caught up."""
        if (exchange := self._exchange) is not None:
            commands = exchange.upstream_blocked(False, time.monotonic(), self.link)
            self._owner.perform(commands)

    # --- commands --------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send to the server."""
        if self._transport is not None:
            self._transport.write(data)

    def shutdown(self) -> None:
        """Send FIN after what was sent."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write_eof()

    def pause(self) -> None:
        """Read nothing more for now."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def close(self, *, reset: bool) -> None:
        """Close, or stop connecting; whatever the server still says is not heard."""
        self._closed = True
        if self._dialling is not None:
            assert self._poller is not None
            self._poller.forget(self._dialling.fileno())
            self._dialling.close()
            self._dialling = None
        if self._transport is None:
            return
        if reset:
            reset_on_close(self._transport)
            self._transport.abort()
        else:
            self._transport.close()


def reset_on_close(transport: Transport) -> None:
    """Have the kernel send RST instead of FIN when this transport is closed."""
    sock = transport.get_extra_info("socket")
    if sock is not None and not transport.is_closing():
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        except OSError:
            log.debug("connection already gone")
