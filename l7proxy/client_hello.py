"""The ClientHello that opens a TLS connection: bytes in, the name the client asks for out.

The hello may be spread over TCP segments and over TLS records down to one byte each, and nothing of
it may have two readings: whatever a server could take for another name than the one that was judged
is refused, so that cutting the bytes elsewhere changes nothing.

    record     22, version 3.x, length 1 to 16384        (RFC 8446 5.1: no empty handshake record)
    message    1, length, and no byte behind it in its last record   (RFC 8446 5.1)
    name       at most one, type host_name; letters, digits, "-", "_" and dots, no trailing dot, no
               address literal, labels of 1 to 63, 253 in all                     (RFC 6066 3)

A hello without the server_name extension is valid and names nobody. SSLv2 hellos are not TLS.
Source: RFC 8446 4.1.2, 4.2, 5.1; RFC 6066 3; RFC 7301 3.1; draft-ietf-tls-esni.
"""

import re
from typing import NamedTuple

HANDSHAKE = 22
"""Content type of the records that carry the handshake (RFC 8446 B.1)."""

HEADER_BYTES = 5
"""Of a record: type, version, length."""

HIGHEST_FRAGMENT = 1 << 14
"""Bytes of one record in clear text (RFC 8446 5.1)."""

_CLIENT_HELLO = 1
_MAJOR_VERSION = 3
_MESSAGE_HEADER_BYTES = 4
_TOO_LONG = "the ClientHello is too long"

_SERVER_NAME = 0
_ALPN = 16
_ENCRYPTED_HELLO = frozenset((0xFE0D, 0xFFCE))
"""encrypted_client_hello, and the encrypted_server_name of its first drafts."""

_HOST_NAME = 0
_NAME = re.compile(
    rb"(?!.{254})(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*"
    rb"(?![0-9]+\Z|0[xX][0-9A-Fa-f]*\Z)[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?",
    re.DOTALL,
)
"""No last label that makes the whole an IPv4 address to some reader (WHATWG URL 3.5)."""


class HelloRefused(Exception):  # noqa: N818 - a refusal is the normal answer to a hostile hello
    """These bytes begin no hello that has one reading; the text says what is wrong."""


class NotTls(HelloRefused):
    """They are no TLS at all: the first byte is that of no handshake record."""


class ClientHello(NamedTuple):
    """What a client says it wants.

    Attributes:
        server_name: in lower case without trailing dot, "" = none.
        protocols: ALPN, in the client's order.
        encrypted: it has an encrypted hello inside (or grease that looks like one), whose name
            cannot be seen.
        size_bytes: of the records that it was in.
    """

    server_name: str
    protocols: tuple[bytes, ...]
    encrypted: bool
    size_bytes: int


class HelloReader:
    """Reads the hello at the start of a client's bytes, each byte once.

    Args:
        limit_bytes: longest hello with its records.

    Attributes:
        data: everything that came, as it came.
    """

    __slots__ = ("_limit_bytes", "_message", "_start", "data")

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._start = 0
        self._message = bytearray()
        self.data = bytearray()

    def feed(self, data: bytes) -> ClientHello | None:
        """Take more bytes; None: still more are needed.

        What comes behind the hello's last record is kept and not looked at.

        Raises:
            NotTls: the first byte is that of another protocol.
            HelloRefused: more bytes would not make it valid.
        """
        self.data += data
        if self.data and self.data[0] != HANDSHAKE:
            raise NotTls("no TLS handshake record")
        message = self._message
        while (fragment := self._fragment()) is not None:
            message += fragment
            if message[0] != _CLIENT_HELLO:
                raise HelloRefused("the first message is no ClientHello")
            if len(message) < _MESSAGE_HEADER_BYTES:
                continue
            size = _MESSAGE_HEADER_BYTES + int.from_bytes(message[1:4], "big")
            if size > self._limit_bytes:
                raise HelloRefused(_TOO_LONG)
            if len(message) > size:
                raise HelloRefused("bytes behind the ClientHello in its record")
            if len(message) == size:
                return _hello(memoryview(bytes(message))[_MESSAGE_HEADER_BYTES:], self._start)
        return None

    def _fragment(self) -> bytes | None:
        """Return what the next record carries, None if it is not complete."""
        start = self._start
        head = self.data[start : start + HEADER_BYTES]
        if head and head[0] != HANDSHAKE:
            raise HelloRefused("another record inside the ClientHello")
        if len(head) >= 2 and head[1] != _MAJOR_VERSION:
            raise HelloRefused("the record's version is no TLS")
        if len(head) < HEADER_BYTES:
            return None
        length = head[3] << 8 | head[4]
        if not 1 <= length <= HIGHEST_FRAGMENT:
            raise HelloRefused("the record's length is not allowed")
        end = start + HEADER_BYTES + length
        if end > self._limit_bytes:
            raise HelloRefused(_TOO_LONG)
        if len(self.data) < end:
            return None
        self._start = end
        return bytes(self.data[start + HEADER_BYTES : end])


class _Reader:
    """Takes fields off the front of a structure; one that is too short is refused."""

    __slots__ = ("_data",)

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def __bool__(self) -> bool:
        return bool(self._data)

    def take(self, size: int) -> memoryview:
        """Take as many bytes."""
        if len(self._data) < size:
            raise HelloRefused("the ClientHello ends inside a field")
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def number(self, size: int) -> int:
        """Take a number of as many bytes, network order."""
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int, low: int = 0) -> memoryview:
        """Take a vector that has its length, of `size` bytes, in front, and at least `low`."""
        taken = self.take(self.number(size))
        if len(taken) < low:
            raise HelloRefused("an empty list in the ClientHello")
        return taken


def _hello(body: memoryview, size_bytes: int) -> ClientHello:
    """Read the body of the message (RFC 8446 4.1.2)."""
    reader = _Reader(body)
    if reader.number(1) != _MAJOR_VERSION:
        raise HelloRefused("the ClientHello's version is no TLS")
    reader.take(1 + 32)  # minor version, random
    if len(reader.vector(1)) > 32:
        raise HelloRefused("the session id is too long")
    if len(reader.vector(2, low=2)) % 2:
        raise HelloRefused("the list of cipher suites is odd")
    reader.vector(1, low=1)  # compression methods
    extensions = _Reader(reader.vector(2) if reader else memoryview(b""))
    if reader:
        raise HelloRefused("bytes behind the extensions")
    seen: set[int] = set()
    name = ""
    protocols: tuple[bytes, ...] = ()
    while extensions:
        kind = extensions.number(2)
        if kind in seen:  # RFC 8446 4.2: no two of one type
            raise HelloRefused("an extension comes twice")
        seen.add(kind)
        value = _Reader(extensions.vector(2))
        if kind == _SERVER_NAME:
            name = _server_name(value)
        elif kind == _ALPN:
            protocols = _protocols(value)
    return ClientHello(name, protocols, not seen.isdisjoint(_ENCRYPTED_HELLO), size_bytes)


def _server_name(value: _Reader) -> str:
    """Read the server_name extension (RFC 6066 3): exactly one name, of the one known type."""
    names = _Reader(value.vector(2, low=1))
    if value:
        raise HelloRefused("bytes behind the list of server names")
    if names.number(1) != _HOST_NAME:
        raise HelloRefused("a server name of an unknown type")
    name = bytes(names.vector(2, low=1))
    if names:
        raise HelloRefused("more than one server name")
    if _NAME.fullmatch(name) is None:
        raise HelloRefused("the server name is no host name")
    return name.decode("ascii").lower()


def _protocols(value: _Reader) -> tuple[bytes, ...]:
    """Read the application_layer_protocol_negotiation extension (RFC 7301 3.1)."""
    names = _Reader(value.vector(2, low=2))
    if value:
        raise HelloRefused("bytes behind the list of protocols")
    found = []
    while names:
        found.append(bytes(names.vector(1, low=1)))
    return tuple(found)
