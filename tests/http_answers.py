"""What a client of HTTP/2 was told, read strictly; it shares nothing with the proxy (RFC 9113).

The counterpart of `http_observer.answer_faults`. The last frame may be cut.
"""

import re

from hpack import Decoder, HPACKError

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PUSH, _PING, _GOAWAY, _WINDOW, _MORE = (
    0, 1, 3, 4, 5, 6, 7, 8, 9
)  # fmt: skip
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE = re.compile(rb"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?")
_ONE_HOP = {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
_LARGEST_FRAME = 16_384
"""RFC 9113 6.5.2, until the client allows more."""


class _Stream:
    def __init__(self) -> None:
        self.status = b""
        self.length: int | None = None
        self.body_bytes = 0
        self.over = False
        self.reset = False


def stream_faults(raw: bytes) -> list[str]:
    """What is wrong with the frames that a client got."""
    decoder, streams = Decoder(), {}
    block: tuple[int, int, bytes] | None = None
    at, first = 0, True
    while at + 9 <= len(raw):
        size, kind, flags = int.from_bytes(raw[at : at + 3], "big"), raw[at + 3], raw[at + 4]
        number = int.from_bytes(raw[at + 5 : at + 9], "big")
        payload, at = raw[at + 9 : at + 9 + size], at + 9 + size
        if size > _LARGEST_FRAME or number >> 31:
            return [f"frame of {size} bytes on stream {number}"]
        if first and kind != _SETTINGS:
            return ["the first frame is no SETTINGS"]
        first = False
        if (block is not None) != (kind == _MORE) or (block is not None and block[0] != number):
            return [f"frame {kind} in the middle of a header block, or a part of none"]
        if len(payload) < size:
            return []
        if kind in (_SETTINGS, _PING, _GOAWAY) and number:
            return [f"frame {kind} on stream {number}"]
        if kind == _SETTINGS and (size % 6 or (flags & _ACK and size)):
            return ["SETTINGS of another length"]
        if kind in (_HEADERS, _DATA) and (not number or not number % 2):
            return [f"frame {kind} on stream {number}"]
        if kind == _PUSH or kind > _MORE:
            return [f"frame {kind}"]
        if kind in (_HEADERS, _DATA) and flags & (_PADDED | (_PRIORITY if kind else 0)):
            return ["padding, or a priority, that nobody needs"]
        stream = streams.setdefault(number, _Stream())
        if kind in (_HEADERS, _DATA, _MORE) and (stream.over or stream.reset):
            return [f"frame {kind} after the end of stream {number}"]
        if kind == _RST_STREAM:
            stream.reset = True
        elif kind == _DATA:
            stream.body_bytes += size
            fault = "" if stream.status else "DATA before a status"
            fault = fault or (_end(stream) if flags & _END_STREAM else "")
            if fault:
                return [f"stream {number}: {fault}"]
        elif kind in (_HEADERS, _MORE):
            begun = block or (number, flags, b"")
            block = (number, begun[1], begun[2] + payload)
            if flags & _END_HEADERS:
                fault = _fields(stream, decoder, block[2], ended=bool(block[1] & _END_STREAM))
                block = None
                if fault:
                    return [f"stream {number}: {fault}"]
    return []


def _fields(stream: _Stream, decoder: Decoder, block: bytes, *, ended: bool) -> str:
    """Take a header block; return what is wrong with it."""
    try:
        fields = decoder.decode(block, raw=True)
    except HPACKError as error:
        return f"header block: {error}"
    for name, value in fields:
        plain = name.removeprefix(b":") if name == b":status" else name
        if not _NAME.fullmatch(plain) or not _VALUE.fullmatch(value) or name in _ONE_HOP:
            return f"field {name!r}: {value!r}"
    pseudo = [value for name, value in fields if name == b":status"]
    if stream.status:  # trailers
        if pseudo or not ended:
            return "a second head"
        return _end(stream)
    if len(pseudo) != 1 or fields[0][0] != b":status" or not re.fullmatch(rb"[1-9]\d\d", pseudo[0]):
        return f"status {pseudo}"
    if pseudo[0].startswith(b"1"):
        return (
            "an interim head that ends the stream, or a switch"
            if (ended or pseudo[0] == b"101")
            else ""
        )
    stream.status = pseudo[0]
    lengths = [value for name, value in fields if name == b"content-length"]
    if len(lengths) > 1 or not all(re.fullmatch(rb"\d{1,18}", value) for value in lengths):
        return f"lengths {lengths}"
    if lengths:
        stream.length = int(lengths[0])
    return _end(stream) if ended else ""


def _end(stream: _Stream) -> str:
    stream.over = True
    # Without any DATA the length may be that of another representation: HEAD, 304 (RFC 9110 8.6).
    wrong = stream.length is not None and stream.body_bytes not in {0, stream.length}
    return f"{stream.body_bytes} bytes of {stream.length}" if wrong else ""
