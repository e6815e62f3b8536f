"""Hostile HTTP for the fuzzer: what a client sends, in pieces, and what a server answers.

Everything follows from a seed. A case begins as one to three requests (a grammar's, a known attack,
or one of the corpus if that is there), is mutated at the level of bytes, lines, fields and
messages, and cut anywhere. HTTP/2 cases are frames with field lists, mutated as lists and as bytes.
"""

# ruff: noqa: E501 - bytes that are looked at together stand on one line

import base64
import json
import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from hpack import Encoder, HeaderTuple, NeverIndexedHeaderTuple
from http_observer import ACCEPT

from firewall.policy.snapshot import HttpRuleRow

CORPUS = Path(__file__).resolve().parents[1] / "../shared/corpus/http"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

RULES = (
    HttpRuleRow(method="GET", path="/public/.*"),
    HttpRuleRow(method="GET", path="/"),
    HttpRuleRow(method="POST|PUT", path="/upload/[a-z]+", host=r"svc\.local(:80)?"),
    HttpRuleRow(method="GET", path="/role", headers=("X-Role: user",)),
    HttpRuleRow(method="GET", path="/files/[a-z]*/[a-z]+"),
    HttpRuleRow(method="POST", path=r"/demo\.Echo/Unary"),
)
"""The policy under attack; `http_observer.ALLOWED` says the same in other words."""

DENIED = b"GET /admin/canary HTTP/1.1\r\nHost: svc.local\r\n\r\n"
HIDDEN = b"GET /public/hidden HTTP/1.1\r\nHost: svc.local\r\n\r\n"
"""Allowed, but nobody asks for it: it stands where no request is."""

PATHS = (
    b"/", b"/public/a", b"/public/b?x=1&y=/../admin", b"/upload/abc", b"/role", b"/admin/canary",
    b"/public/../admin/canary", b"/public/%2e%2e/admin/canary", b"/public/..;/admin/canary",
    b"/public/..%2fadmin/canary", b"/public/%252e%252e/admin", b"/public\\..\\admin", b"//admin",
    b"/public//../admin", b"/public/a#/../admin", b"/public/%c0%ae%c0%ae/admin", b"*", b"",
    b"/./public/./a/", b"/public/..", b"/public/.%2e/%2e./admin", b"/public/;/../../admin",
    b"http://svc.local/public/a", b"http://svc.local/admin", b"http://other/public/a",
    b"/public/%00/../admin", b"/public/a%0d%0aX:%20y", b"/public/..%20/admin", b"/%70ublic/a", b"/public/a%2f..%2f..%2fadmin", b"/public/..%e0%80%af..%E0%80%AFadmin",
    b"/public/%f0%80%80%ae./admin", b"/public/%c0%ae./admin",
    b"svc.local:80", b"/public/..%3bx/admin", b"/demo.Echo/Unary", b"/demo.Echo/Other",
    b"/files/a/b", b"/files//keys", b"/files/./keys", b"/files/a/../keys", b"//files/a/b",
)  # fmt: skip
METHODS = (b"GET",) * 8 + (
    b"POST", b"PUT", b"HEAD", b"OPTIONS", b"get", b"CONNECT", b"TRACE", b"G", b"GET/", b"PRI",
)  # fmt: skip
LINES = (
    b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: +5", b"Content-Length: 5, 5",
    b"Content-Length: 05", b"Content-Length: 0x5", b"Content-Length: 5_0", b"Content-Length : 5",
    b"Content-Length: 18446744073709551621", b"Content-Length:", b"content_length: 3",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", b"Transfer-Encoding : chunked",
    b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding: xchunked", b"Transfer-Encoding: gzip, chunked", b"Transfer_Encoding: chunked",
    b"Transfer-Encoding:\tchunked", b"Transfer-Encoding: CHUNKED", b"Transfer-Encoding: chunked\x00",
    b"Host: svc.local", b"Host: other", b"Host: svc.local:80", b"Host: svc.local@other", b"Host:",
    b"Host: svc.local/public", b"Host : svc.local", b" Host: other", b"X-Role: user",
    b"X-Role: admin", b"X_Role: user", b"X-Role: user, admin", b"X-Role:user ", b"Cookie: a=b",
    b"Connection: close", b"Connection: keep-alive", b"Connection: X-Role", b"Connection: Host",
    b"Connection: upgrade", b"Connection: Content-Length", b"Connection: Transfer-Encoding, close",
    b"Upgrade: h2c", b"Upgrade: websocket", b"Upgrade: websocket, h2c", b"HTTP2-Settings: AAMAAABk",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", b"Sec-WebSocket-Version: 13",
    b"Expect: 100-continue", b"Expect: 100-continue, 100-continue", b"Expect: x", b"TE: trailers",
    b"Trailer: X", b"Keep-Alive: timeout=5", b"Proxy-Connection: keep-alive", b": empty", b"noise",
    b"X: a\r\n b", b"X: a\rY: b", b"X: a\nTransfer-Encoding: chunked", b"X: \x01", b"X: \xff",
    b"X\x00: y", b"X-Original-URL: /admin", b"X-Forwarded-For: 127.0.0.1", b"X: " + b"y" * 9000,
    b"GET /admin/canary HTTP/1.1", b"Range: bytes=0-1", b"X-Request-Id: 1\t2", b"X-Request-Id: r",
)  # fmt: skip
_ROLES = [line for line in LINES if b"ole" in line]
_UPGRADE = (
    b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)  # fmt: skip
ENDS = (b"\r\n",) * 12 + (b"\n", b"\r", b"\r\r\n", b" \r\n", b"\n\r", b"\x0b\r\n", b"\x85")
VERSIONS = (b"HTTP/1.1",) * 10 + (
    b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"http/1.1", b"HTTP/1.1 ", b"HTTP/0.9", b"HTTP/1.32", b"",
)  # fmt: skip
SPECIAL = b"\r\n\t \x00\x0b\x0c:;,/%.#?\\_-+\"'x0\x7f\x80\xff"
CHUNKS = (
    b"5\r\nhello\r\n", b"0005\r\nhello\r\n", b"5;a=b\r\nhello\r\n", b"5 \r\nhello\r\n", b"5\nhello\n",
    b"0x5\r\nhello\r\n", b"+5\r\nhello\r\n", b"5\r\nhelloX\n", b"5;\rx\r\nhello\r\n", b"fffffffff\r\n",
    b'5;a="\r\n"\r\nhello\r\n', b"5_\r\nhello\r\n", b"5\r\nhel", b"A\r\nhelloworld\r\n", b"5;x\nhello\r\n",
)  # fmt: skip
LAST_CHUNKS = (
    b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"0\r\nHost: other\r\nContent-Length: 9\r\n\r\n", b"0\n\n",
    b"0\r\n\n", b"00\r\n\r\n", b"0;x\r\n\r\n", b"0\r\nX : y\r\n\r\n", b"0\r\n X: y\r\n\r\n", b"0\r\n",
)  # fmt: skip
_SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: " + ACCEPT + b"\r\n\r\n"
)
SWITCHES = (
    _SWITCH, _SWITCH + b"\x81\x02hi", _SWITCH.replace(ACCEPT, b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
    _SWITCH.replace(b"101 Switching Protocols", b"200 OK"), _SWITCH.replace(b"websocket", b"h2c"),
    b"HTTP/1.1 100 Continue\r\n\r\n" + _SWITCH, _SWITCH.replace(b"101", b"102") + _SWITCH,
    _SWITCH.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n"),
    _SWITCH.replace(b"Connection: Upgrade\r\n", b""), _SWITCH.replace(b"1.1 101", b"1.0 101"),
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 426 Upgrade\r\n\r\n",
)  # fmt: skip
"""What servers say to an upgrade, well or badly."""
ANSWERS = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    *SWITCHES,
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 30\r\n\r\nhi",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi",
    b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\nhi",
    b"HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: Content-Length\r\n\r\nhi",
    b"ICY 200 OK\r\n\r\n",
    b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
)


@dataclass
class Case:
    """What one client sends, piece by piece, and how its servers answer.

    `answers`: taken in turn, one for each complete request; after the last the plain one.
    `ending`: how the client leaves, by "fin" after which it still reads, or by "close" or "reset".
    """

    pieces: list[bytes]
    answers: list[bytes] = field(default_factory=list)
    ending: str = "fin"

    @property
    def sent(self) -> bytes:
        return b"".join(self.pieces)


def case(seed: int) -> Case:
    """The case of a seed, the same for ever on one version of this module and of Python."""
    dice = random.Random(seed)
    kind = dice.random()
    make = _http2 if kind < 0.2 else _websocket if kind < 0.3 else _http1 if kind < 0.65 else _fault
    sent = make(dice) or b"G"
    answers = []
    if make is _websocket:
        answers = [_mutant(dice.choice((_SWITCH, *SWITCHES)), dice)]
    elif dice.random() < 0.4:
        answers = [_mutant(dice.choice(ANSWERS), dice) for _ in range(dice.randrange(1, 4))]
    pieces = cut(sent, dice)
    ending = dice.choice(("fin",) * 8 + ("close", "reset"))
    if ending != "fin":  # anywhere
        pieces = cut(sent[: dice.randrange(1, len(sent) + 1)] or b"G", dice)
    return Case(pieces, answers, ending)


def cut(data: bytes, dice: random.Random) -> list[bytes]:
    """The same bytes in pieces; mostly few."""
    if dice.random() < 0.5 or len(data) < 2:
        return [data]
    at = sorted({dice.randrange(1, len(data)) for _ in range(dice.choice((1, 1, 2, 5)))})
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


def _http1(dice: random.Random) -> bytes:
    known = _known()
    if known and dice.random() < 0.25:
        data = dice.choice(known)
    else:
        data = b"".join(_request(dice) for _ in range(dice.choice((1, 1, 2, 3))))
    for _ in range(dice.choice((0, 0, 1, 1, 2, 4))):
        data = _mutated(data, dice)
    return data


@cache
def _known() -> list[bytes]:
    path = CORPUS / "h1_corpus.jsonl"
    if not path.exists():
        return []
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        sent
        for row in rows
        if "bytes_b64" in row and len(sent := base64.b64decode(row["bytes_b64"])) < 16_000
    ]


def _request(dice: random.Random) -> bytes:
    plain = dice.random() < 0.5
    method = dice.choice(METHODS)
    path = dice.choice(PATHS if dice.random() < 0.5 else PATHS[:5])
    version = b"HTTP/1.1" if plain else dice.choice(VERSIONS)
    lines = [b" ".join(part for part in (method, path, version) if part)]
    if dice.random() < 0.9:
        lines.append(dice.choice((b"Host: svc.local",) * 9 + (b"Host: other",)))
    lines += [dice.choice(LINES) for _ in range(dice.choice((0, 1, 1, 2, 3)))]
    if path == b"/role":
        lines += [dice.choice(_ROLES) for _ in range(dice.choice((1, 1, 2, 3)))]
    body = b""
    kind = dice.random()
    if kind < 0.15:
        body = dice.choice((b"hello", DENIED, HIDDEN, b"0\r\n\r\n" + DENIED))
        lines.append(b"Content-Length: %d" % (len(body) + dice.choice((0, 0, 0, -1, 1))))
    elif kind < 0.35:
        lines.append(b"Transfer-Encoding: chunked")
        body = b"".join(
            dice.choice(CHUNKS[:4] if plain else CHUNKS) for _ in range(dice.randrange(3))
        )
        body += dice.choice(LAST_CHUNKS[:3] if plain else LAST_CHUNKS)
        if dice.random() < 0.2:
            body += dice.choice((DENIED, HIDDEN))
    if dice.random() < 0.3:
        rest = lines[1:]
        dice.shuffle(rest)
        lines = [lines[0], *rest]
    ends = [b"\r\n" if plain else dice.choice(ENDS) for _ in range(len(lines) + 1)]
    head = b"".join(line + end for line, end in zip([*lines, b""], ends, strict=True))
    return head + body


def _mutated(data: bytes, dice: random.Random) -> bytes:
    if not data:
        return data
    at = dice.randrange(len(data))
    match dice.randrange(10):
        case 0:  # one byte more
            return data[:at] + bytes((dice.choice(SPECIAL),)) + data[at:]
        case 1:  # one byte less
            return data[:at] + data[at + 1 :]
        case 2:  # another byte
            return data[:at] + bytes((dice.choice(SPECIAL),)) + data[at + 1 :]
        case 3:  # a bit
            return data[:at] + bytes((data[at] ^ (1 << dice.randrange(8)),)) + data[at + 1 :]
        case 4:  # a line more, at the end of another
            end = data.find(b"\r\n", at)
            end = at if end < 0 else end
            return data[:end] + dice.choice(ENDS) + dice.choice(LINES) + data[end:]
        case 5:  # a line twice, or none
            start, end = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at) + 1
            line = data[start:end]
            return data[:start] + line * dice.choice((0, 2)) + data[end:] if end else data
        case 6:  # the end of a line, otherwise
            end = data.find(b"\r\n", at)
            return data if end < 0 else data[:end] + dice.choice(ENDS) + data[end + 2 :]
        case 7:  # somewhere a whole request
            return data[:at] + DENIED + data[at:]
        case 8:  # cut short, another one behind it
            return data[:at] + dice.choice((b"", _request(dice)))
        case _:  # a part of something else
            other = _request(dice)
            start = dice.randrange(len(other))
            return data[:at] + other[start : start + dice.randrange(60)] + data[at:]


_ALLOWED = (
    (b"GET", b"/public/a", b"", b""),
    (b"GET", b"/role", b"X-Role: user", b""),
    (b"POST", b"/upload/abc", b"Content-Length: 5", b"hello"),
    (b"PUT", b"/upload/abc", b"Transfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n"),
)
_DENIED = ((b"PUT", b"/public/a", b"Content-Length: %d" % len(HIDDEN), HIDDEN),)


def _fault(dice: random.Random) -> bytes:
    """A request that would be served but for one fault, and mostly another one behind it."""
    method, path, line, body = dice.choice(_ALLOWED * 4 + _DENIED)
    version, end = b"HTTP/1.1", b"\r\n"
    lines = [b"Host: svc.local", *([line] if line else [])]
    match dice.randrange(6):
        case 0:
            (method, _, line, body), lines = _ALLOWED[0], lines[:1]
            path = dice.choice(PATHS)
        case 1:
            version = dice.choice(VERSIONS)
        case 2:
            lines.insert(
                dice.randrange(len(lines) + 1), dice.choice(_ROLES if line[:1] == b"X" else LINES)
            )
        case 3:
            lines[dice.randrange(len(lines))] = dice.choice(LINES)
        case 4:
            end = dice.choice(ENDS[12:])
        case _ if line[:1] == b"T":
            chunk, last = dice.choice(CHUNKS), dice.choice(LAST_CHUNKS)
            body = dice.choice((chunk + LAST_CHUNKS[0], CHUNKS[0] + last))
        case _:
            lines += [dice.choice(LINES)] * 2
    lines.insert(0, b" ".join((method, path, version)))
    ends = [b"\r\n"] * len(lines)
    ends[dice.randrange(len(lines))] = end
    head = b"".join(part for pair in zip(lines, ends, strict=True) for part in pair)
    return head + b"\r\n" + body + dice.choice((b"", HIDDEN, HIDDEN, DENIED))


def _websocket(dice: random.Random) -> bytes:
    """An upgrade, and behind it what is no request, but would be one if it were refused."""
    lines = [b"GET /public/ws HTTP/1.1", b"Host: svc.local", *_UPGRADE]
    for _ in range(dice.choice((0, 0, 0, 1, 2))):
        at = dice.randrange(len(lines))
        match dice.randrange(3):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at + 1, dice.choice(LINES))
            case _:
                lines[at] = dice.choice(LINES)
    early = dice.choice((b"", b"\x81\x85\x00\x00\x00\x00hello", DENIED, HIDDEN, HIDDEN + DENIED))
    return _mutant(b"\r\n".join([*lines, b"", b""]), dice) + early


def _mutant(data: bytes, dice: random.Random) -> bytes:
    """The same, mostly with a fault or two."""
    for _ in range(dice.choice((0, 0, 1, 2))):
        data = _mutated(data, dice)
    return data


# --- HTTP/2 --------------------------------------------------------------------------------------

_PLAIN = [
    (b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/public/a"),
    (b":authority", b"svc.local"),
]  # fmt: skip
_FIELDS = (
    (b"x-role", b"user"), (b"x-role", b"admin"), (b"X-Role", b"user"), (b"host", b"svc.local"),
    (b"host", b"other"), (b"cookie", b"a=b"), (b"cookie", b"c=d"), (b"te", b"trailers"),
    (b"te", b"chunked"), (b"transfer-encoding", b"chunked"), (b"connection", b"close"),
    (b"content-length", b"5"), (b"content-length", b"0"), (b"content-length", b"+5"),
    (b"upgrade", b"h2c"), (b"expect", b"100-continue"), (b"x", b"a\r\nGET /admin HTTP/1.1\r\n\r\n"),
    (b"x\r\ny", b"z"), (b"x y", b"z"), (b"x:y", b"z"), (b"", b"z"), (b"x", b" z "), (b"x", b"\x00"),
    (b":path", b"/admin"), (b":method", b"PUT"), (b":authority", b"other"), (b":protocol", b"websocket"),
    (b":status", b"200"), (b":scheme", b"https"), (b"content-type", b"application/grpc"),
    (b"keep-alive", b"1"), (b"x-request-id", b"r"), (b"trailer", b"x"), (b"x_role", b"user"),
    (b"proxy-connection", b"close"), (b"http2-settings", b"AAMAAABk"), (b"x", b"y" * 5000),
)  # fmt: skip
_H2_PATHS = (
    *PATHS, b"/public/a HTTP/1.1\r\nX: ", b"/public/a b", b"/public/a\tb", b"/public/\xff", b"/public/a\n",
)  # fmt: skip


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
    )


def _http2(dice: random.Random) -> bytes:
    encoder = Encoder()
    frames = [_frame(4, 0, 0, b"")]
    if dice.random() < 0.3:  # one fault alone
        fields = [*_PLAIN, dice.choice(_FIELDS)]
        return PREFACE + b"".join([*frames, _frame(1, 5, 1, encoder.encode(fields))])
    stream = 1
    for _ in range(dice.choice((1, 1, 2, 3))):
        fields = list(_PLAIN)
        if dice.random() < 0.5:
            fields[2] = (b":path", dice.choice(_H2_PATHS))
        if dice.random() < 0.2:
            fields[0] = (b":method", dice.choice(METHODS))
        if dice.random() < 0.2:
            fields[3] = (
                b":authority",
                dice.choice((b"other", b"svc.local:80", b"a@b", b"", b"a b")),
            )
        if dice.random() < 0.2:
            fields[1] = (b":scheme", dice.choice((b"https", b"ftp", b"http://x/admin?", b"")))
        if dice.random() < 0.15:
            fields[:3] = [
                (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/demo.Echo/Unary")
            ]  # fmt: skip
            fields.append((b"content-type", b"application/grpc"))
        for _ in range(dice.choice((0, 0, 1, 1, 2, 4))):
            place = dice.randrange(len(fields) + 1) if dice.random() < 0.2 else len(fields)
            fields.insert(place, dice.choice(_FIELDS))
        if dice.random() < 0.1:
            del fields[dice.randrange(len(fields))]
        kind = dice.choice((HeaderTuple, HeaderTuple, NeverIndexedHeaderTuple))
        block = encoder.encode([kind(*pair) for pair in fields])
        body = dice.choice((None, None, b"", b"hello", DENIED))
        ended = 1 if body is None else 0
        if dice.random() < 0.2 and len(block) > 4:
            at = dice.randrange(len(block))
            frames += [
                _frame(1, ended, stream, block[:at]), _frame(9, 4, stream, block[at:])
            ]  # fmt: skip
        else:
            frames.append(_frame(1, 4 | ended, stream, block))
        if body is not None:
            last = dice.random() < 0.7
            frames.append(_frame(0, 1 if last else 0, stream, body))
            if not last:
                trailers = encoder.encode([dice.choice(_FIELDS) for _ in range(2)])
                frames.append(_frame(1, 5, stream, trailers))
        if dice.random() < 0.1:
            frames.append(_frame(3, 0, stream, (8).to_bytes(4, "big")))
        stream += dice.choice((2, 2, 2, 1, 0))
    for _ in range(dice.choice((0, 0, 0, 1, 3))):
        extra = _frame(
            dice.randrange(12), dice.randrange(256), dice.choice((0, 1, 1, 3)), dice.randbytes(8)
        )
        frames.insert(dice.randrange(len(frames) + 1), extra)
    data = PREFACE + b"".join(frames)
    for _ in range(dice.choice((0, 0, 0, 1, 2))):
        at = dice.randrange(len(PREFACE), len(data))
        data = data[:at] + bytes((data[at] ^ (1 << dice.randrange(8)),)) + data[at + 1 :]
    return data


# --- making a case smaller -----------------------------------------------------------------------


def shrunk(found: Case, fails, tries: int = 400) -> Case:
    """The smallest case made from this one by leaving out that still `fails(case)`."""
    whole, ending = [found.sent], found.ending
    for simpler in (Case(whole, found.answers, ending), Case(found.pieces), Case(whole)):
        if fails(simpler):
            found = simpler
    size = max(1, len(found.sent) // 2)
    while size and tries and len(found.pieces) == 1:
        at, data = 0, found.pieces[0]
        while at < len(data) and tries:
            tries -= 1
            simpler = Case([data[:at] + data[at + size :]], found.answers, found.ending)
            if simpler.sent and fails(simpler):
                found, data = simpler, simpler.sent
            else:
                at += size
        size //= 2
    return found
