"""Why: the rule that decided or came closest, what failed, and a change that really helps."""

import msgspec
import pytest
import yaml
from policy.stage import PROTOCOLS, Stage

from firewall.policy.explain import explain
from firewall.policy.explanation import Request, render
from firewall.policy.http_match import HttpMatcher
from firewall.policy.readers import CAPABILITIES, ReaderSettings, read
from firewall.policy.snapshot import HttpRuleRow, Settings
from firewall.policy.view import View

_SETTINGS = ReaderSettings(enforceable=frozenset(CAPABILITIES))
_COMMON = ["k8s:io.kubernetes.pod.namespace=default", "k8s:io.cilium.k8s.policy.cluster=default"]
_OTHER = ["k8s:io.kubernetes.pod.namespace=rebels", "k8s:io.cilium.k8s.policy.cluster=default"]
RULE = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata:
  name: rule1
spec:
  endpointSelector:
    matchLabels: {org: empire, class: deathstar}
  ingress:
  - fromEndpoints:
    - matchLabels: {org: empire}
    toPorts:
    - ports: [{port: "80", protocol: TCP}]
      rules:
        http:
        - {method: POST, path: "/v1/request-landing"}
        - {method: GET, path: "/v1/.*", headers: ["X-Token: 1"]}
  - fromCIDRSet:
    - {cidr: 192.0.2.0/24, except: [192.0.2.128/25]}
"""


def stage(*texts, **settings):
    made = Stage(settings=Settings(**settings))
    for name, address, labels in (
        ("deathstar", "10.0.0.1", ["k8s:org=empire", "k8s:class=deathstar", *_COMMON]),
        ("tiefighter", "10.0.0.2", ["k8s:org=empire", "k8s:class=tiefighter", *_COMMON]),
        ("xwing", "10.0.0.3", ["k8s:org=alliance", "k8s:class=xwing", *_COMMON]),
        ("ywing", "10.0.0.4", ["k8s:org=empire", "k8s:class=ywing", *_OTHER]),
    ):
        made.endpoint(name, address, labels, namespace="default")
    for at, text in enumerate(texts):
        result = read(text, f"rule{at + 1}.yaml", settings=_SETTINGS)
        assert not result.errors, list(map(str, result.errors))
        made.apply(*result.objects)
    return made


def ask(made, source, destination, at=("TCP", 80), request=None):
    protocol, port = at
    traffic = (
        made.address(source),
        made.address(destination),
        PROTOCOLS[protocol],
        port,
    )
    view = View(made.snapshot())
    return explain(view, made.resolver.selectors, traffic, request)


def test_the_starwars_denial_reads_as_promised():
    where = "CiliumNetworkPolicy default/rule1  spec.ingress[0].toPorts[0]  rule1.yaml:12:7"
    assert render(ask(stage(RULE), "xwing", "deathstar")).splitlines() == [
        "DENIED default/xwing -> default/deathstar 80/TCP",
        "  egress of default/xwing: allowed, no policy for this direction",
        "  ingress of default/deathstar: denied, default deny",
        "    isolated by   CiliumNetworkPolicy default/rule1  rule1.yaml:12:7",
        f"    closest rule  allow by {where}",
        "                  peer wanted org=empire, found org=alliance",
        "                  port ok: 80/TCP",
        "    to allow      add - matchLabels: {org: alliance} under fromEndpoints",
    ]


@pytest.mark.parametrize(
    ("source", "at", "what", "wanted", "change"),
    [
        ("xwing", ("TCP", 80), "peer", ("org=empire", "org=alliance"), "{org: alliance}"),
        ("ywing", ("TCP", 80), "peer", ("namespace=default", "namespace=rebels"), "rebels"),
        ("tiefighter", ("TCP", 81), "port", ("80/TCP", "81/TCP"), 'port: "81"'),
        ("tiefighter", ("UDP", 80), "port", ("80/TCP", "80/UDP"), "protocol: UDP"),
        ("tiefighter", ("ICMP", 8), "port", ("80/TCP", "type 8/ICMP"), "type: 8"),
        ("198.51.100.1", ("TCP", 80), "peer", ("192.0.2.0/24", "198.51.100.1"), ".1/32"),
        ("192.0.2.200", ("TCP", 80), "peer", ("192.0.2.0/24", "except 192.0.2.128/25"), "/32"),
    ],
)
def test_the_one_condition_that_failed_is_named(source, at, what, wanted, change):
    side = ask(stage(RULE), source, "deathstar", at).ingress
    assert side.verdict == "denied"
    assert (side.failed.what, side.failed.held) == (what, False)
    assert wanted[0] in side.failed.expected
    assert wanted[1] in side.failed.actual
    assert change in side.change


def test_a_refused_request_is_held_against_the_nearest_http_item():
    request = Request(b"GET", b"/v1/plans?all=1", b"deathstar", [(b"x-token", b"2")])
    side = ask(stage(RULE), "tiefighter", "deathstar", request=request).ingress
    assert (side.verdict, side.because) == (
        "denied",
        "the proxy refuses the request: no http rule allows it",
    )
    assert side.failed.what == "header"
    assert side.failed.actual == "2"
    assert side.closest.decided
    assert side.change == (
        "add - {method: GET, path: '/v1/.*', headers: ['X-Token: 2']} under rules.http"
    )


@pytest.mark.parametrize(
    "request_",
    [
        Request(b"PUT", b"/v1/exhaust-port"),
        Request(b"POST", b"/a.b?x=[1]&y='z'"),
        Request(b"DELETE", b"/v1/request-landing"),
    ],
)
def test_the_suggested_http_item_allows_the_request_and_nothing_near(request_):
    side = ask(stage(RULE), "tiefighter", "deathstar", request=request_).ingress
    item = yaml.safe_load(side.change.removeprefix("add ").removesuffix(" under rules.http"))[0]
    matcher = HttpMatcher((HttpRuleRow(**item),))
    assert matcher.match(*request_) is not None
    assert matcher.match(request_.method, request_.path + b"x", b"", ()) is None
    assert matcher.match(b"PATCH", request_.path, b"", ()) is None


@pytest.mark.parametrize("source", ["xwing", "ywing", "198.51.100.1", "192.0.2.200"])
def test_the_suggested_peer_opens_the_door(source):
    """The change, pasted where it says, makes the same question come out allowed."""
    side = ask(stage(RULE), source, "deathstar").ingress
    added, _, field = side.change.removeprefix("add ").rpartition(" under ")
    document = yaml.safe_load(RULE)
    entry = {field: yaml.safe_load(added)}
    document["spec"]["ingress"].append(entry)
    assert ask(stage(yaml.safe_dump(document)), source, "deathstar").verdict == "allowed"


def test_an_allow_names_its_rule():
    found = ask(stage(RULE), "192.0.2.3", "deathstar")
    [step] = [step for step in found.ingress.steps if step.decided]
    assert (found.verdict, step.rule.path, step.rule.line) == ("allowed", "spec.ingress[1]", 17)
    assert found.egress is None
    assert not found.ingress.change


def test_a_deny_is_named_even_where_an_allow_matches():
    deny = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: never}
spec:
  endpointSelector: {}
  ingressDeny:
  - fromCIDR: [192.0.2.0/24]
"""
    side = ask(stage(RULE, deny), "192.0.2.3", "deathstar").ingress
    assert (side.because, side.closest.rule.name, side.closest.action) == (
        "a deny rule",
        "never",
        "deny",
    )
    assert {one.name for one in side.isolated_by} == {"rule1", "never"}


def test_without_any_rule_the_change_is_a_whole_rule():
    side = ask(stage(enforcement="always"), "xwing", "deathstar").ingress
    assert [one.name for one in side.isolated_by] == ["enforcement always"]
    assert side.steps == ()
    assert side.change.startswith("add an ingress rule with - matchLabels: {class: xwing,")


def test_an_audited_denial_is_explained_like_a_denial():
    found = ask(stage(RULE, policy_audit_mode=True), "xwing", "deathstar")
    assert found.verdict == "audited"
    assert found.ingress.because == "default deny; audit mode lets it pass"
    assert "{org: alliance}" in found.ingress.change


def test_kubernetes_policies_get_kubernetes_words():
    policy = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: np, namespace: default}
spec:
  podSelector: {matchLabels: {class: deathstar}}
  ingress:
  - from: [{podSelector: {matchLabels: {class: tiefighter}}}]
    ports: [{port: 80, protocol: TCP}]
"""
    side = ask(stage(policy), "xwing", "deathstar").ingress
    assert "podSelector: {matchLabels: {class: xwing" in side.change
    side = ask(stage(policy), "tiefighter", "deathstar", ("TCP", 81)).ingress
    assert side.change == "add - {port: 81, protocol: TCP} under ports"


def test_an_explanation_travels_as_json():
    found = ask(stage(RULE), "xwing", "deathstar")
    assert msgspec.json.decode(msgspec.json.encode(found), type=type(found)) == found
