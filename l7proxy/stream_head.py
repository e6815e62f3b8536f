"""From the field list of an HTTP/2 stream to the same `Request` that HTTP/1 heads become, and back.

`admit_stream` holds the rules that only HTTP/2 has: pseudo-header fields, lower-case names, fields
that belong to one connection, one authority. What passes becomes a `RequestHead` and goes through
`request.admit`, so that Host, target, normalisation and policy are one code path for both versions.
The h2 library checks much of this too; SP or TAB in `:path`, any `:scheme`, and `:authority` beside
another `host` are what it lets through. Source: RFC 9113 8.1 to 8.3, RFC 9110 6.5.1.
"""

import re

from l7proxy import grammar, refusals
from l7proxy.framing import CHUNKED, NO_BODY, Delimiter
from l7proxy.head import Field, RequestHead, ResponseHead
from l7proxy.limits import Limits
from l7proxy.refusals import Refusal, RequestRefused, ResponseRefused
from l7proxy.request import Request, admit
from l7proxy.responses import REASONS, Response, admit_response

HTTP_2 = 2
"""In place of the minor version of HTTP/1."""

FieldList = list[tuple[bytes, bytes]]

_CONNECTION_SPECIFIC = frozenset(
    (
        b"connection",
        b"http2-settings",
        b"keep-alive",
        b"proxy-connection",
        b"transfer-encoding",
        b"upgrade",
    )
)
"""RFC 9113 8.2.2."""

_NEVER_TRAILERS = _CONNECTION_SPECIFIC | frozenset(
    (
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"expect",
        b"host",
        b"set-cookie",
        b"te",
        b"trailer",
    )
)
"""RFC 9110 6.5.1: framing, routing, request modifiers, authentication, payload handling."""


def admit_stream(received: FieldList, *, ended: bool, limits: Limits) -> Request:
    """Return the one reading of a stream's request; `ended`: it has no body.

    Raises:
        RequestRefused: it has several readings, or asks for what is not served.
    """
    if len(received) > limits.header_count:  # before cookies are joined (CVE-2026-47774)
        raise RequestRefused(refusals.TOO_MANY_FIELDS)
    pseudo, fields = _split(received)
    method = pseudo.get(b":method", b"")
    if method == b"CONNECT":
        raise RequestRefused(refusals.CONNECT)
    if pseudo.keys() - {b":method", b":scheme", b":path", b":authority"}:
        raise RequestRefused(refusals.H2_MESSAGING)
    if grammar.token.fullmatch(method) is None:
        raise RequestRefused(refusals.METHOD)
    if pseudo.get(b":scheme", b"").lower() not in {b"http", b"https"}:
        raise RequestRefused(refusals.H2_MESSAGING)
    path = pseudo.get(b":path", b"")
    origin_form = path[:1] == b"/" or (path == b"*" and method == b"OPTIONS")
    if not origin_form or grammar.visible.fullmatch(path) is None:
        raise RequestRefused(refusals.URL)
    authority = pseudo.get(b":authority")
    if authority is not None:
        fields = _merge_authority(authority, fields)
    head = RequestHead(method, path, 1, fields)
    return _with_body(admit(head, limits), ended=ended)


def _split(received: FieldList) -> tuple[dict[bytes, bytes], list[Field]]:
    """Separate pseudo-header fields from the others, whose cookies are joined (RFC 9113 8.2.3)."""
    pseudo: dict[bytes, bytes] = {}
    fields: list[Field] = []
    cookies: list[bytes] = []
    for name, value in received:
        if name[:1] == b":":
            if name in pseudo or fields or cookies:
                raise RequestRefused(refusals.H2_MESSAGING)
            pseudo[name] = value
            continue
        _check_field(name, value)
        if name in _CONNECTION_SPECIFIC or (name == b"te" and value.lower() != b"trailers"):
            raise RequestRefused(refusals.H2_MESSAGING)
        if name == b"cookie":
            cookies.append(value)
        else:
            fields.append((name, name, value))
    if cookies:
        fields.append((b"cookie", b"cookie", b"; ".join(cookies)))
    return pseudo, fields


def _check_field(name: bytes, value: bytes) -> None:
    if grammar.token.fullmatch(name) is None or name != name.lower():
        raise RequestRefused(refusals.FIELD_NAME)
    if grammar.value.fullmatch(value) is None or value != value.strip(b" \t"):
        raise RequestRefused(refusals.CONTROL_BYTE)


def _merge_authority(authority: bytes, fields: list[Field]) -> list[Field]:
    """Put `:authority` in the place of Host; both may be there only if they are equal."""
    hosts = [value for name, _, value in fields if name == b"host"]
    if len(hosts) > 1:
        raise RequestRefused(refusals.SEVERAL_HOSTS)
    if hosts and hosts[0].lower() != authority.lower():
        raise RequestRefused(refusals.HOST_DIFFERS)
    kept = [field for field in fields if field[0] != b"host"]
    return [(b"host", b"Host", authority), *kept]


def _with_body(request: Request, *, ended: bool) -> Request:
    """Set the framing for HTTP/1 servers: the stream says whether there is a body at all."""
    framing = request.framing
    if ended:
        if framing.length:
            raise RequestRefused(refusals.LENGTH)
    elif framing.delimiter is Delimiter.NONE:
        framing = CHUNKED
    if ended and framing.delimiter is not Delimiter.LENGTH:
        framing = NO_BODY
    return request._replace(framing=framing, minor=HTTP_2)


_GRPC = re.compile(rb"(?i)application/grpc(?:[+;\s].*)?")


def is_grpc(request: Request) -> bool:
    """Whether the answer must have the form that gRPC clients read.

    `application/grpc-web` is another protocol, for servers of HTTP/1.1 too (PROTOCOL-WEB.md).
    """
    return any(
        name == b"content-type" and _GRPC.fullmatch(value) is not None
        for name, _, value in request.fields
    )


def request_fields(
    request: Request, fields: list[Field], request_id: bytes, scheme: bytes
) -> FieldList:
    """Return the field list for an HTTP/2 server, from the parsed form only.

    `scheme` is that of the connection to the server, not what the client says (RFC 9113 8.3.1).
    """
    sent = [
        (b":method", request.method),
        (b":scheme", scheme),
        (b":path", request.target.wire),
        (b":authority", request.target.authority),
        *((name, value) for name, _, value in fields),
    ]
    if request_id:
        sent.append((b"x-request-id", request_id))
    if request.framing.delimiter is Delimiter.LENGTH:
        sent.append((b"content-length", b"%d" % request.framing.length))
    if is_grpc(request):
        sent.append((b"te", b"trailers"))  # admit() dropped it: it concerns one hop
    return sent


def check_trailers(received: FieldList, limits: Limits) -> FieldList:
    """Return a trailer section that may be passed on.

    Raises:
        RequestRefused: 400, a field that must not be there, is malformed, or there are too many.
    """
    size_bytes = sum(len(name) + len(value) for name, value in received)
    if len(received) > limits.header_count or size_bytes > limits.trailer_bytes:
        raise RequestRefused(refusals.TRAILER)
    for name, value in received:
        _check_field(name, value)
        if name[:1] == b":" or name in _NEVER_TRAILERS:
            raise RequestRefused(refusals.TRAILER)
    return received


def read_response(received: FieldList, method: bytes, limits: Limits) -> ResponseHead:
    """Return the head of a response from an HTTP/2 server, final or interim.

    Raises:
        ResponseRefused: 502, it is malformed.
    """
    try:
        pseudo, fields = _split(received)
    except RequestRefused as refused:
        raise ResponseRefused(refusals.UPSTREAM_PROTOCOL) from refused
    status = pseudo.pop(b":status", b"")
    if pseudo or grammar.status.fullmatch(status) is None or status == b"101":
        raise ResponseRefused(refusals.UPSTREAM_PROTOCOL)
    if len(received) > limits.header_count:
        raise ResponseRefused(refusals.UPSTREAM_HEAD_TOO_LARGE)
    head = ResponseHead(int(status), b"", 1, fields)
    if head.status >= 200:
        admit_response(head, method, 1)
    return head


def response_fields(response: Response) -> FieldList:
    """Return the field list of a final response for an HTTP/2 client."""
    status = response.head.status
    sent = [(b":status", b"%d" % status)]
    sent += [(name, value) for name, _, value in response.fields]
    if response.length is not None and status != 204:
        sent.append((b"content-length", b"%d" % int(response.length)))
    return sent


def interim_fields(head: ResponseHead) -> FieldList:
    """Return the field list of a 1xx response for an HTTP/2 client."""
    dropped = _CONNECTION_SPECIFIC | {b"content-length"}
    fields = [(name, value) for name, _, value in head.fields if name not in dropped]
    return [(b":status", b"%d" % head.status), *fields]


_GRPC_STATUS = {400: 13, 403: 7, 404: 12, 421: 12, 429: 14, 502: 14, 503: 14, 504: 14}
"""grpc/doc/http-grpc-status-mapping.md; any other status is 2, UNKNOWN."""


def local_fields(refusal: Refusal, *, grpc: bool, denied_body: str) -> tuple[FieldList, bytes]:
    """Return the proxy's own answer: field list and body.

    A gRPC client gets trailers only: fields that end the stream, status 200 and `grpc-status`
    (grpc/doc/PROTOCOL-HTTP2.md); the message is percent-encoded.
    """
    text = denied_body if refusal.status == 403 else REASONS[refusal.status].decode()
    if grpc:
        message = text.replace("%", "%25").encode()
        code = b"%d" % _GRPC_STATUS.get(refusal.status, 2)
        return [
            (b":status", b"200"),
            (b"content-type", b"application/grpc"),
            (b"grpc-status", code),
            (b"grpc-message", message),
        ], b""
    body = text.encode() + b"\r\n"
    return [
        (b":status", b"%d" % refusal.status),
        (b"content-type", b"text/plain"),
        (b"content-length", b"%d" % len(body)),
    ], body
