"""Request and response heads: bytes to values, or a refusal; nothing in between is repaired.

A head that is accepted was matched as a whole by one pattern of `grammar`, so that no part of it
has a second reading: CRLF line ends, one SP between the parts of the request line, token names, no
folding, no control bytes. A head that is not accepted is walked line by line once more, only to say
which rule it breaks. The walk also runs over the complete lines of a head that is still arriving,
so that a client that will never send a valid head is answered at its first bad line, and the answer
does not depend on how the bytes were cut into packets.
"""

from typing import NamedTuple

from l7proxy import grammar, refusals
from l7proxy.limits import Limits
from l7proxy.refusals import RequestRefused, ResponseRefused

Field = tuple[bytes, bytes, bytes]
"""Lower-case name, name as received, value without surrounding spaces."""


class RequestHead(NamedTuple):
    """A request line and its header fields in the order received; `minor` of HTTP/1.`minor`.

    `raw` is what was received if the head is not lean, so that h11 has to agree, else empty.
    """

    method: bytes
    target: bytes
    minor: int
    fields: list[Field]
    raw: bytes = b""


class ResponseHead(NamedTuple):
    """A status line and its header fields in the order received; `raw` as for requests."""

    status: int
    reason: bytes
    minor: int
    fields: list[Field]
    raw: bytes = b""


class Progress(NamedTuple):
    """How far the lines of an arriving head were walked: bytes and lines."""

    offset: int = 0
    line_count: int = 0


def _split_fields(block: bytes) -> list[Field]:
    return [
        (name.lower(), name, value.strip(b" \t")) for name, value in grammar.fields.findall(block)
    ]


def parse_request(data: bytes, limits: Limits) -> RequestHead:
    """Read one whole request head; `data` ends with its empty line.

    Raises:
        RequestRefused: 400, 426, 431 or 505, with the first rule that the head breaks.
    """
    raw = b""
    match = grammar.lean_request_head.fullmatch(data)
    if match is None:
        raw, match = data, grammar.request_head.fullmatch(data)
    if match is None or len(data) > limits.head_bytes:
        walk_lines(data, Progress(), limits)
        raise RequestRefused(refusals.CODEC)  # the walk found nothing: refuse all the same
    method, target, minor, block = match.groups()
    fields = _split_fields(block)
    if len(fields) > limits.header_count:
        raise RequestRefused(refusals.TOO_MANY_FIELDS)
    return RequestHead(method, target, minor[0] - 48, fields, raw)  # 48 is ASCII "0"


def walk_lines(data: bytes, progress: Progress, limits: Limits) -> Progress:
    """Check the complete lines after `progress` and return the new progress.

    `data` begins at the request line; its last line may be incomplete.

    Raises:
        RequestRefused: a line breaks a rule, or there are too many bytes or lines.
    """
    offset, line_count = progress
    if data and grammar.token.match(data) is None:
        raise RequestRefused(_first_byte_fault(data))
    while (end := data.find(b"\n", offset) + 1) > 0:
        if end > limits.head_bytes:
            raise RequestRefused(refusals.HEAD_TOO_LARGE)
        line = data[offset:end]
        if line_count == 0:
            _check_request_line(line)
        elif line != b"\r\n":
            if line_count > limits.header_count:
                raise RequestRefused(refusals.TOO_MANY_FIELDS)
            _check_field_line(line)
        offset, line_count = end, line_count + 1
    if len(data) > limits.head_bytes:
        raise RequestRefused(refusals.HEAD_TOO_LARGE)
    return Progress(offset, line_count)


def _first_byte_fault(data: bytes) -> refusals.Refusal:
    """Why a head cannot begin with this byte (a TLS record, an empty line, a space, ...)."""
    return refusals.CONTROL_BYTE if data[0] < 0x20 or data[0] > 0x7E else refusals.METHOD


def _line_fault(line: bytes) -> refusals.Refusal | None:
    """What is wrong with a line as a line: its end, or bytes that no line may have."""
    if not line.endswith(b"\r\n"):
        return refusals.BARE_LF
    if b"\r" in line[:-2]:
        return refusals.BARE_CR
    return None


def _check_request_line(line: bytes) -> None:
    if grammar.request_line.fullmatch(line):
        return
    fault = _line_fault(line)
    if fault is not None:
        raise RequestRefused(fault)
    parts = line[:-2].split(b" ")
    if len(parts) != 3:  # two parts are HTTP/0.9, which has no status line to refuse it with
        raise RequestRefused(refusals.REQUEST_LINE)
    method, target, version = parts
    if grammar.token.fullmatch(method) is None:
        raise RequestRefused(refusals.METHOD)
    if not target or any(not 0x21 <= byte <= 0x7E for byte in target):
        raise RequestRefused(refusals.URL)
    if grammar.version.fullmatch(version):
        raise RequestRefused(refusals.UNSUPPORTED_VERSION)
    raise RequestRefused(refusals.VERSION)


def _check_field_line(line: bytes) -> None:
    if grammar.field_line.fullmatch(line):
        return
    fault = _line_fault(line)
    if fault is None and line[:1] in {b" ", b"\t"}:
        fault = refusals.OBS_FOLD
    if fault is None:
        name, colon, _ = line.partition(b":")
        if not colon:
            fault = refusals.FIELD
        elif grammar.token.fullmatch(name) is None:
            fault = refusals.FIELD_NAME
    raise RequestRefused(fault or refusals.CONTROL_BYTE)


def parse_response(data: bytes, limits: Limits) -> ResponseHead:
    """Read one whole response head; `data` ends with its empty line.

    Raises:
        ResponseRefused: 502; a lenient server is not repaired either, because the client could
            read what we would send in two ways.
    """
    raw = b""
    match = grammar.lean_response_head.fullmatch(data)
    if match is None:
        raw, match = data, grammar.response_head.fullmatch(data)
    if match is None:
        raise ResponseRefused(refusals.UPSTREAM_PROTOCOL)
    minor, status, reason, block = match.groups()
    fields = _split_fields(block)
    if len(fields) > limits.header_count or len(data) > limits.response_head_bytes:
        raise ResponseRefused(refusals.UPSTREAM_HEAD_TOO_LARGE)
    return ResponseHead(int(status), reason or b"", minor[0] - 48, fields, raw)


_RESPONSE_START = b"HTTP/1."


def check_response_start(data: bytes, limits: Limits) -> None:
    """Refuse an incomplete response head that cannot become a valid one, or is too large.

    Raises:
        ResponseRefused: 502.
    """
    if data[: len(_RESPONSE_START)] != _RESPONSE_START[: len(data)]:
        raise ResponseRefused(refusals.UPSTREAM_PROTOCOL)
    if len(data) > limits.response_head_bytes:
        raise ResponseRefused(refusals.UPSTREAM_HEAD_TOO_LARGE)
