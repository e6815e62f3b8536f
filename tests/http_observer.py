"""What a server was sent, read strictly and in every lenient way that servers are known to read.

Written against RFC 9112 and RFC 9113 for the fuzzer, apart from the product: nothing here is shared
with `l7proxy`. `Observer` reads the bytes of one connection. They must have one reading: canonical
by the grammar, the same requests for readers that accept bare LF, folded lines, spaces before a
colon, the first or the last of repeated fields, either of Content-Length and Transfer-Encoding, or
sloppy numbers. And each request must be one that the policy allows, on every path that a server
could make of its target.
"""

import base64
import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from hpack import Decoder

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e]+) HTTP/1\.1")
FIELD_LINE = re.compile(rb"(" + TOKEN + rb"): ?([\x20-\x7e\x80-\xff\t]*)")
CHUNK_LINE = re.compile(rb"[0-9a-f]{1,8}")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
ACCEPT = b"{accept}"
"""In an answer, the place of the proof that its server has read the key of a WebSocket."""

HOP_BY_HOP = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade",
        b"http2-settings",
    )
)  # fmt: skip


@dataclass
class Seen:
    """A request as one reader has it; `body` is what it takes for one, None: not complete.

    `number`: the stream of HTTP/2.
    """

    method: bytes
    target: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes | None = None
    number: int = 0

    def values(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.fields if key == name]


@dataclass
class Observer:
    """The bytes of one connection so far and what is wrong with them.

    Attributes:
        raw: everything that came.
        answered_count: requests that were handed out by `complete`.
        switched_at: how much had come when the server agreed to another protocol; what came before
            is HTTP, whoever meant what by it.
    """

    raw: bytearray = field(default_factory=bytearray)
    answered_count: int = 0
    switched_at: int | None = None

    @property
    def is_h2(self) -> bool:
        return self.raw.startswith(PREFACE)

    @property
    def tunnelled(self) -> bytes:
        """What came after the switch."""
        return b"" if self.switched_at is None else bytes(self.raw[self.switched_at :])

    def answer(self, seen: Seen, said: bytes) -> bytes:
        """What the server answers: in `said`, ACCEPT becomes the proof that the key was read.

        The server switches if that makes a 101 for a WebSocket (RFC 6455 4.2.2).
        """
        key = b"".join(seen.values(b"sec-websocket-key"))
        digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        proof = base64.b64encode(digest)
        said = said.replace(ACCEPT, proof)
        status, *lines = said.partition(b"\r\n\r\n")[0].split(b"\r\n")
        fields = [line.partition(b":") for line in lines]

        def values(name: bytes) -> list[bytes]:
            return [value.strip() for key, _, value in fields if key.lower() == name]

        options = b",".join(values(b"connection")).lower().split(b",")
        if (
            _websocket(seen)
            and status.startswith(b"HTTP/1.1 101 ")
            and b"websocket" in b",".join(values(b"upgrade")).lower()
            and b"upgrade" in {option.strip() for option in options}
            and proof in values(b"sec-websocket-accept")
        ):
            self.switched_at = len(self.raw)
        return said

    def complete(self) -> list[Seen]:
        """Requests that have become complete by the strict reading since the last call."""
        requests = [seen for seen in self.requests() if seen.body is not None]
        fresh, self.answered_count = requests[self.answered_count :], len(requests)
        return fresh

    def requests(self) -> list[Seen]:
        if self.is_h2:
            return H2Reading(bytes(self.raw)).requests
        return StrictReading(bytes(self.raw[: self.switched_at])).requests

    def faults(self) -> list[str]:
        """Everything that a server must never have been sent."""
        raw = bytes(self.raw[: self.switched_at])
        if not raw or PREFACE.startswith(raw):
            return []
        if self.is_h2:
            reading = H2Reading(raw)
            return reading.faults + [f for seen in reading.requests for f in policy_faults(seen)]
        strict = StrictReading(raw)
        found = list(strict.faults)
        for seen in strict.requests:
            found += policy_faults(seen)
        wanted = [(seen.method, seen.target, seen.body) for seen in strict.requests]
        for habits in HABITS:
            lenient = list(lenient_requests(raw, habits))
            if [(seen.method, seen.target, seen.body) for seen in lenient] != wanted:
                found.append(f"read differently with {habits}: {lenient!r}"[:600])
        return found


class StrictReading:
    """RFC 9112 without any leniency; `faults` names the first thing that is not canonical."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.at = 0
        self.requests: list[Seen] = []
        self.faults: list[str] = []
        while self.at < len(raw) and not self.faults:
            if not self._request():
                break

    def _fault(self, text: str, about: bytes) -> bool:
        self.faults.append(f"{text}: {about[:120]!r}")
        return False

    def _request(self) -> bool:
        end = self.raw.find(b"\r\n\r\n", self.at)
        if end < 0:  # our proxy writes a head at once, so the rest is on its way or was cut
            return False
        lines = self.raw[self.at : end].split(b"\r\n")
        self.at = end + 4
        first = REQUEST_LINE.fullmatch(lines[0])
        if first is None:
            return self._fault("request line", lines[0])
        seen = Seen(first[1], first[2], [])
        for line in lines[1:]:
            match = FIELD_LINE.fullmatch(line)
            if match is None:
                return self._fault("field line", line)
            if match[2] != match[2].strip(b" \t"):
                return self._fault("spaces around a value", line)
            seen.fields.append((match[1].lower(), match[2]))
        self.requests.append(seen)
        return self._check_fields(seen) and self._body(seen)

    def _check_fields(self, seen: Seen) -> bool:
        if len(seen.values(b"host")) != 1:
            return self._fault("not one Host", repr(seen.fields).encode())
        for name, value in seen.fields:
            if name in HOP_BY_HOP and not _websocket(seen):
                return self._fault("a field of another hop", name)
            if re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", value):
                return self._fault("control byte", value)
        if not re.fullmatch(rb"[0-9A-Za-z_.-]+(:\d{1,5})?|\[[0-9A-Fa-f:.]+\](:\d{1,5})?",
                            seen.values(b"host")[0]):  # fmt: skip
            return self._fault("host", seen.values(b"host")[0])
        return True

    def _body(self, seen: Seen) -> bool:
        lengths = seen.values(b"content-length")
        codings = seen.values(b"transfer-encoding")
        if len(lengths) + len(codings) > 1:
            return self._fault("two framings", repr(seen.fields).encode())
        if codings:
            return (
                self._chunks(seen) if codings == [b"chunked"] else self._fault("coding", codings[0])
            )
        if lengths and not re.fullmatch(rb"0|[1-9][0-9]{0,17}", lengths[0]):
            return self._fault("length", lengths[0])
        size = int(lengths[0]) if lengths else 0
        if len(self.raw) - self.at < size:
            return False
        seen.body = self.raw[self.at : self.at + size]
        self.at += size
        return True

    def _chunks(self, seen: Seen) -> bool:
        body = b""
        while (end := self.raw.find(b"\r\n", self.at)) >= 0:
            line = self.raw[self.at : end]
            if CHUNK_LINE.fullmatch(line) is None:
                return self._fault("chunk line", line)
            size, start = int(line, 16), end + 2
            if len(self.raw) < start + size + 2:
                return False
            if self.raw[start + size : start + size + 2] != b"\r\n":
                return self._fault("chunk end", self.raw[start + size : start + size + 8])
            self.at = start + size + 2
            body += self.raw[start : start + size]
            if size == 0:
                seen.body = body
                return True
        return False


def _websocket(seen: Seen) -> bool:
    return seen.values(b"upgrade") == [b"websocket"] and seen.method == b"GET"


# --- lenient readers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Habits:
    """What a reader forgives. `first`: of repeated fields the first counts, else the last."""

    line_feed: bool
    fold: bool
    first: bool
    length_wins: bool
    sloppy_numbers: bool


HABITS = tuple(Habits(*flags) for flags in itertools.product((False, True), repeat=5))


def lenient_requests(raw: bytes, habits: Habits) -> Iterator[Seen]:
    """What such a reader takes the bytes for; it goes on as long as it can read anything."""
    at = 0
    while at < len(raw):
        lines: list[bytes] = []
        while True:
            end = raw.find(b"\n" if habits.line_feed else b"\r\n", at)
            if end < 0:
                return
            line, at = raw[at:end].rstrip(b"\r"), end + (1 if habits.line_feed else 2)
            if habits.line_feed:  # and some end a line at a CR as well
                line = line.partition(b"\r")[0]
            if not line and lines:
                break
            if not line:  # before a request line
                continue
            if line[:1] in b" \t" and lines and habits.fold:
                lines[-1] += b" " + line.strip()
            else:
                lines.append(line)
        words = lines[0].split()
        if len(words) < 2:
            return
        fields = []
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            fields.append((name.strip().lower(), value.strip(b" \t\x0b\x0c\x00")))
        seen = Seen(words[0], words[1], fields)
        at = _lenient_body(raw, at, seen, habits)
        yield seen
        if seen.body is None:
            return


def _lenient_body(raw: bytes, at: int, seen: Seen, habits: Habits) -> int:
    pick = 0 if habits.first else -1
    lengths = seen.values(b"content-length")
    codings = [value for value in seen.values(b"transfer-encoding") if b"chunked" in value.lower()]
    if codings and not (lengths and habits.length_wins):
        body = b""
        while (end := raw.find(b"\n" if habits.line_feed else b"\r\n", at)) >= 0:
            size = _number(raw[at:end].rstrip(b"\r").partition(b";")[0], 16, habits)
            at = end + (1 if habits.line_feed else 2)
            if size is None or len(raw) < at + size:
                return at
            body += raw[at : at + size]
            at += size
            if size == 0:
                while (end := raw.find(b"\n", at)) >= 0:
                    line, at = raw[at:end].rstrip(b"\r"), end + 1
                    if not line:
                        seen.body = body
                        return at
                return at
            at += 2 if raw[at : at + 2] == b"\r\n" else 1 if raw[at : at + 1] == b"\n" else 0
        return at
    size = _number(lengths[pick], 10, habits) if lengths else 0
    if size is None:
        size = 0
    if len(raw) >= at + size:
        seen.body = raw[at : at + size]
        at += size
    return at


def _number(text: bytes, base: int, habits: Habits) -> int | None:
    if habits.sloppy_numbers:
        digits = rb"[0-9A-Fa-f]+" if base == 16 else rb"[0-9]+"
        found = re.search(digits, text.strip().lower().removeprefix(b"0x").replace(b"_", b""))
        return int(found[0], base) if found else None
    try:
        return int(text, base)
    except ValueError:
        return None


# --- HTTP/2 --------------------------------------------------------------------------------------


class H2Reading:
    """Frames and field lists, strictly; the table of HPACK is the one thing that is borrowed."""

    def __init__(self, raw: bytes) -> None:
        self.requests: list[Seen] = []
        self.faults: list[str] = []
        self._streams: dict[int, Seen] = {}
        self._bodies: dict[int, bytes] = {}
        self._decoder = Decoder()
        at, block, ends = len(PREFACE), b"", False
        while at + 9 <= len(raw) and not self.faults:
            size = int.from_bytes(raw[at : at + 3], "big")
            if len(raw) < at + 9 + size:
                return
            kind, flags = raw[at + 3], raw[at + 4]
            stream = int.from_bytes(raw[at + 5 : at + 9], "big")
            payload = raw[at + 9 : at + 9 + size]
            at += 9 + size
            if kind in (1, 9):
                if kind == 1 and flags & 0x28:
                    self.faults.append("padding or priority, which nobody asked for")
                block += payload
                ends = bool(flags & 1) if kind == 1 else ends
                if flags & 4:
                    self._head(stream, self._decoder.decode(block, raw=True))
                    block = b""
                    if ends and stream in self._streams:
                        self._end(stream)
            elif kind == 0 and stream in self._streams:
                self._bodies[stream] = self._bodies.get(stream, b"") + payload
                if flags & 1:
                    self._end(stream)

    def _head(self, stream: int, fields: list[tuple[bytes, bytes]]) -> None:
        if stream in self._streams:
            if any(name.startswith(b":") for name, _ in fields):
                self.faults.append("pseudo-header fields in trailers")
            return
        pseudo = [name for name, _ in fields if name.startswith(b":")]
        if sorted(pseudo) != [b":authority", b":method", b":path", b":scheme"]:
            self.faults.append(f"pseudo-header fields {pseudo}")
            return
        plain = dict(fields)
        for name, value in fields:
            token = name.removeprefix(b":") if name in pseudo else name
            if not re.fullmatch(rb"[!#$%&'*+\-.^_`|~0-9a-z]+", token):
                self.faults.append(f"name {name!r}")
            if re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", value) or value != value.strip(b" \t"):
                self.faults.append(f"value {value!r}")
            if name in (HOP_BY_HOP - {b"te"}) | {b"transfer-encoding", b"host"}:
                self.faults.append(f"a field of HTTP/1: {name!r}")
        if not re.fullmatch(rb"[\x21-\x7e]+", plain[b":path"]):
            self.faults.append(f"path {plain[b':path']!r}")
        rest = [(name, value) for name, value in fields if name not in pseudo]
        rest.append((b"host", plain[b":authority"]))
        seen = Seen(plain[b":method"], plain[b":path"], rest, None, stream)
        self._streams[stream] = seen
        self.requests.append(seen)

    def _end(self, stream: int) -> None:
        seen = self._streams[stream]
        seen.body = self._bodies.get(stream, b"")
        lengths = seen.values(b"content-length")
        if len(lengths) > 1 or (lengths and int(lengths[0]) != len(seen.body)):
            self.faults.append(f"content-length {lengths} of {len(seen.body)} bytes")


# --- the policy, on every path that a server could make of a target ------------------------------


ALLOWED = (
    (b"GET", rb"/public/.*", rb".*", None),
    (b"GET", rb"/", rb".*", None),
    (b"POST|PUT", rb"/upload/[a-z]+", rb"svc\.local(:80)?", None),
    (b"GET", rb"/role", rb".*", (b"x-role", b"user")),
    (b"GET", rb"/files/[a-z]*/[a-z]+", rb".*", None),
    (b"POST", rb"/demo\.Echo/Unary", rb".*", None),
)
"""Method, path, host, header: what `RULES` of the fuzzers say, in `re` and apart from them."""


def paths(target: bytes) -> set[bytes]:
    """Every path that is known to be made of a target by some server."""
    if target == b"*":
        return {target}
    found = set()
    bare = target.partition(b"#")[0].partition(b"?")[0]
    for decoded in (bare, _unescape(bare), _unescape(_unescape(bare)), _lax(_unescape(bare))):
        for slashed in (decoded, decoded.replace(b"\\", b"/")):
            for cut in (
                slashed,
                re.sub(rb";[^/]*", b"", slashed),
                slashed.partition(b"\x00")[0],
                slashed.partition(b";")[0],
                slashed.partition(b"?")[0].partition(b"#")[0],
            ):
                found |= {_resolve(cut), _resolve(re.sub(rb"/+", b"/", cut))}
    return found


def _unescape(path: bytes) -> bytes:
    return re.sub(rb"%([0-9A-Fa-f]{2})", lambda hit: bytes((int(hit[1], 16),)), path)


def _lax(path: bytes) -> bytes:
    """ASCII that hides in longer forms of UTF-8 than it needs, as lax decoders see it."""
    for prefix in (rb"[\xc0\xc1]", rb"\xe0[\x80\x81]", rb"\xf0\x80[\x80\x81]"):
        path = re.sub(
            prefix + rb"[\x80-\xbf]",
            lambda hit: bytes((((hit[0][-2] & 1) << 6) | (hit[0][-1] & 0x3F),)),
            path,
        )
    return path


def _resolve(path: bytes) -> bytes:
    kept: list[bytes] = []
    segments = path.split(b"/")[1:]
    for segment in segments:
        name = segment.rstrip(b" .") if segment.strip(b" .") else segment.strip(b" ")
        if name == b"..":
            del kept[-1:]
        elif name != b".":
            kept.append(segment)
    if segments and segments[-1].strip(b" ") in (b".", b".."):
        kept.append(b"")
    return b"/" + b"/".join(kept)


def policy_faults(seen: Seen) -> list[str]:
    """Why a request must not have been sent, in any way of reading it."""
    host = b"".join(seen.values(b"host"))
    query = seen.target.partition(b"?")[1:]
    bad = []
    for path in sorted(paths(seen.target)):
        for method, pattern, hosts, header in ALLOWED:
            if (
                re.fullmatch(method, seen.method)
                and re.fullmatch(pattern, path + b"".join(query), re.DOTALL)
                and re.fullmatch(hosts, host)
                and (header is None or _like(seen, header[0]) == [header[1]])
            ):
                break
        else:
            bad.append(
                f"not allowed: {seen.method!r} {seen.target!r} read as {path!r}, host {host!r}"
            )
    return bad


def _like(seen: Seen, name: bytes) -> list[bytes]:
    """Values of a field for servers that take `_` for `-`."""
    return [value for key, value in seen.fields if key.replace(b"_", b"-") == name]


# --- what a client was sent ----------------------------------------------------------------------


def answer_faults(raw: bytes, methods: list[bytes], *, switched: bool) -> list[str]:
    """What is wrong with the answers to requests with these methods, read strictly.

    The last one may be cut. A 1xx head may precede each. `switched`: a server has made a 101; what
    follows the client's is no answer then. The words may stand in a body without meaning it.
    """
    at, count = 0, 0
    while at < len(raw):
        end = raw.find(b"\r\n\r\n", at)
        if end < 0:
            return []
        lines = raw[at:end].split(b"\r\n")
        at = end + 4
        first = re.fullmatch(rb"HTTP/1\.1 ([1-9]\d\d) ([\x20-\x7e\x80-\xff\t]*)", lines[0])
        if first is None:
            return [f"status line {lines[0][:80]!r}"]
        fields = []
        for line in lines[1:]:
            match = FIELD_LINE.fullmatch(line)
            if match is None:
                return [f"field line {line[:80]!r}"]
            fields.append((match[1].lower(), match[2]))
        if first[1].startswith(b"1"):
            if first[1] == b"101":
                return [] if switched else ["a switch that no server made"]
            continue
        if count >= len(methods):
            return [f"an answer to nothing: {lines[0][:80]!r}"]
        method = methods[count]
        count += 1
        lengths = [value for name, value in fields if name == b"content-length"]
        codings = [value for name, value in fields if name == b"transfer-encoding"]
        if len(lengths) + len(codings) > 1:
            return [f"two framings {fields}"]
        if method == b"HEAD" or first[1] in (b"204", b"304"):
            continue
        if codings:
            reading = StrictReading(b"")
            reading.raw, reading.at = raw, at
            seen = Seen(b"", b"", [])
            reading._chunks(seen)
            if reading.faults or seen.body is None:
                return reading.faults
            at = reading.at
        elif lengths:
            if not re.fullmatch(rb"[0-9]{1,18}", lengths[0]):
                return [f"length {lengths[0]!r}"]
            at += int(lengths[0])
        else:
            return []
    return []
