"""What the resolver keeps, refuses and forgets."""

import pytest
from policy.stage import Stage

from conntrack.address import parse_prefix
from firewall.policy.model import (
    Listener,
    ObjectKey,
    Origin,
    PolicyEntry,
    PolicyObject,
    TlsContext,
)
from firewall.policy.readers import CAPABILITIES, ReaderSettings, read
from firewall.policy.resolve import ENFORCEMENT_ALWAYS, ENFORCEMENT_INIT, Resolver
from firewall.policy.snapshot import EndpointRow, L7Row, Settings
from firewall.policy.snapshot_file import decode, encode
from firewall.policy.verdict import TrafficDirection, Verdict

_SETTINGS = ReaderSettings(enforceable=frozenset(CAPABILITIES))
_COMMON = ["k8s:io.kubernetes.pod.namespace=default", "k8s:io.cilium.k8s.policy.cluster=default"]


def policies(text):
    result = read(text, "t.yaml", settings=_SETTINGS)
    assert not result.errors, list(map(str, result.errors))
    return result.objects


def policy(name, app, rules):
    [one] = policies(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\n"
        f"metadata: {{name: {name}}}\n"
        f"spec: {{endpointSelector: {{matchLabels: {{app: {app}}}}}, {rules}}}\n"
    )
    return one


def key(name):
    return ObjectKey(kind="CiliumNetworkPolicy", namespace="default", name=name)


@pytest.fixture
def made():
    found = Stage()
    for at, name in enumerate(("web", "db")):
        found.endpoint(name, f"10.0.0.{at + 1}", [f"k8s:app={name}", *_COMMON])
    return found


def rows_of(snapshot):
    return {row.identity: row for row in snapshot.policies}


def test_a_change_leaves_the_rows_of_others_as_they_are(made):
    made.apply(policy("a", "web", "ingress: [{fromEndpoints: [{}]}]"))
    before = made.snapshot()
    made.apply(policy("b", "db", "egress: [{toCIDR: [192.0.2.0/24]}]"))
    after = made.snapshot()
    web, db = made.number_of("web"), made.number_of("db")
    assert rows_of(after)[web] is rows_of(before)[web]
    assert rows_of(after)[db] is not rows_of(before)[db]
    unchanged = [row for row in after.identities if any(row is old for old in before.identities)]
    assert len(unchanged) == len(before.identities)


def test_endpoints_with_the_same_labels_share_their_rows(made):
    made.endpoint("web2", "10.0.0.9", ["k8s:app=web", *_COMMON])
    made.apply(policy("a", "web", "ingress: [{}]"))
    assert len(made.snapshot().policies) == 2


def test_what_only_a_deleted_policy_used_is_forgotten(made):
    made.apply(
        policy("a", "web", "egress: [{toCIDR: [192.0.2.0/24]}, {toFQDNs: [{matchName: x.io}]}]"),
        policy("b", "web", "egress: [{toCIDR: [198.51.100.0/24]}]"),
    )
    assert made.resolver.prefixes() == {
        parse_prefix("192.0.2.0/24"),
        parse_prefix("198.51.100.0/24"),
    }
    assert made.resolver.fqdns() == {"x.io"}
    made.delete(key("a"))
    assert made.resolver.prefixes() == {parse_prefix("198.51.100.0/24")}
    assert made.resolver.fqdns() == set()
    names = {row.name for row in made.snapshot().origins}
    assert names == {"b", ""}, "the place of a freed origin is blank until another takes it"


def test_freed_places_are_taken_by_the_next(made):
    for turn in range(20):
        made.apply(policy("a", "web", f"egress: [{{toCIDR: [192.0.{turn}.0/24]}}]"))
        snapshot = made.snapshot()
    assert len(snapshot.origins) <= 2
    assert len(made.resolver.selectors) == 1


def test_an_object_isolates_once_however_many_rules_it_has(made):
    made.apply(policy("a", "web", "ingress: [{fromEndpoints: [{}]}, {fromEntities: [host]}]"))
    made.apply(*(policy(f"p{at:02}", "web", "ingress: [{}]") for at in range(20)))
    row = rows_of(made.snapshot())[made.number_of("web")]
    assert len(row.ingress.isolated_by) == 8, "they travel with every denied flow"
    assert row.ingress.isolated_by[0] != row.ingress.isolated_by[1]


def test_settings_and_missing_labels_isolate_by_name():
    made = Stage(settings=Settings(enforcement="always"))
    made.endpoint("web", "10.0.0.1", ["k8s:app=web", *_COMMON])
    side = made.decide("192.0.2.1", "web", "TCP", 80).ingress
    assert side.isolated_by == (ENFORCEMENT_ALWAYS,)
    made = Stage()
    made.endpoint("new", "10.0.0.1", ["reserved:init"])
    side = made.decide("192.0.2.1", "new", "TCP", 80).ingress
    assert side.isolated_by == (ENFORCEMENT_INIT,)


def entry(path, **fields):
    [like] = policy(
        "x",
        "web",
        "egress: [{toEndpoints: [{}], toPorts: [{ports: [{port: '443', protocol: TCP}]}]}]",
    ).entries
    own = {name: getattr(like, name) for name in PolicyEntry.__dataclass_fields__}
    return PolicyEntry(
        **own | {"origin": Origin(kind="T", namespace="", name="t", path=path)} | fields
    )


def context(name):
    return TlsContext(secret_namespace="n", secret_name=name)


def listener(name, priority):
    return Listener(config_kind="E", config_name="e", name=name, priority=priority)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"terminating_tls": context("a")}, {"terminating_tls": context("b")}, "terminating TLS"),
        ({"originating_tls": context("a")}, {"originating_tls": context("b")}, "originating TLS"),
        ({"authentication": "disabled"}, {"authentication": "required"}, "authentication types"),
        ({"listener": listener("a", 1)}, {"listener": listener("b", 1)}, "listeners"),
        ({"listener": listener("a", 1)}, {"listener": listener("b", 2)}, None),
        ({"terminating_tls": context("a")}, {"terminating_tls": context("a")}, None),
        ({"authentication": "required"}, {}, None),
        ({"authentication": "disabled"}, {"authentication": "required", "ports": None}, None),
    ],
)
def test_rules_about_one_peer_and_port_must_not_contradict_each_other(made, one, other, message):
    """Research a.8, table of merges."""
    first, second = entry("[0]", **one), entry("[1]", **other)
    made.apply(PolicyObject(key=key("t"), entries=(first, second)))
    made.snapshot()
    found = made.resolver.errors
    if message is None:
        assert not found
        return
    [error] = found
    assert message in error.message
    assert (error.first.path, error.second.path) == ("[0]", "[1]")
    assert error.direction is TrafficDirection.EGRESS
    assert made.decide("web", "db", "TCP", 443).verdict is Verdict.DROP, "it had no policy: closed"


def test_an_error_keeps_the_old_rows_alive_and_correct(made):
    """The kept rows name selectors, rules and origins that no object holds any more."""
    made.apply(policy("a", "web", "egress: [{toCIDR: [192.0.2.0/24]}]"))
    assert made.decide("web", "192.0.2.1", "TCP", 1).verdict is Verdict.ACCEPT
    clash = (entry("[0]", authentication="disabled"), entry("[1]", authentication="required"))
    made.apply(PolicyObject(key=key("a"), entries=clash))
    for turn in range(5):
        made.apply(policy("b", "db", f"egress: [{{toCIDR: [198.51.{turn}.0/24]}}]"))
        view = made.view
        decision = made.decide("web", "192.0.2.1", "TCP", 1, view)
        assert decision.verdict is Verdict.ACCEPT
        assert [origin.name for origin in decision.egress.allowed_by] == ["a"]
        assert made.decide("web", "198.51.100.1", "TCP", 1, view).verdict is Verdict.DROP
    made.delete(key("a"))
    assert made.decide("web", "198.51.100.1", "TCP", 1).verdict is Verdict.ACCEPT


def test_contradictions_between_peers_are_none(made):
    """http for one selector, dns for another is valid (l4_filter_test.go case 9b)."""
    rules = (
        "egress: [{toEndpoints: [{matchLabels: {app: db}}], toPorts: [{ports: [{port: '53', "
        "protocol: TCP}], rules: {dns: [{matchPattern: '*'}]}}]}, {toEndpoints: [{}], toPorts: "
        "[{ports: [{port: '53', protocol: TCP}], rules: {http: [{}]}}]}]"
    )
    made.apply(policy("a", "web", rules))
    side = made.decide("web", "db", "TCP", 53).egress
    assert not made.resolver.errors
    assert {row.kind for row in side.l7} == {"http", "dns"}


def test_an_endpoint_needs_a_known_identity():
    with pytest.raises(KeyError, match="identity 300"):
        Resolver().set_endpoints([EndpointRow(1, "e", "", 300, ())])


def test_l7_of_every_kind_survives_the_disk(made):
    made.apply(
        policy(
            "a",
            "web",
            "egress: [{toPorts: [{ports: [{port: '443', protocol: TCP}], serverNames: [x.io], "
            "originatingTLS: {secret: {name: s, namespace: n}}}]}, {toPorts: [{ports: "
            "[{port: '80', protocol: TCP}], rules: {http: [{headers: ['A: b'], headerMatches: "
            "[{name: c, value: d, mismatch: LOG}]}]}}]}]",
        )
    )
    snapshot = made.snapshot()
    again = decode(encode(snapshot))
    assert again == snapshot
    tls, http = again.l7
    assert (tls.kind, tls.server_names, tls.originating_tls.secret_name) == ("tls", ("x.io",), "s")
    assert http.http[0].header_matches[0].mismatch == "LOG"
    assert isinstance(http, L7Row)
