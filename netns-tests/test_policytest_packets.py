"""Policy tests with real packets: model and packets agree, and both say what the tables say.

A seeded sample of the Kubernetes corpus, all of Cilium's connectivity tests that need nothing
outside of the lab, and the examples of docs/testing.md. Cases whose addresses fit together share
one lab and one daemon.
"""

import random
import re
from pathlib import Path

import policytest_connectivity
import policytest_corpus
import pytest
from policytest_reading import case_of, text_of, written

from policytest.field import Field, groups
from policytest.play import play

pytestmark = pytest.mark.needs("veth", "nfqueue", "nfqueue6", "tproxy", "socket", "ipset", "ipv6")

PAGE = Path(__file__).resolve().parents[1] / "docs/testing.md"

SAMPLE_COUNT = 60
SEED = 20260


class _Fields:
    """One field at a time: labs of one name cannot be up together."""

    def __init__(self):
        self._group = None
        self._field = None

    def of(self, group):
        if group is not self._group:
            self.close()
            self._field = Field(group)
            self._group = group
        return self._field

    def close(self):
        if self._field is not None:
            self._field.close()
        self._field = self._group = None


@pytest.fixture(scope="module")
def fields():
    made = _Fields()
    yield made
    made.close()


def _parameters():
    named = {}
    files = policytest_corpus.files()
    for file in sorted(random.Random(SEED).sample(files, min(SAMPLE_COUNT, len(files)))):
        named[f"{file.parent.name}/{file.stem}"] = policytest_corpus.load(file)
    if policytest_connectivity.CORPUS.exists():
        for name in policytest_connectivity.TESTS:
            named[f"cilium/{name}"] = policytest_connectivity.as_policytest(name)
    cases = {title: case_of(text_of(document)) for title, document in named.items()}
    examples = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    cases |= {f"docs/testing-{number}": case_of(text) for number, text in enumerate(examples)}
    cases = {title: case for title, case in cases.items() if not case.model_only}
    titles = {id(case): title for title, case in cases.items()}
    found = [
        pytest.param(group, case, id=titles[id(case)])
        for group in groups(cases.values())
        for case in group
    ]
    if not files:
        absent = pytest.mark.skip(reason=f"{policytest_corpus.CORPUS} is not there")
        found.append(pytest.param(None, None, marks=absent, id="corpus"))
    return found


def wrong(case, field):
    """What is wrong with a case, one line each."""
    return [
        f"{result.step}: {result.check.title}: {result.faults or result[3:5]} {result.flows}"
        for result in play(case, lambda _step, _check: True, field=field)
        if not result.passed
    ]


@pytest.mark.parametrize(("group", "case"), _parameters())
def test_packets_meet_what_the_table_says_and_the_model_agrees(fields, group, case):
    assert wrong(case, fields.of(group)) == []


def _policy(name, **spec):
    document = {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy"}
    return document | {"metadata": {"name": name, "namespace": "x"}, "spec": spec}


ENDPOINTS = [
    {"namespace": "x", "name": "a", "labels": {"app": "a"}, "ips": ["10.1.0.1", "fd00:1::1"]},
    {"namespace": "x", "name": "b", "labels": {"app": "b"}, "ips": ["10.1.0.2", "fd00:1::2"]},
    {"namespace": "y", "name": "a", "labels": {"app": "a"}, "ips": ["10.1.0.3"]},
]
HOSTS = [{"name": "out", "ip": "203.0.113.7"}, {"name": "far", "ip": "198.51.100.7"}]
ONLY_A = _policy(
    "only-a",
    endpointSelector={"matchLabels": {"app": "b"}},
    ingress=[{"fromEndpoints": [{"matchLabels": {"app": "a"}}]}],
)


def _check(source, destination, verdict="allow", **fields):
    fields = fields if {"port", "icmp"} & fields.keys() else {"port": 80, **fields}
    return {"from": source, "to": destination, "verdict": verdict, **fields}


def _played(fields, **document):
    case = case_of(written(endpoints=ENDPOINTS, hosts=HOSTS, **document))
    fields.close()
    return wrong(case, fields.of([case]))


def test_every_protocol_and_end_is_sent(fields):
    """Both families; the node as sender and receiver; hosts that concern no policy."""
    kinds = [{"port": "80/TCP"}, {"port": "53/UDP"}, {"port": "9/SCTP"}, {"icmp": "EchoRequest"}]
    expect = []
    for kind in kinds:
        expect += [
            _check("x/a", "x/b", **kind),
            _check("y/a", "x/b", "deny", by="default-deny", direction="ingress", **kind),
            _check("host:out", "x/b", "deny", **kind),
            _check("x/b", "host:out", **kind),
            _check("203.0.113.99", "x/b", "deny", **kind),
            _check("host:out", "host:far", by="no-policy", **kind),
            _check("node", "x/b", **kind),
            _check("x/b", "node", **kind),
            _check("node", "host:out", **kind),
            _check("host:out", "node", **kind),
            _check("x/a", "x/a", **kind),
        ]
    node = {"ips": ["10.0.0.1", "fd00::1"]}
    assert _played(fields, node=node, policies=[ONLY_A], expect=expect) == []


def test_steps_change_the_running_firewall(fields):
    """Labels, namespaces, policies, endpoints that come, go and take over an address."""
    red = {"namespaceSelector": {"matchLabels": {"team": "red"}}}
    by_team = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "by-team", "namespace": "x"},
        "spec": {"podSelector": {"matchLabels": {"app": "b"}}, "ingress": [{"from": [red]}]},
    }
    steps = [
        {"name": "start", "expect": [_check("x/a", "x/b"), _check("y/a", "x/b", "deny")]},
        {
            "name": "relabel",
            "label": {"x/a": {"app": "z"}},
            "expect": [_check("x/a", "x/b", "deny")],
        },
        {
            "name": "teams",
            "delete": ["CiliumNetworkPolicy/x/only-a"],
            "apply": [by_team],
            "namespaces": {"y": {"labels": {"team": "red"}}},
            "expect": [_check("x/a", "x/b", "deny"), _check("y/a", "x/b", by="x/by-team")],
        },
        {
            "name": "no team",
            "namespaces": {"y": {"labels": {"team": None}}},
            "expect": [_check("y/a", "x/b", "deny", by="default-deny")],
        },
        {
            "name": "gone",
            "remove": ["y/a"],
            "expect": [_check("10.1.0.3", "x/b", "deny"), _check("x/b", "10.1.0.3")],
        },
        {
            "name": "back",
            "add": [{**ENDPOINTS[2], "labels": {"app": "other"}}],
            "namespaces": {"y": {"labels": {"team": "red"}}},
            "expect": [_check("y/a", "x/b")],
        },
    ]
    assert _played(fields, policies=[ONLY_A], steps=steps) == []


def test_requests_are_real_ones(fields):
    """Allowed and refused at both sides, refused by the proxy itself, before it, or past it."""
    http = [{"method": "GET", "path": "/v1/.*"}, {"method": "PUT", "headers": ["X-Key: v"]}]
    port = {"ports": [{"port": "8080", "protocol": "TCP"}], "rules": {"http": http}}
    sends = {
        "ports": [{"port": "8080", "protocol": "TCP"}],
        "rules": {"http": [{"path": "/.*1/.*"}]},
    }
    policies = [
        _policy(
            "web",
            endpointSelector={"matchLabels": {"app": "b"}},
            ingress=[{"fromEndpoints": [{"matchLabels": {"app": "a"}}], "toPorts": [port]}],
        ),
        _policy(
            "client",
            endpointSelector={"matchLabels": {"app": "a"}},
            egress=[{"toEndpoints": [{"matchLabels": {"app": "b"}}], "toPorts": [sends]}],
        ),
    ]

    def ask(path, verdict="allow", method="GET", source="x/a", **fields):
        headers = fields.pop("headers", {})
        request = {"method": method, "path": path, "headers": headers}
        return _check(source, "x/b", verdict, port=8080, http=request, **fields)

    expect = [
        ask("/v1/x"),
        ask("/v1//../v1/x?a=/../.."),
        ask("/v2/x", "deny", by="x/client", direction="egress", reason="POLICY_DENIED"),
        ask("/w1/x", "deny", by="x/web", direction="ingress", reason="POLICY_DENIED"),
        ask("/w1/x", method="PUT", headers={"X-Key": "v"}),
        ask("/v1/%2e%2e%2fx", "deny", by="proxy"),
        ask("/v1/x", "deny", source="y/a", by="default-deny"),
        ask("/v1/x", "deny", source="host:out", by="default-deny"),
        _check("x/b", "host:out", http={"path": "/anything"}, by="no-policy"),
    ]
    expect[-1].pop("port", None)
    assert _played(fields, policies=policies, expect=expect) == []


def test_nodes_are_under_policy(fields):
    """The node itself as subject, and another node as the peer that `fromNodes` means."""
    policy = {"apiVersion": "cilium.io/v2", "kind": "CiliumClusterwideNetworkPolicy"}
    peers = {"fromNodes": [{"matchLabels": {"role": "worker"}}]}
    spec = {"nodeSelector": {"matchLabels": {"role": "head"}}, "ingress": [peers]}
    policy |= {"metadata": {"name": "head"}, "spec": spec}
    pods = {**policy, "metadata": {"name": "pods"}}
    pods["spec"] = {"endpointSelector": {"matchLabels": {"app": "b"}}, "ingress": [peers]}
    case = case_of(
        written(
            settings={"hostFirewall": True},
            node={"ip": "10.0.0.1", "labels": {"role": "head"}},
            endpoints=ENDPOINTS,
            hosts=[*HOSTS, {"name": "w", "ip": "192.0.2.9", "nodeLabels": {"role": "worker"}}],
            policies=[policy, pods],
            expect=[
                _check("host:w", "node", by="head"),
                _check("host:out", "node", "deny", by="default-deny", direction="ingress"),
                _check("host:w", "x/b", by="pods"),
                _check("host:out", "x/b", "deny"),
                _check("node", "host:out", by="no-policy"),
            ],
        )
    )
    fields.close()
    assert wrong(case, fields.of([case])) == []


def test_settings_reach_the_daemon(fields):
    for settings, verdict in (
        ({"enforcement": "always"}, "deny"),
        ({"enforcement": "never"}, "allow"),
        ({"audit": True, "enforcement": "always"}, "allow"),
    ):
        expect = [_check("x/a", "y/a", verdict)]
        assert _played(fields, settings=settings, expect=expect) == []


def test_a_daemon_that_decides_otherwise_is_a_disagreement(fields):
    """The packets of a lab whose policies somebody else changed do not meet what the model says."""
    case = case_of(
        written(
            endpoints=ENDPOINTS,
            policies=[ONLY_A],
            expect=[_check("x/a", "x/b")],
            steps=[{"name": "later", "expect": [_check("x/a", "x/b"), _check("x/b", "x/a")]}],
        )
    )
    fields.close()
    field = fields.of([case])
    found = []
    for result in play(case, lambda _step, _check: True, field=field):
        found.append((result.check.title, result.step, result.agrees))
        if not result.step:
            field.daemon.withdraw("CiliumNetworkPolicy", "only-a", "x")
            shut = {**ONLY_A, "metadata": {"name": "shut", "namespace": "x"}}
            shut["spec"] = {"endpointSelector": {"matchLabels": {"app": "b"}}, "ingress": [{}]}
            field.daemon.apply(text_of(shut))
    assert found == [
        ("x/a -> x/b 80/TCP", "", True),
        ("x/a -> x/b 80/TCP", "later", False),
        ("x/b -> x/a 80/TCP", "later", True),
    ]
