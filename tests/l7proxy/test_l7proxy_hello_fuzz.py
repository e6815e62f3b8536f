"""Hostile ClientHellos: no server is sent a name that policy does not allow, however it reads them.

The observer takes every name that it can find in any hello that a server could find, and shares
nothing with the proxy. FUZZ_SEED and FUZZ_CASES choose other cases and more of them.
"""

import os
import random
import re

import hellos
import msgspec
import pytest
from http_mutants import cut
from http_transcript import CLIENT, SERVER, snapshot

from firewall.policy.snapshot import L7Row
from l7proxy import client_hello
from l7proxy.commands import CloseClient, CloseUpstream, Enter, OpenUpstream, SendUpstream
from l7proxy.greeting import Greeting
from l7proxy.limits import Limits
from l7proxy.passage import Passage
from l7proxy.plan import Policy
from l7proxy.policy import ConnectionJudge
from l7proxy.second_hello import SecondHello

FIRST = int(os.environ.get("FUZZ_SEED", "1"))
COUNT = int(os.environ.get("FUZZ_CASES", "3000"))

ALLOWED = re.compile(rb"a\.example|[a-z0-9_-]+\.cdn\.example")
NAMES = (
    b"a.example", b"x.cdn.example", b"b.example", b"A.Example", b"a.example.", b"a.example/",
    b"a.example\x00.b.example", b"b.example\x00a.example", b"192.0.2.1", b"0x7f.1", b"",
    b"*.cdn.example", b"x.y.cdn.example", b"\xc3\xa4.cdn.example", b"a.example\r\nHost: b",
    b"-" * 64 + b".cdn.example", b".cdn.example", b"a..example", b"x" * 300 + b".cdn.example",
)  # fmt: skip
LIMITS = Limits()


def _policy() -> Policy:
    made = snapshot()
    replace = msgspec.structs.replace
    client, server = made.policies
    entry = replace(server.ingress.entries[0], l7=0)
    server = replace(server, ingress=replace(server.ingress, entries=(entry,)))
    names = L7Row("tls", server_names=("a.example", "*.cdn.example"))
    policy = Policy()
    policy.install(replace(made, policies=(client, server), l7=(names,)))
    return policy


POLICY = _policy()


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


def case(seed: int) -> tuple[list[bytes], bytes]:
    """What a client sends, piece by piece, and what its server says after the first bytes."""
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
    return cut(sent, dice), answer


class World:
    """One client, the proxy, and the server behind it."""

    def __init__(self, seed: int) -> None:
        pieces, self.answer = case(seed)
        self.sent = b"".join(pieces)
        self.received = b""
        self.watched = b""
        self.opened = self.over = False
        self.judge = ConnectionJudge(POLICY, CLIENT, SERVER, 80)
        self.core = Greeting(self.judge, LIMITS, 0.0)
        self.perform(self.core.start(0.0))
        for piece in pieces:
            self.tell("client_data", piece)
        self.tell("client_ended")

    def tell(self, event, *arguments) -> None:
        if not self.over:
            self.perform(getattr(self.core, event)(*arguments, 1.0))

    def perform(self, commands) -> None:
        for command in commands:
            match command:
                case Enter(_, hello, data):
                    assert hello is not None
                    watch = SecondHello(hello.server_name, LIMITS.client_hello_bytes)
                    self.core = Passage(self.judge, LIMITS, "TLS", watch, 1.0)
                    self.perform(self.core.start(hello.size_bytes, data, 1.0))
                case OpenUpstream():
                    self.tell("upstream_opened")
                case SendUpstream(data):
                    self.received += data
                    if not self.opened:
                        self.opened = True
                        if self.answer:
                            self.tell("upstream_data", self.answer)
                    # After an alert or a ServerHello no hello of a client is heard any more.
                    if not self.answer or self.answer[0] == 22:
                        self.watched = self.received
                case CloseClient() | CloseUpstream():
                    self.over = True

    @property
    def faults(self) -> list[str]:
        watched = self.watched or self.received
        found = [f"name {name!r}" for name in names(watched) if not ALLOWED.fullmatch(name)]
        if self.received and not names(watched):
            found.append("no name")
        if not self.sent.startswith(self.received):
            found.append("other bytes than the client's")
        return found


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


def test_no_server_is_sent_a_name_that_is_not_allowed():
    opened = 0
    for seed in range(FIRST, FIRST + COUNT):
        world = World(seed)
        assert not world.faults, f"seed {seed}: {world.faults} {world.sent!r}"
        opened += world.opened
    assert opened > COUNT / 20  # or nothing was put to the test


# --- each check, taken away ----------------------------------------------------------------------


def one_name(patch):
    def first(value):
        listed = client_hello._Reader(value.vector(2, low=1))
        listed.number(1)
        return bytes(listed.vector(2)).decode("ascii").lower()

    patch(client_hello, "_server_name", first)


def one_extension(patch):
    class Forgetful(set):
        def __contains__(self, _kind):
            return False

    patch(client_hello, "set", Forgetful, raising=False)


def syntax_of_names(patch):
    class Sloppy:
        def fullmatch(self, name):
            return True

    def read(value):
        return _of(value).partition("\0")[0].rstrip("./")

    _of = client_hello._server_name
    patch(client_hello, "_NAME", Sloppy())
    patch(client_hello, "_server_name", read)


def second_hellos(patch):
    patch(SecondHello, "from_client", lambda _self, data: data)


def names_at_all(patch):
    hello = client_hello.ClientHello
    patch(client_hello, "_hello", lambda _body, size: hello("a.example", (), False, size))


@pytest.mark.parametrize(
    "check", [one_name, one_extension, syntax_of_names, second_hellos, names_at_all],
    ids=lambda check: check.__name__,
)  # fmt: skip
def test_a_check_that_is_missing_is_missed(check, monkeypatch):
    check(monkeypatch.setattr)
    assert any(World(seed).faults for seed in range(1, 3000)), "not missed"
