"""Thousands of hostile clients and servers against the core; the same ones meet a live proxy in
netns-tests/test_l7proxy_fuzz.py. FUZZ_SEED and FUZZ_CASES choose others and more of them."""

import os

import pytest
from http_mutants import RULES, Case, case, shrunk
from http_observer import PREFACE, Observer, answer_faults, paths
from http_transcript import CLIENT, SERVER, snapshot

from firewall.policy.course import CLEAR
from l7proxy.commands import (
    CloseClient,
    CloseUpstream,
    HandOver,
    Log,
    OpenUpstream,
    RecordKind,
    SendClient,
    SendUpstream,
    ShutdownClient,
)
from l7proxy.exchange import Exchange
from l7proxy.frames import PREFACE_LINE
from l7proxy.heads import Heads
from l7proxy.limits import Limits
from l7proxy.multiplex import Multiplex
from l7proxy.policy import ConnectionJudge, Policy

LIMITS = Limits()
HEADS = Heads(LIMITS)
POLICY = Policy(None)
POLICY.install(snapshot(RULES))

FIRST = int(os.environ.get("FUZZ_SEED", "1"))
COUNT = int(os.environ.get("FUZZ_CASES", "3000"))
BATCH = 500


class World:
    """One client connection from its first byte to its end, and the servers behind it."""

    def __init__(self, played: Case, heads: Heads = HEADS) -> None:
        self.now = 1000.0
        judge = ConnectionJudge(POLICY, CLIENT, SERVER, 80)
        judge.take(CLEAR)
        kind = Multiplex if played.sent.startswith(PREFACE_LINE) else Exchange
        extra = (heads,) if kind is Exchange else ()
        self.exchange = kind(judge, LIMITS, lambda: "id-1", self.now, *extra)
        self.answers = list(played.answers)
        self.servers = []
        self.links = {}
        self.client = b""
        self.methods = []
        self.errors = []
        self.ended = False
        self.handed_over = False
        for piece in played.pieces:
            self.tell("client_data", piece)
        self.tell("client_ended" if played.ending == "fin" else "client_lost")
        if played.ending != "fin":
            return
        for _ in range(8):  # a server that has not answered, a client that does not close
            if not self.ended:
                self.now += 4000
                self.tell("tick")
        if not self.ended and not self.handed_over:
            self.errors.append("the connection never ends")

    def tell(self, event, *arguments) -> None:
        if self.ended or self.handed_over:
            return
        link = () if event.startswith("client") or event == "tick" else (arguments[-1],)
        given = arguments[: len(arguments) - len(link)]
        for command in getattr(self.exchange, event)(*given, self.now, *link):
            self.perform(command)

    def perform(self, command) -> None:
        match command:
            case SendClient(data):
                self.client += data
            case OpenUpstream(link):
                self.links[link] = server = Observer()
                self.servers.append(server)
                self.tell("upstream_opened", link)
            case SendUpstream(data, link):
                self.serve(self.links[link], data, link)
            case CloseUpstream(_, link):
                self.links.pop(link, None)
            case CloseClient():
                self.ended = True
            case ShutdownClient():
                pass
            case HandOver():
                self.handed_over = True
            case Log(record):
                if record.kind is RecordKind.REQUEST:
                    self.methods.append(record.method.encode())
                if record.detail.startswith("internal_error"):
                    self.errors.append(record.detail)

    def serve(self, server, data, link) -> None:
        fresh = server.raw == b"" and PREFACE.startswith(data[:24])
        server.raw += data
        if fresh and server.is_h2:
            self.tell("upstream_data", b"\x00\x00\x00\x04\x00\x00\x00\x00\x00", link)
        if server.is_h2:
            return
        for seen in server.complete():
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
            if self.answers and seen.method != b"HEAD":
                answer = self.answers.pop(0)
            if link in self.links:
                self.tell("upstream_data", answer, link)

    @property
    def faults(self) -> list[str]:
        found = [*self.errors, *(fault for server in self.servers for fault in server.faults())]
        if isinstance(self.exchange, Exchange) and not self.handed_over:
            found += answer_faults(self.client, self.methods)
        return found


@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, BATCH))
def test_no_server_is_sent_what_the_policy_denies_under_any_reading(first):
    for seed in range(first, first + BATCH):
        played = case(seed)
        faults = World(played).faults
        if faults:
            small = shrunk(played, lambda one: bool(World(one).faults))
            pytest.fail(f"seed {seed}: {World(small).faults[:3]}\n{small}")


def test_heads_that_were_read_before_change_nothing():
    """What clients and servers get is the same when nothing is remembered."""
    for seed in range(FIRST, FIRST + BATCH):
        remembered, fresh = World(case(seed)), World(case(seed), Heads(LIMITS))
        assert remembered.client == fresh.client
        assert [server.raw for server in remembered.servers] == [
            server.raw for server in fresh.servers
        ]


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"GET /admin HTTP/1.1\r\nHost: a\r\n\r\n", "not allowed"),
        (b"GET /public/..;/admin HTTP/1.1\r\nHost: a\r\n\r\n", "not allowed"),
        (b"GET /public/%252e%252e/admin HTTP/1.1\r\nHost: a\r\n\r\n", "not allowed"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "not one Host"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: y\nZ: a\r\n\r\n", "field line"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
         "two framings"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n", "field line"),
        (b"POST /upload/a HTTP/1.1\r\nHost: other\r\n\r\n", "not allowed"),
        (b"GET /role HTTP/1.1\r\nHost: a\r\nX-Role: user\r\nX_Role: admin\r\n\r\n", "not allowed"),
    ],
)  # fmt: skip
def test_the_observer_sees_what_it_is_there_for(sent, why):
    observer = Observer(bytearray(sent))
    assert why in " ".join(observer.faults())


def test_the_observer_is_content_with_plain_requests():
    plain = b"GET /public/a HTTP/1.1\r\nHost: a\r\nX-Request-Id: i\r\n\r\n"
    body = b"PUT /upload/a HTTP/1.1\r\nHost: svc.local\r\nTransfer-Encoding: chunked\r\n\r\n"
    observer = Observer(bytearray(plain + body + b"1\r\nx\r\n0\r\n\r\n" + plain))
    assert observer.faults() == []
    assert [seen.body for seen in observer.complete()] == [b"", b"x", b""]
    assert observer.complete() == []


def test_a_target_has_the_paths_that_servers_make_of_it():
    assert b"/admin" in paths(b"/public/%2e%2e%2fadmin")
    assert b"/admin" in paths(b"/public/..;x/admin?y")
    assert paths(b"/public/a") == {b"/public/a"}
