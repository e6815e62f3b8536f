"""A server's answer to one request: bytes in, the bytes for the client out.

A `Reply` reads interim (1xx) responses, the final head and the body, and writes them anew for the
client. It is complete when `done`; bytes beyond the end are kept in `excess`, because a server that
sends more than one answer to one request must not be asked again on this connection.
Source: RFC 9110 15.2; RFC 9112 4, 6.3, 9.2.
"""

from typing import TYPE_CHECKING

import h11
import msgspec

from l7proxy import refusals
from l7proxy.framing import (
    LAST_CHUNK,
    BodyReader,
    CloseReader,
    Delimiter,
    FramingFault,
    chunk,
)
from l7proxy.head import ResponseHead, check_response_start, parse_response
from l7proxy.limits import Limits
from l7proxy.reference import AgreedReader, body_reader, check_response
from l7proxy.refusals import ResponseRefused
from l7proxy.request import Request
from l7proxy.responses import (
    Response,
    admit_response,
    serialise_informational,
    serialise_response,
)

if TYPE_CHECKING:
    from l7proxy.heads import Heads

_HEAD_END = b"\r\n\r\n"
_CHUNKED = Delimiter.CHUNKED
_SWITCHING_PROTOCOLS = 101


class Reply(msgspec.Struct, gc=False):
    """The answer to `request` as far as it has come.

    Attributes:
        response: the final head, None until it is complete.
        done: nothing more belongs to this answer.
        begun: some byte of it has come.
        excess: bytes came after its end.
        sent_bytes: body bytes written for the client.

    Args:
        heads: those that were read before; None: each is read anew.
    """

    _request: Request
    _limits: Limits
    _heads: "Heads | None" = None
    _inbox: bytes = b""
    _informational_count: int = 0
    _reader: BodyReader | AgreedReader | None = None
    _chunked: bool = False
    response: Response | None = None
    done: bool = False
    begun: bool = False
    excess: bool = False
    sent_bytes: int = 0

    def read(self, data: bytes, *, close: bool) -> bytes:
        """Take bytes of the server and return bytes for the client.

        `close`: the client is to be told that its connection ends with this answer.

        Raises:
            ResponseRefused: the answer is malformed; with status 0 when its head was passed on.
        """
        self.begun = True
        if self._reader is not None:
            return self._read_body(self._reader, data)
        self._inbox = self._inbox + data if self._inbox else data
        return self._read_heads(close=close)

    def end(self) -> bytes | None:
        """Take the server's FIN; None if the answer is not complete with it."""
        if self.done:
            return b""
        if not isinstance(self._reader, CloseReader):
            return None
        self.done = True
        return self._terminator()

    def _read_heads(self, *, close: bool) -> bytes:
        written = b""
        request = self._request
        while (end := self._inbox.find(_HEAD_END) + 4) >= 4:
            raw = self._inbox[:end]
            if self._heads is not None:
                known = self._heads.response(raw, request.method, request.minor)
                if known is not None:
                    begun = known.closing if close else known.kept
                    rest, self._inbox = self._inbox[end:], b""
                    return written + begun + self._begin(known.response, rest, None)
            head = parse_response(raw, self._limits)
            rest, self._inbox = self._inbox[end:], b""
            if head.status >= 200:
                response = admit_response(head, request.method, request.minor)
                theirs = None
                if head.raw:
                    theirs = check_response(head, request.method, response.framing)
                elif self._heads is not None:
                    self._heads.remember(raw, request.method, request.minor, response)
                close = close or response.sent.delimiter is Delimiter.CLOSE
                written += self._write_head(response, close=close)
                return written + self._begin(response, rest, theirs)
            self._informational_count += 1
            # RFC 9110 15.2.2: nobody asked to switch.
            if (
                head.status == _SWITCHING_PROTOCOLS
                or self._informational_count > self._limits.informational_count
            ):
                raise ResponseRefused(refusals.UPSTREAM_PROTOCOL)
            check_response(head, self._request.method, None)
            # The proxy said 100 itself; HTTP/1.0 knows no interim responses.
            if head.status != 100 and self._request.minor:
                written += self._write_interim(head)
            self._inbox = rest
        check_response_start(self._inbox, self._limits)
        return written

    def _begin(self, response: Response, rest: bytes, theirs: h11.Connection | None) -> bytes:
        """Go on with the body after a final head; return what there is of it already."""
        self.response = response
        self._chunked = response.sent.delimiter is _CHUNKED
        self._reader = reader = body_reader(response.framing, self._limits, theirs)
        return self._read_body(reader, rest)

    def _read_body(self, reader: BodyReader | AgreedReader, data: bytes) -> bytes:
        try:
            payload, rest = reader.read(data)
        except FramingFault as fault:
            raise ResponseRefused(refusals.UPSTREAM_LATE_PROTOCOL) from fault
        self.sent_bytes += len(payload)
        if payload and self._chunked:
            payload = chunk(payload)
        if reader.done:
            self.done = True
            self.excess = bool(rest)
            payload += self._terminator()
        return payload

    def _write_head(self, response: Response, *, close: bool) -> bytes:
        return serialise_response(response, close=close)

    def _write_interim(self, head: ResponseHead) -> bytes:
        return serialise_informational(head)

    def _terminator(self) -> bytes:
        return LAST_CHUNK if self._chunked else b""


class StreamReply(Reply):
    """The answer of an HTTP/1 server to a request of HTTP/2: `read` returns payload only.

    Attributes:
        interim: 1xx heads that were not taken yet.
    """

    interim: list[ResponseHead] = []

    def _write_head(self, response: Response, *, close: bool) -> bytes:  # noqa: ARG002
        return b""

    def _write_interim(self, head: ResponseHead) -> bytes:
        self.interim.append(head)
        return b""

    def _begin(self, response: Response, rest: bytes, theirs: h11.Connection | None) -> bytes:
        self.response = response
        self._reader = reader = body_reader(response.framing, self._limits, theirs)
        return self._read_body(reader, rest)
