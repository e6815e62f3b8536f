"""What a client asked for, by the letter, and whether servers were sent that and nothing else.

The other half of `http_observer`, written like it against RFC 9112 and 9113 and apart from the
product. `asked` reads what a client has sent and stops at the first byte that breaks the grammar;
what a server got must be one of these requests, whole, with this body, and once. So a message that
should have been refused is noticed even where the proxy wrote it anew without a flaw, and a body
that was executed even where the policy allows what it says.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hpack import Decoder, HPACKError
from http_observer import PREFACE, TOKEN, Observer, Seen, paths

_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e]+) HTTP/1\.([01])")
_FIELD = re.compile(rb"(" + TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)")
_SIZE = re.compile(
    rb"([0-9A-Fa-f]{1,8})(?:;[ \t]*"
    + TOKEN
    + rb"(?:=(?:"
    + TOKEN
    + rb'|"[^"\r\n]*(?:\\"[^"\r\n]*)*"))?)*'
)
_ADDED = frozenset((b"host", b"content-length", b"transfer-encoding", b"x-request-id", b"cookie"))
"""Fields that the proxy writes itself; cookies of HTTP/2 come in pieces and are joined."""
_ONE_HOP = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade",
        b"http2-settings",
    )
)  # fmt: skip
_NEVER_NOMINATED = frozenset((b"host", b"content-length", b"transfer-encoding", b"expect"))


@dataclass
class Asked(Seen):
    """A request as the client meant it; `rest`: where what follows it begins."""

    rest: int = 0


def asked(sent: bytes) -> list[Asked]:
    """Return the requests of one client connection up to the first fault, or its end."""
    if sent.startswith(PREFACE):
        return _Streams(sent).requests
    return [] if sent.startswith(PREFACE[:16]) else list(_messages(sent))


def unasked(sent: bytes, servers: list[Observer]) -> list[str]:
    """Return what servers were sent and the client did not ask for."""
    wanted = asked(sent)
    is_h2 = sent.startswith(PREFACE)
    last: Asked | None = None
    found: list[str] = []
    for server in servers:
        for number, seen in enumerate(server.requests()):
            if number == 0 and last is not None and not seen.body and _same(last, seen):
                continue  # a server may lose a request; it must not count as one that is to come
            at = next((i for i, one in enumerate(wanted) if _same(one, seen)), None)
            if at is not None:
                last = wanted[at]
                # Streams come in any order, requests of HTTP/1 do not.
                wanted = wanted[: at if is_h2 else 0] + wanted[at + 1 :]
            elif last is None or seen.body or not _same(last, seen):
                found.append(f"nobody asked for {seen}"[:600])
        if server.tunnelled:
            meant = sent[last.rest :] if last is not None else b""
            if not meant.startswith(server.tunnelled):
                found.append(f"not what the client said in the tunnel: {server.tunnelled[:200]!r}")
    return found


def _same(one: Asked, seen: Seen) -> bool:
    """Whether a server was sent this request, perhaps a part of it only."""
    path, mark, query = one.target.partition(b"?")
    return (
        one.method == seen.method
        and b"".join(one.values(b"host")).lower() == b"".join(seen.values(b"host")).lower()
        and (mark, query) == seen.target.partition(b"?")[1:]
        and not paths(path).isdisjoint(paths(seen.target))
        and (seen.body is None or seen.body == one.body)
        and all(
            field in one.fields
            or field[0] in _ADDED
            or field
            in ((b"te", b"trailers"), (b"connection", b"Upgrade"), (b"upgrade", b"websocket"))
            for field in seen.fields
        )
    )


# --- HTTP/1 --------------------------------------------------------------------------------------


def _messages(sent: bytes) -> Iterator[Asked]:
    at = 0
    while (end := sent.find(b"\r\n\r\n", at)) >= 0:
        lines = sent[at:end].removeprefix(b"\r\n").split(b"\r\n")  # RFC 9112 2.2
        at = end + 4
        first = _LINE.fullmatch(lines[0])
        fields = [_FIELD.fullmatch(line) for line in lines[1:]]
        if first is None or None in fields:
            return
        one = Asked(
            first[1],
            _origin_form(first[1], first[2]),
            [(match[1].lower(), match[2].strip(b" \t")) for match in fields if match],
        )
        framing = _framing(one, first[3])
        options = _tokens(one, b"connection")
        hosts = one.values(b"host")
        if framing is None or len(hosts) != 1 or options & _NEVER_NOMINATED:
            return
        if (
            first[2][:1] != b"/"
            and b"://" in first[2]
            and not re.match(
                rb"(?i:http)://" + re.escape(hosts[0]) + rb"(?![^/?#])", first[2], re.IGNORECASE
            )
        ):
            return
        at = _body(sent, at, one, framing)
        one.rest = at
        yield one
        upgrade = b"upgrade" in options and _tokens(one, b"upgrade") - {b"h2c"}
        if one.body is None or b"close" in options or upgrade or first[3] == b"0":
            return


def _origin_form(method: bytes, target: bytes) -> bytes:
    rest = re.sub(rb"^[A-Za-z][0-9A-Za-z+.-]*://[^/?#]*", b"", target)
    if not rest and method == b"OPTIONS":  # RFC 9112 3.2.4
        return b"*"
    return rest if rest[:1] == b"/" or rest == b"*" else b"/" + rest


def _tokens(one: Asked, name: bytes) -> set[bytes]:
    text = b",".join(one.values(name)).lower()
    return {token for part in text.split(b",") if (token := part.strip(b" \t"))}


def _framing(one: Asked, minor: bytes) -> int | None:
    """Return the length of the body, -1 for chunks, None if there is more than one reading."""
    lengths, codings = one.values(b"content-length"), one.values(b"transfer-encoding")
    if codings:
        chunked = not lengths and [value.lower() for value in codings] == [b"chunked"]
        return -1 if chunked and minor == b"1" else None
    if not lengths:
        return 0
    return int(lengths[0]) if re.fullmatch(rb"[0-9]{1,18}", b",".join(lengths)) else None


def _body(sent: bytes, at: int, one: Asked, size: int) -> int:
    if size >= 0:
        if at + size <= len(sent):
            one.body = sent[at : at + size]
        return at + size
    body = b""
    while (end := sent.find(b"\r\n", at)) >= 0:
        match = _SIZE.fullmatch(sent[at:end])
        if match is None:
            return at
        size, at = int(match[1], 16), end + 2
        if size == 0:
            break
        if sent[at + size : at + size + 2] != b"\r\n":
            return at
        body += sent[at : at + size]
        at += size + 2
    while (end := sent.find(b"\r\n", at)) > at:
        if _FIELD.fullmatch(sent[at:end]) is None:
            return at
        at = end + 2
    if end == at:
        one.body = body
        at += 2
    return at


# --- HTTP/2 --------------------------------------------------------------------------------------


class _Streams:
    """The well-formed requests among a client's frames, up to what breaks the connection."""

    def __init__(self, sent: bytes) -> None:
        self.requests: list[Asked] = []
        self._open: dict[int, Asked | None] = {}
        self._bodies: dict[int, bytes] = {}
        self._decoder = Decoder()
        self._highest = 0
        self._read(sent)
        for one in self.requests:
            # A server that is told the length has all of it before the stream turns out malformed.
            lengths = [int(size) for size in one.values(b"content-length") if size.isdigit()]
            body = self._bodies.get(one.number, b"")
            if one.body is None and len(lengths) == 1 and lengths[0] <= len(body):
                one.body = body[: lengths[0]]

    def _read(self, sent: bytes) -> None:
        at = len(PREFACE)
        number, block, ends = 0, b"", False
        while at + 9 <= len(sent):
            size = int.from_bytes(sent[at : at + 3], "big")
            kind, flags = sent[at + 3], sent[at + 4]
            stream = int.from_bytes(sent[at + 5 : at + 9], "big") & 0x7FFFFFFF
            payload = sent[at + 9 : at + 9 + size]
            at += 9 + size
            in_block = number != 0
            if size > 16384 or len(payload) < size or in_block != (kind == 9):
                return
            if kind in (0, 1) and flags & 8:
                payload = payload[1 : len(payload) - payload[0]] if payload else b""
            if kind == 1:
                number, ends = stream, bool(flags & 1)
                block = payload[5:] if flags & 0x20 else payload
            elif kind == 9 and stream == number:
                block += payload
            elif kind == 0:
                self._bodies[stream] = self._bodies.get(stream, b"") + payload
                if flags & 1:
                    self._end(stream)
            elif kind in (5, 9):
                return
            if number and flags & 4 and kind in (1, 9):
                if not self._head(number, block, ends=ends):
                    return
                number = 0

    def _head(self, number: int, block: bytes, *, ends: bool) -> bool:
        try:
            fields = [(bytes(n), bytes(v)) for n, v in self._decoder.decode(block, raw=True)]
        except HPACKError:
            return False
        if number not in self._open:
            if number % 2 == 0 or number <= self._highest:
                return False
            self._highest = number
            self._open[number] = one = _stream_request(number, fields)
            if one is not None:
                self.requests.append(one)
        if ends:
            self._end(number)
        return True

    def _end(self, number: int) -> None:
        one = self._open.get(number)
        if one is None or one.body is not None:
            return
        body = self._bodies.get(number, b"")
        lengths = one.values(b"content-length")
        if all(length.isdigit() and int(length) == len(body) for length in lengths):
            one.body = body


def _stream_request(number: int, fields: list[tuple[bytes, bytes]]) -> Asked | None:
    """Return the request of a field list, None if it is malformed (RFC 9113 8.1.1)."""
    names = [name for name, _ in fields]
    pseudo = [name for name in names if name.startswith(b":")]
    plain = dict(fields)
    if names[: len(pseudo)] != pseudo or len(set(pseudo)) < len(pseudo):
        return None
    if not {b":method", b":scheme", b":path"} <= set(pseudo) <= {
        b":method", b":scheme", b":path", b":authority",
    }:  # fmt: skip
        return None
    for name, value in fields:
        if not re.fullmatch(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+", name):
            return None
        if re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", value) or value != value.strip(b" \t"):
            return None
        if name in _ONE_HOP or (name == b"te" and value.lower() != b"trailers"):
            return None
    if plain[b":scheme"].lower() not in {b"http", b"https"}:
        return None
    if not re.fullmatch(rb"/[\x21-\x7e]*|\*", plain[b":path"]):
        return None
    hosts = [value for name, value in fields if name == b"host"]
    authority = plain.get(b":authority", b"".join(hosts))
    if len(hosts) > 1 or any(host.lower() != authority.lower() for host in hosts):
        return None
    rest = [field for field in fields if field[0] not in (*pseudo, b"host")]
    rest.append((b"host", authority))
    return Asked(plain[b":method"], plain[b":path"], rest, None, number)
