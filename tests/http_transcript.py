"""Transcripts of exchanges: what the world tells an exchange (`>>`), what it asks for (`<<`).

    >> client "GET /public/a HTTP/1.1\\r\\nHost: s\\r\\n\\r\\n"
    << log request GET /public/a
    << open
    >> opened
    << upstream "GET /public/a HTTP/1.1\\r\\nHost: s\\r\\n\\r\\n"

The events are performed, the commands are written down in the same form, and the two texts must be
equal; a mismatch is shown as a diff. Policy is real: a snapshot with http rules for one endpoint.
"""

import ast
import difflib

from firewall.policy.snapshot import (
    DirectionRow,
    EndpointRow,
    EntryRow,
    HttpRuleRow,
    IdentityRow,
    L7Row,
    OriginRow,
    PolicyRow,
    Snapshot,
)
from l7proxy.commands import (
    CloseClient,
    CloseUpstream,
    ConnectFailure,
    Count,
    HandOver,
    Log,
    OpenUpstream,
    PauseClient,
    PauseUpstream,
    RecordKind,
    ResumeClient,
    ResumeUpstream,
    SendClient,
    SendUpstream,
    ShutdownClient,
    ShutdownUpstream,
)
from l7proxy.exchange import Exchange
from l7proxy.limits import Limits
from l7proxy.plan import Policy
from l7proxy.policy import ConnectionJudge

CLIENT = bytes((10, 0, 1, 1))
SERVER = bytes((10, 0, 2, 1))
CLIENT_IDENTITY, SERVER_IDENTITY = 1001, 1002

PUBLIC = (HttpRuleRow(method="GET", path="/public/.*"), HttpRuleRow(method="GET", path="/"))
"""The policy of the corpus."""

ORIGIN = OriginRow("CiliumNetworkPolicy", "default", "public", "spec.ingress[0]", "p.yaml", 3, 1)
EGRESS_ORIGIN = OriginRow("CiliumNetworkPolicy", "default", "leaving", "spec.egress[0]")

OK = r'"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"'
DENIED = (
    r'"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: 15\r\n\r\n'
    r'Access denied\r\n"'
)
DENIED_CLOSE = (
    r'"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: 15\r\n'
    r'Connection: close\r\n\r\nAccess denied\r\n"'
)
BAD_REQUEST = (
    r'"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 13\r\n'
    r'Connection: close\r\n\r\nBad Request\r\n"'
)
GET = r'"GET /public/a HTTP/1.1\r\nHost: s\r\n\r\n"'
GET_ADMIN = r'"GET /admin HTTP/1.1\r\nHost: s\r\n\r\n"'


def _entry(l7: int, origin: int, action: int = 1) -> EntryRow:
    return EntryRow(
        action=action,
        tier=200,
        priority=0.0,
        selector=0,
        protocol=6,
        port_low=80,
        port_high=80,
        port_name="",
        l7=l7,
        origin=origin,
    )


def snapshot(
    rules=PUBLIC, *, egress=None, revision=1, plain=False, deny=False, audit=False, kind="http"
):
    """A snapshot where the server admits `rules` at port 80, and the client may send `egress`.

    `plain`: a second entry allows the port without rules; `deny`: one denies it.
    """
    entries = [] if rules is None else [_entry(0, 0)]
    if plain:
        entries.append(_entry(-1, 0))
    if deny:
        entries.append(_entry(-1, 0, action=2))
    open_row = DirectionRow(enforced=False, default_deny=False)
    leaving = open_row
    if egress is not None:
        leaving = DirectionRow(True, True, (_entry(1, 1),), (1,))
    return Snapshot(
        revision=revision,
        policy_revision=10 + revision,
        endpoints=(
            EndpointRow(1, "client", "default", CLIENT_IDENTITY, (CLIENT,)),
            EndpointRow(2, "server", "default", SERVER_IDENTITY, (SERVER,), audit=audit),
        ),
        identities=(
            IdentityRow(CLIENT_IDENTITY, ("k8s:app=client",), ()),
            IdentityRow(SERVER_IDENTITY, ("k8s:app=server",), ()),
        ),
        policies=(
            PolicyRow(CLIENT_IDENTITY, open_row, leaving),
            PolicyRow(SERVER_IDENTITY, DirectionRow(True, True, tuple(entries), (0,)), open_row),
        ),
        l7=(L7Row(kind, http=tuple(rules or ())), L7Row("http", http=tuple(egress or ()))),
        origins=(ORIGIN, EGRESS_ORIGIN),
    )


class Script:
    """One exchange and the transcript of it."""

    def __init__(self, source=None, *, secrets=None, secure=False, **limits) -> None:
        self.policy = Policy(secrets)
        if source is not None:
            self.policy.install(source)
        self.now = 1000.0
        self.limits = Limits(**({"request_id": False, "log_headers": ()} | limits))
        judge = ConnectionJudge(self.policy, CLIENT, SERVER, 80)
        self.exchange = Exchange(judge, self.limits, lambda: "id-1", self.now, secure=secure)
        self.commands = []
        self.lines = []

    def perform(self, event, *arguments):
        """Tell the exchange one thing; keep the commands."""
        commands = getattr(self.exchange, event)(*arguments, self.now)
        self.commands += commands
        return commands

    def check(self, text: str) -> None:
        """Run the events of a transcript; the commands must be those it says."""
        wanted = [line.strip() for line in text.strip().splitlines() if line.strip()]
        wanted = [line for line in wanted if not line.startswith("#")]
        got = []
        for line in wanted:
            if line.startswith(">> "):
                got.append(line)
                got += [f"<< {written(command)}" for command in self._event(line[3:])]
        if got != wanted:
            diff = difflib.unified_diff(wanted, got, "transcript", "exchange", lineterm="", n=20)
            raise AssertionError("\n" + "\n".join(diff))

    def _event(self, line: str):
        word, _, rest = line.partition(" ")
        match word:
            case "client" | "upstream":
                return self.perform(f"{word}_data", _bytes(rest))
            case "client-ended" | "client-lost" | "upstream-ended" | "upstream-lost":
                return self.perform(word.replace("-", "_"))
            case "client-blocked" | "upstream-blocked":
                return self.perform(word.replace("-", "_"), rest == "yes")
            case "opened":
                return self.perform("upstream_opened")
            case "failed":
                return self.perform("upstream_failed", ConnectFailure[rest.upper()])
            case "wait":
                self.now += float(rest)
                return self.perform("tick")
            case "drain" | "finish":
                return self.perform(word)
            case "policy":
                return self.perform("policy_changed")
        raise AssertionError(f"unknown event {line}")


def _bytes(text: str) -> bytes:
    """A Python string literal, perhaps followed by `* N`."""
    literal, _, count = text.partition(" * ")
    return ast.literal_eval(literal).encode("latin-1") * int(count or 1)


def _quoted(data: bytes) -> str:
    text = data.decode("latin-1").encode("unicode_escape").decode("ascii").replace('"', '\\"')
    return f'"{text}"' if len(data) < 2000 else f"{len(data)} bytes"


def written(command) -> str:
    """A command as a transcript has it."""
    match command:
        case SendClient(data):
            return f"client {_quoted(data)}"
        case SendUpstream(data):
            return f"upstream {_quoted(data)}"
        case OpenUpstream():
            return "open"
        case CloseUpstream(reset):
            return "close-upstream reset" if reset else "close-upstream"
        case ShutdownClient():
            return "shutdown"
        case CloseClient(reset):
            return "close reset" if reset else "close"
        case PauseClient():
            return "pause-client"
        case ResumeClient():
            return "resume-client"
        case PauseUpstream():
            return "pause-upstream"
        case ResumeUpstream():
            return "resume-upstream"
        case ShutdownUpstream():
            return "shutdown-upstream"
        case HandOver(_, head, early):
            return f"hand-over {_quoted(head)} {_quoted(early)}"
        case Count(name):
            return f"count {name}"
        case Log(record):
            parts = ["log", RecordKind(record.kind).name.lower(), record.method, record.path]
            parts += [str(record.status or ""), record.flag, record.detail]
            return " ".join(part for part in parts if part)
    raise AssertionError(f"unknown command {command}")
