"""Tiny HTTP servers wherever checks are addressed to: whoever gets through gets `200 OK`.

One thread serves all of them; what asks politely is answered, everything else is closed.
"""

import selectors
import socket
import threading
from contextlib import suppress

from lab.laboratory import Machine

_POLL_S = 0.02
_HEAD_BYTES = 65_536
_HANDSHAKE = b"\x16"
_ALERT = b"\x15\x03\x03\x00\x02\x02\x28"
"""handshake_failure (RFC 8446 6.2): enough to show that a hello got through."""
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\nok\n"


class Servers:
    """Listening sockets in the hosts, and the thread that answers everything with 200."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._listening: set[tuple[str, int, int]] = set()
        self._heads: dict[socket.socket, bytes] = {}
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
        self._heads[client] = b""
        with self._lock:
            self._selector.register(client, selectors.EVENT_READ, False)

    def _answer(self, client: socket.socket) -> None:
        try:
            data = client.recv(_HEAD_BYTES)
        except OSError:
            data = b""
        head = self._heads[client] + data
        if not data or len(head) > _HEAD_BYTES:
            del self._heads[client]
            with self._lock:
                self._selector.unregister(client)
            client.close()
            return
        if head.startswith(_HANDSHAKE):
            client.send(_ALERT)
            return
        count = head.count(b"\r\n\r\n")
        self._heads[client] = head.rpartition(b"\r\n\r\n")[2]
        if count:
            client.send(_ANSWER * count)

    def close(self) -> None:
        """Stop serving."""
        self._ending = True
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()
