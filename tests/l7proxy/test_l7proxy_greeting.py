"""How connections begin on a port with TLS rules, and what passes unread afterwards."""

import hellos
import msgspec
import pytest
from http_transcript import CLIENT, SERVER, snapshot, written

from firewall.policy.course import CLEAR, Course
from firewall.policy.snapshot import HttpRuleRow, L7Row, TlsContextRow
from l7proxy.commands import CloseClient, ConnectFailure, Enter, Log, RecordKind, SendUpstream
from l7proxy.greeting import Greeting
from l7proxy.limits import Limits
from l7proxy.passage import Passage
from l7proxy.plan import Policy
from l7proxy.policy import ConnectionJudge
from l7proxy.second_hello import SecondHello

NAME = "a.example"
HELLO = hellos.real(NAME)
NAMES = L7Row("tls", server_names=(NAME,))
INSIDE = TlsContextRow("n", "s")
ENDS = L7Row("http", http=(HttpRuleRow(),), terminating_tls=INSIDE)


def rules(*rows, revision=1, **options):
    """A snapshot with one entry for each row at the server's port."""
    made = snapshot(revision=revision, **options)
    replace = msgspec.structs.replace
    client, server = made.policies
    entry = server.ingress.entries[0]
    kept = server.ingress.entries[1:]
    entries = tuple(replace(entry, l7=number) for number in range(len(rows))) + kept
    server = replace(server, ingress=replace(server.ingress, entries=entries))
    return replace(made, policies=(client, server), l7=rows)


class Beginning:
    """A greeting, and what it asked for."""

    def __init__(self, *rows, source=None, **limits) -> None:
        self.policy = Policy()
        self.policy.install(source or rules(*rows))
        self.judge = ConnectionJudge(self.policy, CLIENT, SERVER, 80)
        self.limits = Limits(**limits)
        self.now = 100.0
        self.core = Greeting(self.judge, self.limits, self.now)
        self.commands = self.core.start(self.now)

    def tell(self, event, *arguments):
        found = getattr(self.core, event)(*arguments, self.now)
        self.commands += found
        return found

    @property
    def entered(self):
        return [command for command in self.commands if isinstance(command, Enter)]

    @property
    def records(self):
        return [command.record for command in self.commands if isinstance(command, Log)]

    @property
    def reset(self):
        return CloseClient(reset=True) in self.commands


def test_an_allowed_name_enters_with_every_byte():
    begun = Beginning(NAMES)
    for start in range(0, len(HELLO), 100):
        begun.tell("client_data", HELLO[start : start + 100])
    (enter,) = begun.entered
    assert (enter.course, enter.data) == (Course(http=False), HELLO)
    assert enter.hello.server_name == NAME
    assert begun.core.deadline == float("inf")


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (hellos.real("b.example"), "server_name_denied"),
        (hellos.real(None), "server_name_denied"),
        (b"GET / HTTP/1.1\r\n\r\n", "clear_text_denied"),
        (b"\x16\x02", "client_hello_refused{the record's version is no TLS}"),
        (hellos.made(hellos.server_name(b"a.example.")), "client_hello_refused{the server name"),
    ],
)
def test_what_is_refused_is_reset_with_one_record(data, detail):
    begun = Beginning(NAMES)
    begun.tell("client_data", data)
    assert begun.reset
    assert not begun.entered
    (record,) = begun.records
    assert record.detail.startswith(detail)
    assert begun.tell("client_data", HELLO) == []
    if detail.endswith("_denied"):
        assert [origin.name for origin in record.judgement.denied_by] == ["public"]


def test_a_hello_that_dribbles_is_not_waited_for_longer():
    begun = Beginning(NAMES, first_byte_timeout_s=15.0)
    for byte in HELLO[:14]:
        begun.tell("client_data", bytes([byte]))
        begun.now += 1
    begun.tell("tick")
    assert not begun.reset
    begun.now += 1
    begun.tell("tick")
    assert begun.reset
    assert begun.records[0].detail == "client_hello_timeout"


def test_clear_text_enters_where_a_rule_of_the_port_allows_it():
    begun = Beginning(NAMES, L7Row("http", http=(HttpRuleRow(),)))
    begun.tell("client_data", b"GET")
    assert begun.entered == [Enter(Course(http=True), None, b"GET")]


def test_where_nothing_is_restricted_the_server_may_speak_first():
    begun = Beginning(source=rules(NAMES, plain=True))
    assert begun.entered == [Enter(Course(http=False), None, b"")]


def test_encrypted_hellos_are_refused_by_setting_unless_nothing_is_restricted():
    hello = hellos.made(hellos.server_name(NAME.encode()), hellos.extension(0xFE0D, b"x"))
    for choice, passes in (("allow", True), ("deny", False)):
        begun = Beginning(NAMES, encrypted_client_hello=choice)
        begun.tell("client_data", hello)
        assert bool(begun.entered) is passes


def test_audit_mode_lets_pass_and_says_so():
    begun = Beginning(source=rules(NAMES, audit=True))
    begun.tell("client_data", hellos.real("b.example"))
    assert begun.entered[0].course == Course(http=False)
    assert begun.judge.opening().detail == "audited"


def test_tls_that_ends_here_stays_in_charge_until_the_handshake_is_done():
    begun = Beginning(ENDS, tls_handshake_timeout_s=5.0)
    begun.tell("client_data", HELLO)
    assert begun.entered[0].course == Course(True, INSIDE)
    assert begun.core.deadline == begun.now + 5
    begun.now += 5
    begun.tell("tick")
    assert begun.reset
    assert begun.records[0].detail == "tls_handshake_timeout"
    assert begun.records[0].server_name == NAME


def test_a_snapshot_that_takes_the_name_away_ends_the_handshake_too():
    begun = Beginning(ENDS)
    begun.tell("client_data", HELLO)
    begun.policy.install(rules(NAMES, revision=2, deny=True))
    begun.tell("policy_changed")
    assert begun.reset


def test_a_course_that_asks_for_more_ends_the_connection_and_one_that_asks_for_less_does_not():
    begun = Beginning(NAMES)
    begun.tell("client_data", HELLO)
    for revision, rows, connected in (
        (2, (NAMES, L7Row("tls", server_names=("b.example",))), True),
        (3, (ENDS,), False),
        (4, (L7Row("tls", server_names=("b.example",)),), False),
        (5, (NAMES,), True),
    ):
        begun.policy.install(rules(*rows, revision=revision))
        assert begun.judge.connection().connected is connected, rows


def test_without_a_snapshot_nothing_begins():
    judge = ConnectionJudge(Policy(), CLIENT, SERVER, 80)
    assert not judge.looks
    assert judge.take(CLEAR) is None
    greeting = Greeting(judge, Limits(), 0.0)
    assert CloseClient(reset=True) in greeting.start(0.0)


# --- what passes unread -----------------------------------------------------------------------


class Passing(Beginning):
    """A passage after an allowed hello."""

    def __init__(self, **limits) -> None:
        super().__init__(NAMES, **limits)
        self.tell("client_data", HELLO)
        watch = SecondHello(NAME, self.limits.client_hello_bytes)
        self.core = Passage(self.judge, self.limits, "TLS", watch, self.now)
        self.commands = self.core.start(len(HELLO), HELLO, self.now)

    def said(self, event, *arguments):
        return [written(command) for command in self.tell(event, *arguments)]


def test_a_passage_from_hello_to_both_ends():
    passing = Passing()
    assert [written(command) for command in passing.commands] == ["log request", "open"]
    (hello,) = passing.tell("upstream_opened")
    assert hello == SendUpstream(HELLO)
    answer = hellos.records(b"\x02" + bytes(60))
    assert passing.said("upstream_data", answer) == [written_client(answer)]
    assert passing.said("client_data", b"anything") == ['upstream "anything"']
    assert passing.said("client_ended") == ["shutdown-upstream"]
    assert passing.said("upstream_data", b"rest") == ['client "rest"']
    passing.now += 2
    assert passing.said("upstream_ended") == ["log response", "close-upstream", "close"]
    record = passing.records[-1]
    assert (record.kind, record.authority, record.protocol) == (RecordKind.RESPONSE, NAME, "TLS")
    assert record.received_bytes == len(HELLO) + len(b"anything")
    assert record.sent_bytes == len(answer) + len(b"rest")
    assert record.duration_s == 2


def written_client(data):
    from l7proxy.commands import SendClient

    return written(SendClient(data))


def test_who_is_too_quick_is_paused():
    passing = Passing(buffer_bytes=len(HELLO) + 1000)  # 1.5 kB with ML-KEM (OpenSSL 3.5)
    assert passing.said("client_data", bytes([23, 3, 3, 4, 0]) + bytes(1024)) == ["pause-client"]
    assert passing.said("upstream_opened")[-1] == "resume-client"
    assert passing.said("upstream_blocked", True) == ["pause-client"]
    assert passing.said("upstream_blocked", False) == ["resume-client"]
    assert passing.said("client_blocked", True) == ["pause-upstream"]
    assert passing.said("client_blocked", False) == ["resume-upstream"]


@pytest.mark.parametrize(
    ("event", "arguments", "detail"),
    [
        ("upstream_failed", (ConnectFailure.REFUSED,), "upstream_reset_before_response_started"),
        ("upstream_failed", (ConnectFailure.TLS,), "upstream_reset_before_response_started"),
        ("upstream_lost", (), "upstream_reset_after_response_started{termination}"),
        ("client_lost", (), "downstream_remote_disconnect"),
        ("client_data", (hellos.real("b.example"),), "client_hello_refused{the second"),
    ],
)
def test_each_way_to_end_is_told(event, arguments, detail):
    passing = Passing()
    passing.tell(event, *arguments)
    assert passing.records[-1].detail.startswith(detail)
    assert passing.reset is (event != "client_lost")
    assert not [command for command in passing.commands if isinstance(command, SendUpstream)]
    assert passing.tell("client_data", b"more") == []


def test_a_passage_ends_when_idle_or_forbidden():
    passing = Passing(tunnel_idle_timeout_s=60.0)
    passing.tell("upstream_opened")
    passing.now += 59
    passing.tell("upstream_data", b"x")
    passing.now += 59
    passing.tell("tick")
    assert not passing.reset
    passing.policy.install(rules(L7Row("tls", server_names=("b.example",)), revision=2))
    assert passing.said("policy_changed") == ["log response UAEX connection_denied",
                                              "close-upstream reset", "close reset"]  # fmt: skip
    idle = Passing(tunnel_idle_timeout_s=60.0)
    idle.tell("upstream_opened")
    idle.now += 60
    idle.tell("tick")
    assert idle.records[-1].detail == "stream_idle_timeout"
