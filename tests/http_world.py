"""One case of the fuzzer against the core: a client, the proxy, and the servers behind it."""

from collections import deque

from http_answers import stream_faults
from http_mutants import RULES, Case
from http_observer import PREFACE, Observer, answer_faults
from http_sent import unasked
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
from l7proxy.plan import Policy
from l7proxy.policy import ConnectionJudge
from l7proxy.tunnel import Tunnel

LIMITS = Limits()
HEADS = Heads(LIMITS)
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def policy() -> Policy:
    """The policy under attack, with nothing remembered."""
    made = Policy(None)
    made.install(snapshot(RULES))
    return made


POLICY = policy()


class World:
    """One client connection from its first byte to its end, and the servers behind it."""

    def __init__(self, played: Case, heads: Heads = HEADS, rules: Policy = POLICY) -> None:
        self.sent = played.sent
        self.now = 1000.0
        self.judge = judge = ConnectionJudge(rules, CLIENT, SERVER, 80)
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
        self.waiting = deque()
        self.performing = False
        for piece in played.pieces:
            self.tell("client_data", piece)
        self.tell("client_ended" if played.ending == "fin" else "client_lost")
        if played.ending != "fin":
            return
        for _ in range(8):  # a server that has not answered, a client that does not close
            if not self.ended:
                self.now += 4000
                self.tell("tick")
        if not self.ended:
            self.errors.append("the connection never ends")

    def tell(self, event, *arguments) -> None:
        if self.ended:
            return
        link = (arguments[-1],) if event.startswith("upstream") else ()
        given = arguments[: len(arguments) - len(link)]
        # As the shell has it: what an event asks for waits for what is being done.
        self.waiting += getattr(self.exchange, event)(*given, self.now, *link)
        if not self.performing:
            self.performing = True
            while self.waiting:
                self.perform(self.waiting.popleft())
            self.performing = False

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
            case HandOver(ongoing, head, early):
                self.exchange = Tunnel(self.judge, LIMITS, ongoing, early, self.now)
                self.tell("start", head)
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
            answer = PLAIN
            if self.answers and seen.method != b"HEAD":
                answer = self.answers.pop(0)
            if self.links.get(link) is server:
                self.tell("upstream_data", server.answer(seen, answer), link)

    @property
    def faults(self) -> list[str]:
        found = [*self.errors, *(fault for server in self.servers for fault in server.faults())]
        found += unasked(self.sent, self.servers)
        if isinstance(self.exchange, Multiplex):
            found += stream_faults(self.client)
        else:
            switched = any(one.switched_at for one in self.servers)
            found += answer_faults(self.client, self.methods, switched=switched)
        return found
