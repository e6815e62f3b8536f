"""h11, the reference codec: its opinion about every message that the lean patterns do not take.

Theory of operation. A head goes one of two ways. Most match `grammar.lean_request_head` or
`grammar.lean_response_head`, strict subsets for which tests prove that h11 reads the same; those
heads are read by the pattern alone, and their bodies, of known length, are passed on unseen. All
others that our own strictness lets through are parsed by h11 as well, and so is every chunk of a
chunked body. Both must say the same: method or status, target, version, fields, framing, payload,
end. If they do not, or h11 refuses, the message is refused (400 or 502): who reads it behind us
might side with either.

h11 alone would not do: it accepts Content-Length beside chunked, obs-fold, bare LF,
Transfer-Encoding in HTTP/1.0 and CR in chunk extensions. So our own rules come first and theirs is
the second word, never the only one. Source: h11 0.16, docs/source/api.rst.
"""

import sys
from collections.abc import Sequence
from functools import lru_cache

import h11

from l7proxy import refusals
from l7proxy.framing import (
    BodyReader,
    ChunkedReader,
    CloseReader,
    Delimiter,
    Framing,
    FramingFault,
    LengthReader,
)
from l7proxy.head import Field, RequestHead, ResponseHead
from l7proxy.limits import Limits
from l7proxy.refusals import RequestRefused, ResponseRefused

_CHUNKED, _CLOSE = Delimiter.CHUNKED, Delimiter.CLOSE

_UNBOUNDED = sys.maxsize
"""Bytes h11 may hold of an incomplete line; our own readers, which come first, hold fewer."""


def _connection(role: type[h11.CLIENT] | type[h11.SERVER]) -> h11.Connection:
    return h11.Connection(role, max_incomplete_event_size=_UNBOUNDED)


def check_request(head: RequestHead, framing: Framing) -> h11.Connection:
    """Have h11 read a request head; what is returned goes on with its body.

    `head.raw` holds the bytes, `framing` is our own reading of where the body ends.

    Raises:
        RequestRefused: 400, h11 refuses the head or reads something else.
    """
    connection = _connection(h11.SERVER)
    try:
        connection.receive_data(head.raw)
        request = connection.next_event()
        following = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise RequestRefused(refusals.CODECS) from error
    if (
        not isinstance(request, h11.Request)
        or (request.method, request.target) != (head.method, head.target)
        or request.http_version != b"1.%d" % head.minor
        or _differ(request.headers, head.fields)
        or _framing(request.headers, following, framing) != framing
    ):
        raise RequestRefused(refusals.CODECS)
    return connection


_END = h11.EndOfMessage()


@lru_cache(maxsize=32)  # methods are few; making the event costs as much as reading an answer
def _any_request(method: bytes, *, upgrade: bool) -> h11.Request:
    headers = [(b"Host", b"h")]
    if upgrade:
        headers += [(b"Connection", b"upgrade"), (b"Upgrade", b"websocket")]
    return h11.Request(method=method, target=b"/", headers=headers)


def check_response(
    head: ResponseHead, method: bytes, framing: Framing | None, *, upgrade: bool = False
) -> h11.Connection:
    """Have h11 read a response head to a request with `method`, and for `upgrade` if it was.

    `framing` is our own reading of where the body ends, None for an interim (1xx) response.

    Raises:
        ResponseRefused: 502, h11 refuses the head or reads something else.
    """
    connection = _connection(h11.CLIENT)
    # h11 only reads answers to what it has sent; of the request, the method decides the framing.
    connection.send(_any_request(method, upgrade=upgrade))
    connection.send(_END)
    kind = h11.InformationalResponse if framing is None else h11.Response
    try:
        connection.receive_data(head.raw)
        response = connection.next_event()
        following = connection.next_event() if framing is not None else h11.NEED_DATA
    except h11.RemoteProtocolError as error:
        raise ResponseRefused(refusals.UPSTREAM_PROTOCOL) from error
    if (
        not isinstance(response, kind)
        or (response.status_code, response.reason) != (head.status, head.reason)
        or response.http_version != b"1.%d" % head.minor
        or _differ(response.headers, head.fields)
        or (framing is not None and _framing(response.headers, following, framing) != framing)
    ):
        raise ResponseRefused(refusals.UPSTREAM_PROTOCOL)
    return connection


def _differ(theirs: Sequence[tuple[bytes, bytes]], ours: list[Field]) -> bool:
    """Whether the fields are not the same in the same order; h11 writes codings in lower case."""
    return list(theirs) != [
        (name, value.lower() if name == b"transfer-encoding" else value) for name, _, value in ours
    ]


def _framing(
    headers: Sequence[tuple[bytes, bytes]], following: object, ours: Framing
) -> Framing | None:
    """Return h11's framing, from its fields and what it waits for; None: it is of two minds.

    `following` is its event after the head: the end if there is no body. `ours` decides between the
    two names for what h11 calls the same: no body, a body of 0 bytes.
    """
    fields = dict(headers)
    if isinstance(following, h11.EndOfMessage):
        return ours if ours.delimiter is Delimiter.NONE or ours.length == 0 else None
    if following is not h11.NEED_DATA:
        return None
    if b"transfer-encoding" in fields:
        return Framing(Delimiter.CHUNKED) if fields[b"transfer-encoding"] == b"chunked" else None
    if b"content-length" in fields:
        return Framing(Delimiter.LENGTH, int(fields[b"content-length"]))
    return Framing(Delimiter.CLOSE)


class AgreedReader:
    """A chunked body as our reader and h11 both read it; what h11 decoded is what goes on."""

    __slots__ = ("_ours", "_theirs")

    def __init__(self, ours: ChunkedReader, theirs: h11.Connection) -> None:
        self._ours = ours
        self._theirs = theirs

    @property
    def done(self) -> bool:
        """Whether the empty line after the last chunk was read."""
        return self._ours.done

    def read(self, data: bytes) -> tuple[bytes, bytes]:
        """Return (payload, what follows the message).

        Raises:
            FramingFault: the bytes are not chunked coding, exceed a limit, or are read differently.
        """
        payload, rest = self._ours.read(data)
        consumed = data[: len(data) - len(rest)]
        if not consumed:  # h11 would take it for the end of the connection
            return payload, rest
        pieces: list[bytes] = []
        try:
            self._theirs.receive_data(consumed)
            while isinstance(event := self._theirs.next_event(), h11.Data):
                pieces.append(event.data)
        except h11.RemoteProtocolError as error:
            raise FramingFault(refusals.CODECS) from error
        decoded = b"".join(pieces)
        if decoded != payload or isinstance(event, h11.EndOfMessage) is not self.done:
            raise FramingFault(refusals.CODECS)
        return decoded, rest


def body_reader(
    framing: Framing, limits: Limits, theirs: h11.Connection | None
) -> BodyReader | AgreedReader:
    """Return a reader for a message framed so; `theirs` is h11 after the head, None if not asked.

    A chunked message was never lean, so h11 has always been asked.
    """
    delimiter = framing.delimiter
    if delimiter is _CHUNKED:
        ours = ChunkedReader(limits)
        return ours if theirs is None else AgreedReader(ours, theirs)
    return CloseReader() if delimiter is _CLOSE else LengthReader(framing.length)
