"""Hostile ClientHellos: no server is sent a name that policy does not allow, however it reads them.

`hello_mutants` takes every name that it can find in any hello that a server could find. FUZZ_SEED
and FUZZ_CASES choose other cases and more of them.
"""

import os

import msgspec
import pytest
from hello_mutants import ROW, case, faults
from http_transcript import CLIENT, SERVER, snapshot

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

LIMITS = Limits()


def _policy() -> Policy:
    made = snapshot()
    replace = msgspec.structs.replace
    client, server = made.policies
    entry = replace(server.ingress.entries[0], l7=0)
    server = replace(server, ingress=replace(server.ingress, entries=(entry,)))
    policy = Policy()
    policy.install(replace(made, policies=(client, server), l7=(ROW,)))
    return policy


POLICY = _policy()


class World:
    """One client, the proxy, and the server behind it."""

    def __init__(self, seed: int) -> None:
        played = case(seed)
        self.sent, self.answer = played.sent, b"".join(played.answers)
        self.received = b""
        self.watched = b""
        self.opened = self.over = False
        self.judge = ConnectionJudge(POLICY, CLIENT, SERVER, 80)
        self.core = Greeting(self.judge, LIMITS, 0.0)
        self.perform(self.core.start(0.0))
        for piece in played.pieces:
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
        return faults(self.sent, self.received, self.watched or self.received)


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
