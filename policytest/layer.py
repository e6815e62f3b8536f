"""TLS on a socket that must not block: bytes of the one side in, bytes of the other side out."""

import ssl


class Layer:
    """One end of a TLS connection.

    Args:
        context: of this end.
        server_name: what a client asks for, "" = it names nobody; None: this end is the server's.

    Attributes:
        done: the handshake is.
    """

    def __init__(self, context: ssl.SSLContext, server_name: str | None = None) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._side = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_name is None,
            server_hostname=server_name or None,
        )
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """Take what the socket received, b"" to begin; return what was said inside.

        Raises:
            ssl.SSLError: the other end speaks no TLS, or ends it.
        """
        self._incoming.write(data)
        said = b""
        try:
            if not self.done:
                self._side.do_handshake()
                self.done = True
            while more := self._side.read(65_536):
                said += more
        except ssl.SSLWantReadError:
            pass
        return said

    def say(self, data: bytes) -> None:
        """Say something inside, once the handshake is done."""
        self._side.write(data)

    def take(self) -> bytes:
        """Return what the socket must send."""
        return self._outgoing.read()
