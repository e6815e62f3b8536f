"""Tiny HTTP servers wherever checks are addressed to: whoever gets through gets `200 OK`.

One thread serves all of them; what asks politely is answered, everything else is closed. Who begins
with TLS is answered inside it, with a certificate for the name, or the address, that it asks for.
"""

import selectors
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress

from lab.laboratory import Machine
from policytest.layer import Layer

_POLL_S = 0.02
_HEAD_BYTES = 65_536
_HANDSHAKE = b"\x16"
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\nok\n"


class _Client:
    """A connection: what came of the next head, and the TLS that it is spoken in."""

    def __init__(self) -> None:
        self.head = b""
        self.layer: Layer | None = None


class Servers:
    """Listening sockets in the hosts, and the thread that answers everything with 200.

    Args:
        identity: makes a server's TLS context for a name or an address.
    """

    def __init__(self, identity: Callable[[str], ssl.SSLContext]) -> None:
        self._identity = identity
        self._selector = selectors.DefaultSelector()
        self._listening: set[tuple[str, int, int]] = set()
        self._clients: dict[socket.socket, _Client] = {}
        self._lock = threading.Lock()
        self._ending = False
        self._thread = threading.Thread(target=self._serve, name="http servers", daemon=True)
        self._thread.start()

    def listen(self, machine: Machine, family: int, port: int) -> None:
        """Have a machine listen on a port, for AF_INET or AF_INET6."""
        if (machine.name, family, port) in self._listening:
            return
        server = machine.open_socket(family, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        server.bind(("", port))
        server.listen(512)
        server.setblocking(False)
        self._listening.add((machine.name, family, port))
        with self._lock:
            self._selector.register(server, selectors.EVENT_READ, True)

    def _serve(self) -> None:
        while not self._ending:
            for key, _ in self._selector.select(_POLL_S):
                opened = key.fileobj
                assert isinstance(opened, socket.socket)
                with suppress(OSError):
                    if key.data:
                        self._accept(opened)
                    else:
                        self._answer(opened)

    def _accept(self, server: socket.socket) -> None:
        client, _ = server.accept()
        client.setblocking(False)
        self._clients[client] = _Client()
        with self._lock:
            self._selector.register(client, selectors.EVENT_READ, False)

    def _answer(self, sock: socket.socket) -> None:
        client = self._clients[sock]
        try:
            data = sock.recv(_HEAD_BYTES)
            if data and client.layer is None and not client.head and data[:1] == _HANDSHAKE:
                client.layer = Layer(self._context(sock.getsockname()[0]))
            inside = client.layer.feed(data) if data and client.layer is not None else data
        except OSError:  # of TLS too
            data = inside = b""
        client.head += inside
        if not data or len(client.head) > _HEAD_BYTES:
            self._end(sock)
            return
        count = client.head.count(b"\r\n\r\n")
        client.head = client.head.rpartition(b"\r\n\r\n")[2]
        if client.layer is None:
            sock.send(_ANSWER * count)
            return
        if count:
            client.layer.say(_ANSWER * count)
        sock.send(client.layer.take())

    def _context(self, address: str) -> ssl.SSLContext:
        """Return a context that shows the certificate for whoever is asked for."""
        context = self._identity(address)

        def choose(
            side: ssl.SSLSocket | ssl.SSLObject, name: str | None, _: ssl.SSLContext
        ) -> None:
            if name is not None:
                side.context = self._identity(name)

        context.sni_callback = choose
        return context

    def _end(self, sock: socket.socket) -> None:
        del self._clients[sock]
        with self._lock:
            self._selector.unregister(sock)
        sock.close()

    def close(self) -> None:
        """Stop serving."""
        self._ending = True
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()
