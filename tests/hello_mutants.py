"""Hostile ClientHellos made from a seed, and every name that a server could find in one.

The reader shares nothing with the proxy; `faults` is what must never be found at a server.
"""

import random
import re

import hellos
from http_mutants import Case, cut

from firewall.policy.snapshot import L7Row

ROW = L7Row("tls", server_names=("a.example", "*.cdn.example"))
ALLOWED = re.compile(rb"a\.example|[a-z0-9_-]+\.cdn\.example")
NAMES = (
    b"a.example", b"x.cdn.example", b"b.example", b"A.Example", b"a.example.", b"a.example/",
    b"a.example\x00.b.example", b"b.example\x00a.example", b"192.0.2.1", b"0x7f.1", b"",
    b"*.cdn.example", b"x.y.cdn.example", b"\xc3\xa4.cdn.example", b"a.example\r\nHost: b",
    b"-" * 64 + b".cdn.example", b".cdn.example", b"a..example", b"x" * 300 + b".cdn.example",
)  # fmt: skip


def _names(dice) -> bytes:
    """The server_name extension, or several, or something like it."""
    name = dice.choice(NAMES if dice.random() < 0.4 else NAMES[:2])
    other = dice.choice((b"b.example", b"a.example"))
    match dice.randrange(12):
        case 0:
            return hellos.server_name(name, other)
        case 1:
            return hellos.server_name(name) + hellos.server_name(other)
        case 2:
            return hellos.server_name(name, kind=1) + hellos.server_name(other)
        case 3:
            one = b"\x00" + hellos.vector(2, name)
            return hellos.extension(0, hellos.vector(2, one) + b"\x00" + hellos.vector(2, other))
        case 4:
            return b""
    return hellos.server_name(name)


def _hello(dice) -> bytes:
    extensions = [
        _names(dice),
        hellos.extension(16, b"\x00\x03\x02h2"),
        hellos.extension(43, b"\x02\x03\x04"),
    ]
    dice.shuffle(extensions)
    tail = dice.choice((b"",) * 6 + (b"\x00", hellos.server_name(b"b.example")))
    message = hellos.message(*extensions, session=bytes(dice.choice((0, 0, 32, 33))), tail=tail)
    if dice.random() < 0.2:
        at = dice.randrange(len(message))
        message = (
            message[:at] + bytes((message[at] ^ (1 << dice.randrange(8)),)) + message[at + 1 :]
        )
    if dice.random() < 0.1:
        message += hellos.message(hellos.server_name(b"b.example"))
    return message


def case(seed: int) -> Case:
    """What a client sends; the one answer is what its server says after the first bytes."""
    dice = random.Random(seed)
    sent = hellos.records(_hello(dice), dice.choice((1, 5, 40, 1 << 14, 1 << 14)))
    behind = dice.random()
    if behind < 0.25:
        sent += hellos.records(_hello(dice), dice.choice((7, 1 << 14)))
    elif behind < 0.35:  # change_cipher_spec, then another hello
        sent += b"\x14\x03\x03\x00\x01\x01" + hellos.records(_hello(dice))
    elif behind < 0.45:
        sent += b"\x17\x03\x03\x00\x02hi"
    for _ in range(dice.choice((0, 0, 0, 1, 2))):
        at = dice.randrange(len(sent))
        match dice.randrange(4):
            case 0:
                sent = sent[:at] + bytes((sent[at] ^ (1 << dice.randrange(8)),)) + sent[at + 1 :]
            case 1:
                sent = sent[:at] + sent[at + 1 :] or b"\x16"
            case 2:
                sent = (
                    sent[:at]
                    + dice.choice((b"\x15\x03\x03\x00\x02\x01\x00", b"\x16\x03\x01\x00\x00"))
                    + sent[at:]
                )
            case _:
                sent = sent[:at] or b"\x16"
    answer = dice.choice((b"", b"", hellos.retry_request(), b"\x15\x03\x03\x00\x02\x02\x28"))
    return Case(cut(sent, dice), [answer] if answer else [])


def names(data: bytes) -> list[bytes]:
    """Return every name in every hello that some server could find in a client's records."""
    stream = b""
    while len(data) >= 5:
        size = int.from_bytes(data[3:5], "big")
        if data[0] == 22:
            stream += data[5 : 5 + size]
        data = data[5 + size :]
    found: list[bytes] = []
    while len(stream) >= 4:
        size = int.from_bytes(stream[1:4], "big")
        if stream[0] == 1:
            found += _names_of(stream[4 : 4 + size])
        stream = stream[4 + size :]
    return [name.lower() for name in found]


def _names_of(body: bytes) -> list[bytes]:
    at = 34
    for width in (1, 2, 1):  # session, cipher suites, compression methods
        at += width + int.from_bytes(body[at : at + width], "big")
    at += 2
    found = []
    while at + 4 <= len(body):
        kind, size = (
            int.from_bytes(body[at : at + 2], "big"),
            int.from_bytes(body[at + 2 : at + 4], "big"),
        )
        value = body[at + 4 : at + 4 + size]
        at += 4 + size
        if kind == 0:  # past the length of the list, to the end of the extension
            item = 2
            while item + 3 <= len(value):
                length = int.from_bytes(value[item + 1 : item + 3], "big")
                found.append(value[item + 3 : item + 3 + length])
                item += 3 + length
    return found


def faults(sent: bytes, received: bytes, watched: bytes) -> list[str]:
    """Return what is wrong with what a server got of what a client sent.

    `watched`: of it, what came before the server had said that it hears no further hello.
    """
    found = [f"name {name!r}" for name in names(watched) if not ALLOWED.fullmatch(name)]
    if received and not begins_whole(received):
        found.append("no complete hello")
    if received and not names(watched):
        found.append("no name")
    if not sent.startswith(received):
        found.append("other bytes than the client's")
    return found


def begins_whole(data: bytes) -> bool:
    """Whether the first records are handshake records that hold one hello, and nothing else."""
    stream = b""
    while len(data) >= 5 and data[0] == 22 and len(data) >= 5 + int.from_bytes(data[3:5], "big"):
        end = 5 + int.from_bytes(data[3:5], "big")
        stream, data = stream + data[5:end], data[end:]
        if len(stream) >= 4 and len(stream) >= 4 + int.from_bytes(stream[1:4], "big"):
            return stream[0] == 1 and _adds_up(stream[4:], int.from_bytes(stream[1:4], "big"))
    return False


def _adds_up(body: bytes, size: int) -> bool:
    at = 34
    for width in (1, 2, 1):  # session, cipher suites, compression methods
        at += width + int.from_bytes(body[at : at + width], "big")
    if at != size:  # RFC 8446 4.1.2: without extensions it ends here
        at += 2 + int.from_bytes(body[at : at + 2], "big")
    return at == size == len(body)
