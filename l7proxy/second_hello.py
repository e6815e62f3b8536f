"""The ClientHello that a server may ask for again, looked at while TLS passes unread.

A server that likes the hello but not its key share answers HelloRetryRequest, and the client sends
a second hello, in clear text, on the same connection (RFC 8446 4.1.2, 4.1.4). It must be the same
but for the key share; servers need not check that, so a client could say one name to us and another
to them. It may come before the server has asked for it. So, until the server's first message shows
that no second hello is wanted, handshake records of the client are held until they are a whole
hello with the same name; everything else passes at once.
"""

from l7proxy.client_hello import (
    HANDSHAKE,
    HEADER_BYTES,
    HIGHEST_FRAGMENT,
    HelloReader,
    HelloRefused,
)

_CHANGE_CIPHER_SPEC, _ALERT, _APPLICATION_DATA = 20, 21, 23
"""Content types (RFC 8446 B.1)."""

_SERVER_HELLO = 2
_RANDOM = slice(6, 38)
"""In a ServerHello behind its message header and version (RFC 8446 4.1.3)."""

_RETRY_RANDOM = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
"""RFC 8446 4.1.3: SHA-256 of "HelloRetryRequest"."""

_RECORD_BYTES = HIGHEST_FRAGMENT + 256
"""Longest encrypted record (RFC 8446 5.2)."""


class SecondHello:
    """Watches both directions until no second hello can come.

    Args:
        server_name: of the first hello.
        limit_bytes: longest hello with its records.

    Attributes:
        over: nothing needs to be watched any more; whatever comes passes.
    """

    __slots__ = (
        "_body_bytes", "_client", "_hello", "_limit_bytes", "_message", "_seen", "_server",
        "_server_name", "_wanted", "over",
    )  # fmt: skip

    def __init__(self, server_name: str, limit_bytes: int) -> None:
        self._server_name = server_name
        self._limit_bytes = limit_bytes
        self._client = bytearray()
        self._server = bytearray()
        self._message = bytearray()
        self._hello: HelloReader | None = None
        self._body_bytes = 0
        self._seen = False
        self._wanted = False
        self.over = False

    def from_client(self, data: bytes) -> bytes:
        """Take bytes of the client; return what may pass now.

        Raises:
            HelloRefused: a second hello asks for another name, or is none.
        """
        self._client += data
        client = self._client
        passed = bytearray()
        while client and not self.over:
            if self._body_bytes:
                passed += client[: self._body_bytes]
                taken = min(self._body_bytes, len(client))
                self._body_bytes -= taken
                del client[:taken]
            elif client[0] == HANDSHAKE or self._hello is not None:
                if not self._read_hello(passed):
                    break
            elif len(client) < HEADER_BYTES:
                break
            else:
                if client[0] not in (_CHANGE_CIPHER_SPEC, _ALERT, _APPLICATION_DATA):
                    raise HelloRefused("a record of an unknown type before the server's answer")
                self._body_bytes = HEADER_BYTES + (client[3] << 8 | client[4])
                if self._body_bytes > HEADER_BYTES + _RECORD_BYTES:
                    raise HelloRefused("the record's length is not allowed")
        if self.over:
            passed += self.rest()
        return bytes(passed)

    def _read_hello(self, passed: bytearray) -> bool:
        """Read the second hello; False: more is needed."""
        reader = self._hello
        if reader is None:
            self._hello = reader = HelloReader(self._limit_bytes)
        hello = reader.feed(bytes(self._client))
        self._client.clear()
        if hello is None:
            return False
        if hello.server_name != self._server_name:
            raise HelloRefused("the second ClientHello asks for another server name")
        passed += reader.data[: hello.size_bytes]
        self._client += reader.data[hello.size_bytes :]
        self._hello = None
        self._seen = True
        self.over = self._wanted
        return True

    def from_server(self, data: bytes) -> None:
        """Take bytes of the server; `rest` may pass once it is `over`."""
        if self._wanted or self.over:
            return
        server = self._server
        server += data
        while len(server) >= HEADER_BYTES:
            end = HEADER_BYTES + (server[3] << 8 | server[4])
            if server[0] not in (HANDSHAKE, _ALERT) or end > HEADER_BYTES + _RECORD_BYTES:
                self.over = True
                return
            if server[0] == HANDSHAKE:
                # Enough of a long record is enough.
                self._message += server[HEADER_BYTES : min(end, len(server))]
                if len(self._message) >= _RANDOM.stop:
                    self._judge_answer()
                    return
                if len(server) < end:
                    del self._message[-(len(server) - HEADER_BYTES) :]
                    return
            if len(server) < end:
                return
            del server[:end]

    def _judge_answer(self) -> None:
        message = self._message
        self._wanted = message[0] == _SERVER_HELLO and message[_RANDOM] == _RETRY_RANDOM
        self.over = not self._wanted or self._seen
        self._server.clear()
        message.clear()

    def rest(self) -> bytes:
        """Return what was held of the client's bytes; nothing more is held."""
        held = bytes(self._hello.data) if self._hello is not None else b""
        held += bytes(self._client)
        self._hello = None
        self._client.clear()
        return held
