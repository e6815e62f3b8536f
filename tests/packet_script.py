"""Packet scripts: one line is one segment and what a tracker says about it.

    # RFC 5961 3.2: a reset outside the window does not close the flow.
    profile strict
    > S   0:0          win 65535      -> NEW          SYN_SENT     30s
    < S.  0:0   ack 1  win 65535      -> REPLY        SYN_RECV     30s
    > .   1:1   ack 1                 -> ESTABLISHED  ESTABLISHED  7440s
    wait 2.5
    < R   1000000:1000000             -> INVALID      ESTABLISHED  7438s

`>` goes the way of the first packet of the script, `<` comes back. Flags are tcpdump's: S F R P U E
W, and `.` for ACK. Numbers are relative to the side's initial one, as in packetdrill, `first:last`;
ack counts from the other side's. `isn CLIENT SERVER` sets the initial numbers. Options behind the
numbers: `win N`, `wscale N`, `sackok`, `sack A:B`, `ttl N`, `tfo`. The expectation is the class,
then the state of the flow (`-` = no entry), then the seconds until it expires (optional).
`loose on|off`, `liberal on`, `wait SECONDS`, `port CLIENT SERVER` change what follows.

The same files run against our tracker (tests) and against the kernel's (netns-tests); a line that
holds for one of them only ends in `[ours]` or `[kernel]`.
"""

import re
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path

FLAG_BITS = {"F": 1, "S": 2, "R": 4, "P": 8, ".": 16, "U": 32, "E": 64, "W": 128}
LINE = re.compile(
    r"(?P<way>[<>])\s+(?P<flags>[SFRPUEW.]+)\s+(?P<first>\d+):(?P<last>\d+)(?P<rest>.*?)"
    r"->\s*(?P<ctstate>[A-Z_]+)(?:\s+(?P<state>[A-Z_0-9]+|-))?(?:\s+(?P<timeout>\d+)s)?"
    r"(?:\s+\[(?P<only>ours|kernel)\])?\s*$"
)


@dataclass
class Segment:
    """One segment of a script, and what is expected after it."""

    line: int
    text: str
    reply: bool
    flags: int
    first: int
    last: int
    ack: int | None
    window: int
    options: bytes
    ttl: int
    ctstate: str
    state: str | None
    timeout_s: int | None
    only: str | None


@dataclass
class Directive:
    """A line that changes what follows: its words."""

    line: int
    words: list[str]


@dataclass
class Script:
    """A whole file."""

    path: Path
    steps: list[Segment | Directive] = field(default_factory=list)


class ScriptError(Exception):
    """A line that is no sentence of the language."""


def read(path: Path) -> Script:
    """Read a script.

    Raises:
        ScriptError: a line cannot be read; the message names it.
    """
    script = Script(path)
    for number, raw in enumerate(path.read_text().splitlines(), 1):
        text = raw.split("#", 1)[0].strip()
        if not text:
            continue
        if text[0] in "<>":
            script.steps.append(_segment(path, number, text))
        elif text.split()[0] in ("profile", "loose", "liberal", "wait", "port", "isn"):
            script.steps.append(Directive(number, text.split()))
        else:
            raise ScriptError(f"{path.name}:{number}: not a sentence: {text}")
    return script


def _segment(path: Path, number: int, text: str) -> Segment:
    match = LINE.match(text)
    if match is None:
        raise ScriptError(f"{path.name}:{number}: not a segment: {text}")
    flags = sum(FLAG_BITS[letter] for letter in match["flags"])
    words = match["rest"].split()
    ack: int | None = None
    window, ttl, options = 65535, 64, b""
    while words:
        word = words.pop(0)
        if word == "ack":
            ack = int(words.pop(0))
        elif word == "win":
            window = int(words.pop(0))
        elif word == "ttl":
            ttl = int(words.pop(0))
        elif word == "wscale":
            options += bytes((3, 3, int(words.pop(0)), 1))
        elif word == "sackok":
            options += b"\x04\x02\x01\x01"
        elif word == "tfo":
            options += bytes((34, 10)) + b"\x5a" * 8 + b"\x01\x01"
        elif word == "sack":
            left, right = words.pop(0).split(":")
            options += b"\x01\x01" + bytes((5, 10)) + struct.pack("!II", int(left), int(right))
        else:
            raise ScriptError(f"{path.name}:{number}: unknown word {word!r}")
    if flags & 16 and ack is None:
        raise ScriptError(f"{path.name}:{number}: an ACK without its number")
    timeout_s = int(match["timeout"]) if match["timeout"] else None
    return Segment(
        number, text, match["way"] == "<", flags, int(match["first"]), int(match["last"]), ack,
        window, options, ttl, match["ctstate"], match["state"], timeout_s, match["only"],
    )  # fmt: skip


@dataclass
class Ends:
    """Addresses, ports and initial numbers with which segments become bytes."""

    client: str = "10.201.1.2"
    server: str = "10.201.2.2"
    client_port: int = 40000
    server_port: int = 80
    client_isn: int = 1000
    server_isn: int = 5000

    def build(self, segment: Segment) -> bytes:
        """The IPv4 packet of a segment, with right checksums."""
        if segment.reply:
            source, destination = self.server, self.client
            ports = (self.server_port, self.client_port)
            own, other = self.server_isn, self.client_isn
        else:
            source, destination = self.client, self.server
            ports = (self.client_port, self.server_port)
            own, other = self.client_isn, self.server_isn
        ack = 0 if segment.ack is None else (other + segment.ack) & 0xFFFFFFFF
        options = segment.options
        if options[2:4] == b"\x05\x0a":  # SACK edges count from the other side's initial number
            left, right = struct.unpack_from("!II", options, 4)
            edges = ((left + other) & 0xFFFFFFFF, (right + other) & 0xFFFFFFFF)
            options = options[:4] + struct.pack("!II", *edges)
        payload = b"x" * (segment.last - segment.first)
        tcp = struct.pack(
            "!HHIIBBHHH", *ports, (own + segment.first) & 0xFFFFFFFF, ack,
            (20 + len(options)) // 4 << 4, segment.flags, segment.window, 0, 0,
        ) + options + payload  # fmt: skip
        addresses = socket.inet_aton(source) + socket.inet_aton(destination)
        total = checksum(addresses + struct.pack("!HH", 6, len(tcp)) + tcp)
        tcp = tcp[:16] + struct.pack("!H", total) + tcp[18:]
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0, segment.ttl, 6, 0)
        head += addresses
        return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + tcp


def checksum(data: bytes) -> int:
    """Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def transcript(script: Script, stage, who: str) -> list[str]:
    """The script as it was played, lines that went otherwise marked with what was said.

    Nothing if all went as they should. `stage` directs, plays and expects; lines for somebody else
    than `who` ("ours" or "kernel") are passed over.
    """
    lines, wrong = [], False
    for step in script.steps:
        if isinstance(step, Directive):
            stage.direct(step.words)
            lines.append(f"    {' '.join(step.words)}")
            continue
        if step.only not in (None, who):
            continue
        said = stage.play(step)
        matches = said == stage.expected(step)
        wrong = wrong or not matches
        lines.append(f"    {step.text}" if matches else f">>> {step.text}   BUT {said}")
    return lines if wrong else []
