"""From question to answer: who may ask for what, what comes back, what is learnt from it."""

from collections import Counter

import dns.message
import dns.rrset
import pytest
from dns_realm import CLIENT, OTHER, POLICY, SERVER, TCP, UDP, view
from hypothesis import given
from hypothesis import strategies as st

from conntrack.address import parse_address
from firewall.policy.verdict import DropReason, TrafficDirection, Verdict
from l7proxy.accesslog import Ends
from l7proxy.dns_desk import Desk
from l7proxy.dns_policy import NamePolicy
from l7proxy.dns_stream import Frames, framed
from l7proxy.limits import Limits
from l7proxy.metrics import Metrics, Redirects

VISIBLE = """
  - toEntities: [world]
    toPorts: [{ports: [{port: "53", protocol: ANY}]}]
"""


class Proxy:
    """A desk with what it counted and said."""

    def __init__(self, text: str | None = POLICY, *, limits: Limits | None = None, **settings):
        self.policy = NamePolicy()
        if text is not None:
            self.policy.follow(view(text, **settings))
        self.counts: Counter[str] = Counter()
        self.events = []
        self.desk = Desk(
            self.policy,
            limits or Limits(),
            lambda name: self.counts.update([name]),
            self.events.append,
        )

    def begin(self, name="api.example.", kind="A", *, source=CLIENT, protocol=UDP, now=0.0):
        self.wire = dns.message.make_query(name, kind, id=7).to_wire()
        return self.desk.begin(self.wire, Ends(source, 4000, SERVER, 53), protocol, now)


def rcode(reply: bytes) -> int:
    return dns.message.from_wire(reply).rcode()


def answered(wire: bytes, *addresses: str, ttl=30) -> bytes:
    made = dns.message.make_response(dns.message.from_wire(wire))
    name = made.question[0].name
    made.answer = [dns.rrset.from_text(name, ttl, "IN", "A", *addresses)] if addresses else []
    return made.to_wire()


@pytest.mark.parametrize("protocol", [UDP, TCP])
@pytest.mark.parametrize("kind", ["A", "AAAA", "TXT", "HTTPS", "ANY"])
@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("api.example.", True),
        ("API.Example.", True),
        ("x.cdn.example.", True),
        ("cdn.example.", False),
        ("a.b.cdn.example.", False),
        ("evil.org.", False),
        (r"api\.example.", False),
        (".", False),
    ],
)
def test_a_name_is_asked_for_or_refused_whatever_the_type(name, allowed, kind, protocol):
    proxy = Proxy()
    begun = proxy.begin(name, kind, protocol=protocol)
    assert (begun.pending is not None) is allowed
    (event,) = proxy.events
    assert event.verdict == (Verdict.ACCEPT if allowed else Verdict.DROP)
    assert (event.query, event.query_types) == (name.lower(), (kind,))
    if not allowed:
        assert rcode(begun.reply) == 5
        assert event.drop_reason == DropReason.POLICY_DENIED
        assert event.direction == TrafficDirection.EGRESS
        assert [origin.name for origin in event.denied_by] == ["names"]


def test_the_rule_that_means_the_name_is_named():
    proxy = Proxy()
    proxy.begin("x.cdn.example.")
    assert [(o.name, o.path) for o in proxy.events[0].allowed_by] == [
        ("names", "spec.egress[0].toPorts[0]")
    ]


def test_questions_are_counted_as_cilium_counts_them_and_for_their_redirect():
    proxy, metrics, redirects = Proxy(), Metrics(), Redirects()
    proxy.begin()
    proxy.begin("evil.org.", protocol=TCP)
    proxy.desk.begin(proxy.wire + b"\0", Ends(CLIENT, 4000, SERVER, 53), UDP, 0.0)
    for event in proxy.events:
        metrics.asked(event)
        redirects.asked(event)
    found = {
        row["labels"]["rule"]: row["value"]
        for row in metrics.rows()
        if row["labels"].get("proxy_type") == "fqdn"
    }
    assert found == {"received": 3, "forwarded": 1, "denied": 1, "parse_errors": 1}
    usual = {"endpoint": 1, "direction": "egress", "port": 53}
    assert redirects.rows() == [
        usual | {"protocol": TCP, "received": 1, "forwarded": 0, "denied": 1},
        usual | {"protocol": UDP, "received": 2, "forwarded": 1, "denied": 1},
    ]


INSIDE = (
    POLICY.replace("toEntities: [world]", "toEndpoints: [{matchLabels: {app: b}}]")
    + """
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: resolver}
spec:
  endpointSelector: {matchLabels: {app: b}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: a}}]
    toPorts: [{ports: [{port: "53", protocol: ANY}]}]
"""
)


def test_a_resolver_inside_has_ingress_rules_and_the_clients_speak_of_the_name():
    proxy = Proxy(INSIDE)
    ends = Ends(CLIENT, 4000, OTHER, 53)
    for name, rules in (("api.example.", "allowed_by"), ("evil.org.", "denied_by")):
        wire = dns.message.make_query(name, "A", id=7).to_wire()
        proxy.desk.begin(wire, ends, UDP, 0.0)
        event = proxy.events[-1]
        assert event.direction == TrafficDirection.EGRESS
        assert [origin.name for origin in getattr(event, rules)] == ["names"]


def test_nxdomain_instead_of_refused_is_a_setting():
    assert rcode(Proxy(limits=Limits(dns_reject="nameError")).begin("evil.org.").reply) == 3


def test_an_entry_without_names_lifts_the_restriction():
    assert Proxy(POLICY + VISIBLE).begin("evil.org.").pending is not None


def test_who_is_not_redirected_is_not_answered():
    """Another endpoint, or before there is a snapshot: no reply can be drawn out of the proxy."""
    for proxy, source in ((Proxy(), OTHER), (Proxy(None), CLIENT)):
        begun = proxy.begin(source=source)
        assert (begun.reply, begun.pending, begun.close) == (b"", None, True)
        assert proxy.counts == {"dns_not_redirected": 1}


def test_audit_lets_pass_and_says_so():
    proxy = Proxy(policy_audit_mode=True)
    assert proxy.begin("evil.org.").pending is not None
    assert proxy.events[0].detail == "audited"


def test_an_answer_comes_back_under_the_clients_id_and_teaches():
    proxy = Proxy()
    pending = proxy.begin(now=1.0).pending
    pending.number = 99
    wrong = answered(proxy.wire, "192.0.2.66")
    assert proxy.desk.finish(pending, wrong, 1.5) is None
    good = b"\0\x63" + answered(proxy.wire, "192.0.2.1", "192.0.2.2")[2:]
    finished = proxy.desk.finish(pending, good, 2.0)
    assert dns.message.from_wire(finished.reply).id == 7
    lesson = finished.lesson
    assert (lesson.endpoint, lesson.name, lesson.ttl_s) == (1, "api.example.", 30)
    assert set(lesson.addresses) == set(map(parse_address, ("192.0.2.1", "192.0.2.2")))
    assert proxy.counts["dns_mismatched_answers"] == 1
    event = proxy.events[-1]
    assert (event.kind, event.latency_ns, event.ttl_s) == ("response", 1_000_000_000, 30)
    assert proxy.desk.pending_count == 0


def test_a_server_that_only_sends_broken_answers_is_given_up():
    """The first may be forged; each costs time that others wait for."""
    proxy = Proxy()
    pending = proxy.begin().pending
    broken = answered(proxy.wire, "192.0.2.1")[:-1]
    said = [proxy.desk.finish(pending, broken, 1.0) for _ in range(4)]
    assert said[:3] == [None] * 3
    assert (rcode(said[3].reply), said[3].lesson) == (2, None)
    assert proxy.counts["dns_mismatched_answers"] == 4
    assert proxy.events[-1].detail.startswith("the answer is broken: ")
    assert proxy.desk.pending_count == 0
    strange = bytes([broken[0] ^ 1]) + broken[1:]
    patient = proxy.begin().pending
    assert [proxy.desk.finish(patient, strange, 1.0) for _ in range(9)] == [None] * 9


def test_a_rule_revoked_meanwhile_revokes_the_answer():
    """What the server said is not passed on, and nothing is learnt."""
    proxy = Proxy()
    pending = proxy.begin().pending
    proxy.policy.follow(view(POLICY.replace("api.example", "else.example")))
    finished = proxy.desk.finish(pending, answered(proxy.wire, "192.0.2.1"), 1.0)
    assert (rcode(finished.reply), finished.lesson) == (5, None)
    assert proxy.events[-1].verdict == Verdict.DROP


def test_several_questions_and_garbage_are_refused_and_counted():
    proxy = Proxy()
    wire = dns.message.make_query("api.example.", "A", id=7).to_wire()
    two = wire[:4] + b"\0\2" + wire[6:] + wire[12:]
    ends = Ends(CLIENT, 4000, SERVER, 53)
    begun = proxy.desk.begin(two, ends, UDP, 0.0)
    assert begun.reply[3] & 15 == 5
    assert proxy.desk.begin(b"x", ends, UDP, 0.0).reply == b""
    assert proxy.counts["dns_malformed"] == 2
    assert proxy.events[0].detail == "2 questions instead of one"


def test_open_questions_are_bounded_for_each_source_and_in_all():
    for limits in (Limits(dns_pending_count=2), Limits(dns_pending_count_per_source=2)):
        proxy = Proxy(limits=limits)
        first = [proxy.begin().pending for _ in range(2)]
        assert rcode(proxy.begin().reply) == 5
        assert proxy.events[-1].drop_reason == DropReason.DROP_RATE_LIMITED
        proxy.desk.abandon(first[0])
        assert proxy.begin().pending is not None


def test_questions_in_a_second_are_bounded():
    proxy = Proxy(limits=Limits(dns_rate_per_source=10))
    granted = [proxy.begin(now=5.0).pending is not None for _ in range(12)]
    assert granted == [True] * 10 + [False] * 2
    assert proxy.begin(now=5.2).pending is not None
    assert proxy.counts["dns_rate_limited"] == 2


def test_a_question_without_answer_ends_in_silence_one_without_server_in_servfail():
    proxy = Proxy()
    proxy.desk.expire(proxy.begin().pending, 10.0)
    assert rcode(proxy.desk.fail(proxy.begin().pending, "Connection refused", 1.0)) == 2
    assert (proxy.counts["dns_timeouts"], proxy.counts["dns_upstream_failures"]) == (1, 1)
    assert proxy.desk.pending_count == 0


@given(st.binary(max_size=200), st.sampled_from([UDP, TCP]))
def test_any_bytes_have_a_decision(data, protocol):
    proxy = SHARED
    begun = proxy.desk.begin(data, Ends(CLIENT, 4000, SERVER, 53), protocol, 0.0)
    if begun.pending is not None and proxy.desk.finish(begun.pending, data, 0.0) is None:
        proxy.desk.abandon(begun.pending)
    assert proxy.desk.pending_count == 0


SHARED = Proxy()


@given(st.lists(st.binary(max_size=40), max_size=8), st.data())
def test_messages_on_a_stream_do_not_depend_on_where_it_is_cut(messages, data):
    stream = b"".join(map(framed, messages))
    frames, found = Frames(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        frames.add(stream[:size])
        stream = stream[size:]
        while (message := frames.take()) is not None:
            found.append(message)
    assert found == messages
