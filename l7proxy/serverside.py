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
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

from l7proxy.commands import Command
from l7proxy.exchange import Exchange
from l7proxy.greeting import Greeting
from l7proxy.multiplex import Multiplex
from l7proxy.passage import Passage
from l7proxy.secure import SecureTransport
from l7proxy.tunnel import Tunnel

log = logging.getLogger(__name__)

Core = Exchange | Multiplex | Tunnel | Greeting | Passage
"""What decides what happens to a client connection."""

Transport = asyncio.Transport | SecureTransport

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""struct linger: on, 0 seconds; close() then sends RST (socket(7))."""


class Owner(Protocol):
    """The client's connection."""

    exchange: Core | None

    def perform(self, commands: list[Command]) -> None:
        """Do what the core asks for, in order."""
        ...


class TlsError(Exception):
    """There is no TLS with the server; the text says why."""


class UpstreamConnection(asyncio.Protocol):
    """The connection to the server; silent once its owner has closed it.

    A server may speak first, as one of HTTP/2 does, and before the owner has heard that there is a
    connection; what it does until then is kept for `begin`.
    """

    __slots__ = ("_closed", "_early", "_link", "_owner", "_transport")

    def __init__(self, owner: Owner, link: int) -> None:
        self._owner = owner
        self._link = link
        self._transport: Transport | None = None
        self._closed = False
        self._early: list[Callable[[], object]] | None = []

    def begin(self) -> None:
        """Pass on what the server has done already, and at once whatever it does from now on."""
        early, self._early = self._early, None
        for event in early or ():
            event()

    @property
    def _exchange(self) -> Core | None:
        return None if self._closed else self._owner.exchange

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    @property
    def local_port(self) -> int:
        """Our port, 0 if the connection is gone already."""
        ours = self._transport.get_extra_info("sockname") if self._transport is not None else None
        return ours[1] if ours else 0

    async def begin_tls(self, context: ssl.SSLContext, name: str) -> str:
        """Speak TLS with a server that must prove to be `name`, a host or an address.

        Returns:
            What ALPN chose, or "".

        Raises:
            TlsError: there is none; the connection is of no use.
        """
        raw = self._transport
        assert raw is not None
        assert not isinstance(raw, SecureTransport)
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def failed(reason: str) -> None:
            if not done.done():
                done.set_exception(TlsError(reason))

        def ready(protocol: str) -> None:
            if not done.done():
                done.set_result(protocol)

        try:
            self._transport = secure = SecureTransport(
                raw, self, context, server_side=False, server_name=name, ready=ready, failed=failed
            )
        except ValueError as error:  # no name that a certificate could have
            raise TlsError(str(error)) from None
        secure.start(b"")
        return await done

    def data_received(self, data: bytes) -> None:
        """Pass bytes of the server on."""
        if self._early is not None:
            self._early.append(partial(self.data_received, data))
            return
        owner = self._owner
        if not self._closed and (exchange := owner.exchange) is not None:
            owner.perform(exchange.upstream_data(data, time.monotonic(), self._link))

    def eof_received(self) -> bool:
        """Pass the server's FIN on; True: the exchange says when to close."""
        if self._early is not None:
            self._early.append(self.eof_received)
            return True
        if (exchange := self._exchange) is not None:
            self._owner.perform(exchange.upstream_ended(time.monotonic(), self._link))
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass the loss on, unless it was our doing."""
        if self._early is not None:
            self._early.append(partial(self.connection_lost, exc))
            return
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
        """Close; whatever the server still says is not heard."""
        self._closed = True
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
