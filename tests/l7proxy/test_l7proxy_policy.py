"""Both sides' http rules must allow a request; what they say names the rules."""

import pytest
from http_transcript import CLIENT, PUBLIC, SERVER, Script, snapshot

from firewall.policy.snapshot import HeaderMatchRow, HttpRuleRow
from firewall.policy.verdict import DropReason, TrafficDirection
from l7proxy.commands import Log, SendUpstream
from l7proxy.plan import Policy
from l7proxy.policy import ConnectionJudge


def ask(source, path=b"/public/a", headers=b"", secrets=None, **limits):
    """Send one request; (was it sent on, its bytes, its record)."""
    script = Script(source, secrets=secrets, **limits)
    request = b"GET %b HTTP/1.1\r\nHost: s\r\n%b\r\n" % (path, headers)
    commands = script.perform("client_data", request) + script.perform("upstream_opened")
    record = next(command.record for command in commands if isinstance(command, Log))
    sent = b"".join(command.data for command in commands if isinstance(command, SendUpstream))
    return bool(sent), sent, record


ANY = (HttpRuleRow(),)
X_ONLY = (HttpRuleRow(path="/x"),)


@pytest.mark.parametrize(
    ("rules", "egress", "path", "allowed"),
    [
        (PUBLIC, None, b"/public/a", True),
        (PUBLIC, ANY, b"/public/a", True),
        (PUBLIC, X_ONLY, b"/public/a", False),
        (ANY, X_ONLY, b"/x", True),
        (X_ONLY, PUBLIC, b"/x", False),
    ],
)
def test_each_side_with_rules_must_allow_the_request(rules, egress, path, allowed):
    assert ask(snapshot(rules, egress=egress), path)[0] is allowed


def test_the_receiver_judges_what_the_sender_made_of_the_request():
    leaving = (HttpRuleRow(header_matches=(HeaderMatchRow("X", mismatch="REPLACE", value="1"),)),)
    arriving = (HttpRuleRow(headers=("X: 1",)),)
    sent, data, _ = ask(snapshot(arriving, egress=leaving), headers=b"X: 2\r\n")
    assert sent
    assert b"x: 1\r\n" in data
    refusing = (HttpRuleRow(headers=("X: 2",)),)
    assert not ask(snapshot(refusing, egress=leaving), headers=b"X: 2\r\n")[0]


def test_the_refusing_side_is_the_direction_of_the_record():
    _, _, record = ask(snapshot(PUBLIC, egress=X_ONLY))
    assert record.judgement.direction is TrafficDirection.EGRESS
    assert record.judgement.drop_reason == DropReason.POLICY_DENIED
    assert [origin.name for origin in record.judgement.denied_by] == ["leaving"]


def test_an_entry_without_rules_lifts_the_restriction():
    """research cilium a.8: the request passes if any gathered entry has no L7."""
    assert ask(snapshot(PUBLIC, plain=True), b"/admin")[0]


@pytest.mark.parametrize("kind", ["dns", "tls", "listener", "unheard-of"])
def test_rules_that_are_not_http_allow_nothing(kind):
    """Fail closed."""
    assert not ask(snapshot(PUBLIC, kind=kind))[0]


def test_a_pattern_that_does_not_compile_allows_nothing():
    assert not ask(snapshot((HttpRuleRow(path="(["),)), b"/([")[0]


def test_an_audited_endpoint_lets_pass_and_says_so():
    allowed, _, record = ask(snapshot(PUBLIC, audit=True), b"/admin")
    assert allowed
    assert record.judgement.detail == "audited"


def test_header_actions_change_what_the_server_gets():
    rules = (
        HttpRuleRow(
            header_matches=(
                HeaderMatchRow("X-Env", mismatch="REPLACE", value="prod"),
                HeaderMatchRow("X-New", mismatch="ADD", value="1"),
                HeaderMatchRow("X-Old", mismatch="DELETE", value="never"),
            )
        ),
    )
    _, sent, _ = ask(snapshot(rules), headers=b"X-Env: dev\r\nX-Env: x\r\nX-Old: y\r\n")
    assert sent == b"GET /public/a HTTP/1.1\r\nHost: s\r\nx-env: prod\r\nx-new: 1\r\n\r\n"


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nb", "a\x00"])
def test_a_header_action_cannot_break_the_head(value):
    """The value may come from a secret file."""
    rules = (HttpRuleRow(header_matches=(HeaderMatchRow("X-A", mismatch="ADD", value=value),)),)
    sent, _, record = ask(snapshot(rules))
    assert not sent
    assert record.status == 500


@pytest.mark.parametrize("name", ["Host", "Content-Length", "Transfer-Encoding", "Connection"])
def test_a_header_action_cannot_change_framing_or_host(name):
    rules = (HttpRuleRow(header_matches=(HeaderMatchRow(name, mismatch="REPLACE", value="5"),)),)
    assert not ask(snapshot(rules))[0]


def test_hop_by_hop_fields_do_not_satisfy_a_rule():
    """`Connection: x-auth` removes it before the rule looks, as it does before the server does."""
    rules = (HttpRuleRow(headers=("X-Auth: yes",)),)
    assert ask(snapshot(rules), headers=b"X-Auth: yes\r\n")[0]
    assert not ask(snapshot(rules), headers=b"X-Auth: yes\r\nConnection: X-Auth\r\n")[0]


@pytest.mark.parametrize("name", [b"X_Auth", b"X.Auth", b"X~Auth"])
def test_names_that_cgi_mistakes_are_refused_where_header_rules_decide(name):
    """RFC 3875 4.1.18."""
    rules = (HttpRuleRow(headers=("X-Auth: yes",)),)
    both = b"X-Auth: yes\r\n%b: no\r\n" % name
    assert not ask(snapshot(rules), headers=both)[0]
    assert ask(snapshot(), headers=both)[0]
    assert name not in ask(snapshot(), headers=both, underscore_names="drop")[1]
    assert ask(snapshot(), headers=both, underscore_names="reject")[2].status == 400


def test_missing_secret_makes_its_rule_match_nothing():
    match = HeaderMatchRow("X-A", secret_namespace="ns", secret_name="name")
    rules = (HttpRuleRow(header_matches=(match,)),)
    assert not ask(snapshot(rules), headers=b"X-A: v\r\n")[0]
    assert ask(snapshot(rules), headers=b"X-A: v\r\n", secrets=lambda *_: b"v")[0]


def test_connection_that_policy_drops_is_not_connected():
    policy = Policy()
    judge = ConnectionJudge(policy, CLIENT, SERVER, 80)
    assert not judge.connection().connected
    policy.install(snapshot())
    assert judge.connection().connected
    assert not ConnectionJudge(policy, CLIENT, SERVER, 81).connection().connected
    policy.install(snapshot(deny=True, revision=2))
    assert judge.connection().denied_by
    assert judge.connection().revision == 12  # of the policies, as flow records name it
