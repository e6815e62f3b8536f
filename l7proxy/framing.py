"""Where a body ends: the one reading of the framing fields, and readers that follow it.

`Framing` says how a message is delimited. A reader takes bytes and gives back the payload and what
follows the message; `done` tells that the message is complete. What is sent on is framed anew from
`Framing` and payload: chunk extensions and trailers end here.

Requests that could be read in two ways are refused rather than repaired, although RFC 9112 6.3
would allow some repairs: Content-Length with Transfer-Encoding, several of either, even equal
ones, any coding but `chunked`, Transfer-Encoding in HTTP/1.0.
Source: RFC 9112 6 and 7; RFC 9110 6.4.1, 8.6.
"""

from enum import IntEnum
from typing import NamedTuple

from l7proxy import grammar, refusals
from l7proxy.limits import Limits
from l7proxy.refusals import Refusal, RequestRefused, ResponseRefused


class Delimiter(IntEnum):
    """What ends a message body."""

    NONE = 0
    LENGTH = 1
    CHUNKED = 2
    CLOSE = 3


class Framing(NamedTuple):
    """How a body is delimited; `length` counts its bytes for LENGTH, else 0."""

    delimiter: Delimiter
    length: int = 0


_LENGTH = Delimiter.LENGTH
NO_BODY = Framing(Delimiter.NONE)
CHUNKED = Framing(Delimiter.CHUNKED)
UNTIL_CLOSE = Framing(Delimiter.CLOSE)


class FramingFault(Exception):  # noqa: N818 - becomes a refusal at once
    """The body breaks its framing; `refusal` is the answer if the message is a request."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.detail)
        self.refusal = refusal


def request_framing(lengths: list[bytes], codings: list[bytes], minor: int) -> Framing:
    """Return the framing of a request from all its Content-Length and Transfer-Encoding values.

    Raises:
        RequestRefused: there is more than one reading.
    """
    if codings:
        if lengths:
            raise RequestRefused(refusals.LENGTH_AND_CHUNKED)
        # RFC 9112 6.1: in HTTP/1.0 the framing must be treated as faulty.
        if len(codings) > 1 or codings[0].lower() != b"chunked" or minor == 0:
            raise RequestRefused(refusals.TRANSFER_ENCODING)
        return CHUNKED
    if not lengths:
        return NO_BODY
    if len(lengths) > 1 or grammar.content_length.fullmatch(lengths[0]) is None:
        raise RequestRefused(refusals.LENGTH)
    return Framing(_LENGTH, int(lengths[0]))


def response_framing(
    method: bytes, status: int, minor: int, lengths: list[bytes], codings: list[bytes]
) -> Framing:
    """Return the framing of a final response to a request with `method`.

    `lengths` and `codings` are all its Content-Length and Transfer-Encoding values.

    Raises:
        ResponseRefused: there is more than one reading.
    """
    if len(lengths) > 1 or (lengths and grammar.content_length.fullmatch(lengths[0]) is None):
        raise ResponseRefused(refusals.UPSTREAM_PROTOCOL)
    if codings and (lengths or len(codings) > 1 or codings[0].lower() != b"chunked" or minor == 0):
        raise ResponseRefused(refusals.UPSTREAM_PROTOCOL)
    if method == b"HEAD" or status in _BODILESS:
        return NO_BODY
    if codings:
        return CHUNKED
    return Framing(_LENGTH, int(lengths[0])) if lengths else UNTIL_CLOSE


_BODILESS = frozenset((204, 304))
"""RFC 9112 6.3, 1."""


class LengthReader:
    """Counts down a body of known length; the payload is handed on without a look at it."""

    __slots__ = ("remaining",)

    def __init__(self, length: int) -> None:
        self.remaining = length

    @property
    def done(self) -> bool:
        """Whether the last byte was read."""
        return self.remaining == 0

    def read(self, data: bytes) -> tuple[bytes, bytes]:
        """Return (payload, what follows the message)."""
        size = len(data)
        if size <= self.remaining:
            self.remaining -= size
            return data, b""
        payload, rest = data[: self.remaining], data[self.remaining :]
        self.remaining = 0
        return payload, rest


class CloseReader:
    """Everything until the sender closes is payload; the exchange ends it at the close."""

    __slots__ = ("done",)

    def __init__(self) -> None:
        self.done = False

    def read(self, data: bytes) -> tuple[bytes, bytes]:
        """Return (payload, nothing)."""
        return data, b""


class _Part(IntEnum):
    """What a chunked body continues with."""

    SIZE = 0
    DATA = 1
    DATA_END = 2
    TRAILER = 3
    DONE = 4


class ChunkedReader:
    """Decodes chunks (RFC 9112 7.1) with bounded memory; extensions and trailers are dropped."""

    __slots__ = ("_extension_bytes", "_limits", "_line", "_part", "_remaining", "_trailer_bytes")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._part = _Part.SIZE
        self._line = b""
        self._remaining = 0
        self._extension_bytes = 0
        self._trailer_bytes = 0

    @property
    def done(self) -> bool:
        """Whether the empty line after the last chunk was read."""
        return self._part is _Part.DONE

    def read(self, data: bytes) -> tuple[bytes, bytes]:
        """Return (payload, what follows the message).

        Raises:
            FramingFault: the bytes are not chunked coding, or exceed a limit. Payload before the
                fault is lost: the message is void.
        """
        payload: list[bytes] = []
        if self._line:
            data, self._line = self._line + data, b""
        offset = 0
        while offset < len(data) and not self.done:
            if self._part is _Part.DATA:
                piece = data[offset : offset + self._remaining]
                payload.append(piece)
                offset += len(piece)
                self._remaining -= len(piece)
                if self._remaining == 0:
                    self._part = _Part.DATA_END
                continue
            end = data.find(b"\n", offset) + 1
            if end == 0:
                self._keep_line(data[offset:])
                offset = len(data)
            else:
                self._read_line(data[offset:end])
                offset = end
        return b"".join(payload), data[offset:]

    def _keep_line(self, line: bytes) -> None:
        """Hold an incomplete line, unless it cannot become a valid one."""
        if self._part is _Part.TRAILER:
            limit_bytes = self._limits.trailer_bytes - self._trailer_bytes
        else:
            limit_bytes = self._limits.chunk_line_bytes
        if len(line) > limit_bytes or (self._part is _Part.DATA_END and line != b"\r"):
            raise FramingFault(self._fault())
        self._line = line

    def _fault(self) -> Refusal:
        return refusals.TRAILER if self._part is _Part.TRAILER else refusals.CHUNK

    def _read_line(self, line: bytes) -> None:
        match self._part:
            case _Part.SIZE:
                self._read_size(line)
            case _Part.DATA_END:
                # CVE-2025-43859: the two bytes after the data are part of the grammar.
                if line != b"\r\n":
                    raise FramingFault(refusals.CHUNK)
                self._part = _Part.SIZE
            case _Part.TRAILER:
                self._trailer_bytes += len(line)
                if self._trailer_bytes > self._limits.trailer_bytes:
                    raise FramingFault(refusals.TRAILER)
                if line == b"\r\n":
                    self._part = _Part.DONE
                elif grammar.field_line.fullmatch(line) is None:
                    raise FramingFault(refusals.TRAILER)
            case _Part.DATA | _Part.DONE:
                raise FramingFault(refusals.CHUNK)

    def _read_size(self, line: bytes) -> None:
        match = grammar.chunk_line.fullmatch(line)
        if match is None or len(line) > self._limits.chunk_line_bytes:
            raise FramingFault(refusals.CHUNK)
        self._extension_bytes += len(match[2])
        if self._extension_bytes > self._limits.chunk_extension_bytes:
            raise FramingFault(refusals.CHUNK)
        self._remaining = int(match[1], 16)
        self._part = _Part.DATA if self._remaining else _Part.TRAILER


BodyReader = LengthReader | ChunkedReader | CloseReader


def chunk(payload: bytes) -> bytes:
    """Return one chunk; the payload must not be empty, an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


LAST_CHUNK = b"0\r\n\r\n"
