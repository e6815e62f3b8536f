"""Responses: the proxy's own, and the server's with this hop's fields replaced.

Own responses are complete messages with Content-Length; their bytes do not depend on the request,
so nothing a client sends can appear in them. A server's response keeps status, reason, field order
and spelling; hop-by-hop fields go, framing is written anew.
Source: RFC 9110 7.6.1, 15; RFC 9112 6.3, 9; Cilium http-403-msg.
"""

from functools import lru_cache
from typing import NamedTuple

from l7proxy.framing import CHUNKED, UNTIL_CLOSE, Delimiter, Framing, response_framing
from l7proxy.head import Field, ResponseHead
from l7proxy.refusals import Refusal

REASONS = {
    400: b"Bad Request",
    403: b"Forbidden",
    408: b"Request Timeout",
    414: b"URI Too Long",
    417: b"Expectation Failed",
    421: b"Misdirected Request",
    426: b"Upgrade Required",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
}
"""RFC 9110 15 and RFC 6585 5."""

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"content-length",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)


@lru_cache(maxsize=256)  # refusals times two flags; the text is the same for all
def local_response(refusal: Refusal, *, head_only: bool, close: bool, denied_body: str) -> bytes:
    """Return the proxy's own answer; `denied_body` is the text of a 403.

    `head_only`: to a HEAD request (RFC 9110 9.3.2), body bytes would be taken for the next answer.
    """
    reason = REASONS[refusal.status]
    body = denied_body.encode() if refusal.status == 403 else reason
    body += b"\r\n"
    extra = b"Upgrade: HTTP/1.1\r\n" if refusal.status == 426 else b""  # RFC 9110 15.5.22
    options = [b"close"] if close else []
    if extra:
        options.append(b"upgrade")
    connection = b"Connection: %b\r\n" % b", ".join(options) if options else b""
    return b"HTTP/1.1 %d %b\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n%b%b\r\n%b" % (
        refusal.status,
        reason,
        len(body),
        extra,
        connection,
        b"" if head_only else body,
    )


_UNKNOWN_LENGTH = frozenset((Delimiter.CHUNKED, Delimiter.CLOSE))

_USUAL_OPTIONS = frozenset((b"close", b"keep-alive"))
"""Options of `Connection` that are not also fields of the response."""


class Response(NamedTuple):
    """A server's final response with one reading.

    `fields` are those that the client gets, without framing. `framing` is how the server delimits
    the body, `sent` how the client will get it. `length`: its Content-Length, which may describe a
    body that is not sent (HEAD, 304). `reusable`: the server's connection may be used again.
    """

    head: ResponseHead
    fields: list[Field]
    framing: Framing
    sent: Framing
    length: bytes | None
    reusable: bool


def admit_response(head: ResponseHead, method: bytes, client_minor: int) -> Response:
    """Return the one reading of a final response to `method`.

    An unknown length becomes chunked for HTTP/1.1 clients; HTTP/1.0 clients, which know no chunks,
    get everything until the close (RFC 9112 7.1, 9.3).

    Raises:
        ResponseRefused: there is more than one reading.
    """
    kept: list[Field] = []
    lengths: list[bytes] = []
    codings: list[bytes] = []
    options: set[bytes] = set()
    for field in head.fields:
        name = field[0]
        if name not in _HOP_BY_HOP:
            kept.append(field)
        elif name == b"content-length":
            lengths.append(field[2])
        elif name == b"transfer-encoding":
            codings.append(field[2])
        elif name == b"connection":
            options.update(part.strip(b" \t").lower() for part in field[2].split(b","))
    if options - _USUAL_OPTIONS:
        kept = [field for field in kept if field[0] not in options]
    framing = response_framing(method, head.status, head.minor, lengths, codings)
    sent = framing
    if framing.delimiter in _UNKNOWN_LENGTH:
        sent = CHUNKED if client_minor else UNTIL_CLOSE
    reusable = head.minor == 1 and framing is not UNTIL_CLOSE and b"close" not in options
    return Response(head, kept, framing, sent, lengths[0] if lengths else None, reusable)


def serialise_response(response: Response, *, close: bool) -> bytes:
    """Write the head for the client; `close` announces that no further request will be read."""
    head = response.head
    parts = [b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason)]
    parts += [b"%b: %b\r\n" % (spelling, value) for _, spelling, value in response.fields]
    if response.sent is CHUNKED:
        parts.append(b"Transfer-Encoding: chunked\r\n")
    elif response.length is not None and head.status != 204:  # RFC 9110 8.6: none with 204
        parts.append(b"Content-Length: %d\r\n" % int(response.length))
    if close:
        parts.append(b"Connection: close\r\n")
    parts.append(b"\r\n")
    return b"".join(parts)


def serialise_switch(head: ResponseHead) -> bytes:
    """Write a 101 that opens a WebSocket."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    return serialise_informational(head).removesuffix(b"\r\n") + upgrade


def serialise_informational(head: ResponseHead) -> bytes:
    """Write a 1xx response (RFC 9110 15.2: a proxy must forward them, but it may drop fields)."""
    lines = [
        b"%b: %b\r\n" % (spelling, value)
        for name, spelling, value in head.fields
        if name not in _HOP_BY_HOP
    ]
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (head.status, head.reason, b"".join(lines))
