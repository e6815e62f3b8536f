"""Cilium's own semantics, case by case: ../shared/corpus/cilium/semantic_cases.yaml.

Each flow goes through the whole of policy: reader, repository, resolver, snapshot on disk and back,
view, and for L7 the matcher that the proxy uses.
"""

from pathlib import Path

import pytest
import yaml
from policy.stage import PROTOCOLS, Stage

from firewall.identities.labels import LabelSet
from firewall.policy.http_match import HttpMatcher
from firewall.policy.model import (
    Action,
    LabelPeer,
    ObjectKey,
    Origin,
    PolicyEntry,
    PolicyObject,
    PortRange,
)
from firewall.policy.name_match import NameMatcher
from firewall.policy.readers import CAPABILITIES, ReaderSettings, read
from firewall.policy.snapshot import Settings
from firewall.policy.snapshot_file import decode, encode
from firewall.policy.verdict import TrafficDirection, Verdict
from firewall.policy.view import View

CORPUS = Path(__file__).resolve().parents[2] / "../shared/corpus/cilium/semantic_cases.yaml"

_CLUSTER = "k8s:io.cilium.k8s.policy.cluster=default"
_NAMESPACE = "k8s:io.kubernetes.pod.namespace"
_OF_NAMESPACE = "k8s:io.cilium.k8s.namespace.labels"
_REDIS = {"component": "redis", "tier": "cache"}
_MONITORING = {"component": "monitoring", "tier": "cache"}

# The table of ../shared/README.md: name -> namespace, labels, labels of the namespace.
ENDPOINTS = {
    "A": ("default", {"id": "a", "name": "idA"}, {}),
    "B": ("default", {"id1": "b", "id2": "t", "name": "idB"}, {}),
    "C": ("default", {"id": "t", "name": "idC"}, {}),
    "frontend": ("myns", {"role": "frontend"}, {}),
    "backend": ("myns", {"role": "backend"}, {}),
    "db": ("myns", {"role": "db"}, {}),
    "nsBob": ("nsBob", {"role": "frontend"}, {"user": "bob"}),
    "nsSally": ("nsSally", {"role": "frontend"}, {"user": "sally"}),
    "dns": ("kube-system", {"k8s-app": "kube-dns"}, {}),
    "redisCacheDev": ("expressions", {**_REDIS, "environment": "dev"}, {}),
    "redisCacheProd": ("expressions", {**_REDIS, "environment": "prod"}, {}),
    "redisCacheDevOther": (
        "other",
        {"component": "monitoring"},
        {**_REDIS, "environment": "dev"},
    ),
    "redisCacheProdOther": (
        "other",
        {"component": "monitoring"},
        {**_REDIS, "environment": "prod"},
    ),
}
# Reserved identities; those that a node manages as endpoints are endpoints here, too.
RESERVED = {"host": True, "init": True, "health": True, "remote-node": False, "world": False}


def corpus():
    if not CORPUS.exists():
        return {"cases": [], "invalid_policies": []}
    return yaml.safe_load(CORPUS.read_text())


def cases():
    found = corpus()["cases"]
    if not found:
        reason = f"{CORPUS} is not there"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(case, id=case["id"]) for case in found]


def stage_of(case):
    config = case.get("config", {})
    stage = Stage(
        settings=Settings(
            enforcement=config.get("enable-policy", "default"),
            allow_localhost=config.get("allow-localhost", "always"),
            policy_audit_mode=config.get("policy-audit-mode", False),
        ),
        nodes=config.get("policy-cidr-match-mode") == "nodes",
    )
    ports = [
        (name, PROTOCOLS[protocol], port)
        for protocol, names in case.get("named_ports", {}).items()
        for name, port in names.items()
    ]
    for at, (name, (namespace, labels, outer)) in enumerate(ENDPOINTS.items()):
        texts = [f"k8s:{key}={value}" for key, value in labels.items()]
        texts += [f"{_OF_NAMESPACE}.{key}={value}" for key, value in outer.items()]
        texts += [f"{_NAMESPACE}={namespace}", _CLUSTER]
        stage.endpoint(name, f"10.0.0.{at + 1}", texts, ports=ports, namespace=namespace)
    for at, (name, managed_always) in enumerate(RESERVED.items()):
        host_firewall = config.get("enable-host-firewall", False)
        managed = host_firewall if name == "host" else managed_always
        if name == "world":
            stage.addresses[name] = bytes([198, 51, 100, 1])
        else:
            stage.endpoint(name, f"10.0.1.{at + 1}", [f"reserved:{name}"], managed=managed)
    return stage


def learned(case, stage):
    """Give addresses the FQDN labels that their names match, as a DNS proxy would."""
    for address, name in case.get("names", {}).items():
        texts = [text for text in stage.resolver.fqdns() if NameMatcher((text,)).matches(name)]
        if texts:
            labels = [f"fqdn:{text}" for text in texts]
            stage.extra[f"{address}/32"] = labels


def allows(row, flow):
    if row.kind == "http" and "http" in flow:
        head = flow["http"]
        headers = head.get("headers", {})
        return (
            HttpMatcher(row.http).match(
                head.get("method", "GET").encode(),
                head.get("path", "/").encode(),
                head.get("host", "host").encode(),
                [(name.encode(), value.encode()) for name, value in headers.items()],
            )
            is not None
        )
    if row.kind == "dns" and "dns" in flow:
        items = tuple(rule.match_name or rule.match_pattern for rule in row.dns)
        return NameMatcher(items).matches(flow["dns"]["name"])
    if row.kind == "tls" and "sni" in flow:
        return NameMatcher(row.server_names).matches(flow["sni"])
    return False


def outcome(decision, flow):
    if decision.verdict is Verdict.DROP:
        return "denied"
    if decision.verdict is Verdict.ACCEPT:
        return "allowed"
    for side in (decision.egress, decision.ingress):
        if side is None or side.l7 is None or side.unrestricted:
            continue
        if not any(allows(row, flow) for row in side.l7):
            return "redirect+deny"
    return "redirect+allow"


@pytest.mark.parametrize("case", cases())
def test_a_case_of_ciliums_semantics_holds(case):
    if "entry_sets" in case:
        for entries in case["entry_sets"]:
            check_entries(entries)
        return
    stage = stage_of(case)
    settings = ReaderSettings(enforceable=frozenset(CAPABILITIES))
    result = read(case["policies"], "case.yaml", settings=settings)
    assert not result.errors, list(map(str, result.errors))
    stage.resolver.set_resources(result.resources)
    stage.apply(*result.objects)
    if "invalid" in case:
        stage.snapshot()
        assert [case["invalid"]] == [
            f"policy resolution error ({error.message.split(' (')[0]})"
            for error in stage.resolver.errors
        ]
        return
    learned(case, stage)
    view = View(decode(encode(stage.snapshot())))
    assert not stage.resolver.errors
    found = [
        outcome(stage.decide(f["from"], f["to"], f["proto"], f["port"], view), f)
        for f in case["flows"]
    ]
    expected = [flow["verdict"] for flow in case["flows"]]
    wrong = [
        f"{flow} -> {is_}"
        for flow, should, is_ in zip(case["flows"], expected, found, strict=True)
        if should != is_
    ]
    assert not wrong, "\n".join(wrong)


def check_entries(entries):
    """Entry sets are written without a file: egress entries of one subject."""
    names = {"A": "1.1.1.1", "B": "2.2.2.2"}
    stage = Stage()
    stage.endpoint("subject", "10.0.0.1", ["k8s:subject=yes"])
    for name, address in names.items():
        stage.endpoint(name, address, [f"k8s:peer={name}"], managed=False)
    subject = selector("subject", "yes")
    made = []
    for at, entry in enumerate(entries["entries"]):
        peer = entry["peer"]
        peers = None if peer == "any" else (LabelPeer(selector("peer", peer)),)
        port = entry.get("port")
        made.append(
            PolicyEntry(
                origin=Origin(kind="Test", namespace="", name="set", path=f"[{at}]"),
                direction=TrafficDirection.EGRESS,
                action=Action[entry["verdict"].upper()],
                subject=subject,
                tier=entry["tier"],
                priority=entry["prio"],
                peers=peers,
                ports=None if port is None else (PortRange(6, port, port),),
                default_deny=entries.get("default_deny", True),
            )
        )
    key = ObjectKey(kind="Test", namespace="", name="set")
    stage.apply(PolicyObject(key=key, entries=tuple(made)))
    for probe in entries["probes"]:
        decision = stage.decide("subject", names[probe["to"]], "TCP", probe["port"])
        assert outcome(decision, {}) == probe["verdict"], probe


def selector(key, value):
    from firewall.identities.selector import from_labels

    return from_labels({f"k8s:{key}": value})


def test_a_resolution_error_keeps_the_previous_policy():
    """SEM-39's second half: the endpoint goes on with what it had."""
    case = next((c for c in corpus()["cases"] if c["id"] == "SEM-39"), None)
    if case is None:
        pytest.skip(f"{CORPUS} is not there")
    stage = stage_of(case)
    settings = ReaderSettings(enforceable=frozenset(CAPABILITIES))
    before = """
        apiVersion: cilium.io/v2
        kind: CiliumNetworkPolicy
        metadata: {name: clash, namespace: default}
        spec:
          endpointSelector: {matchLabels: {id: a}}
          egress:
          - toEndpoints: [{}]
            toPorts: [{ports: [{port: "443", protocol: TCP}]}]
        """
    stage.apply(*read(before, "a.yaml", settings=settings).objects)
    assert stage.decide("A", "C", "TCP", 443).verdict is Verdict.ACCEPT
    stage.apply(*read(case["policies"], "b.yaml", settings=settings).objects)
    assert stage.decide("A", "C", "TCP", 443).verdict is Verdict.ACCEPT
    assert stage.decide("A", "C", "TCP", 80).verdict is Verdict.DROP
    [error] = stage.resolver.errors
    assert error.identity == stage.number(stage_labels("A"))
    assert str(error).startswith("b.yaml:")
    assert stage.decide("C", "B", "TCP", 80).verdict is Verdict.ACCEPT, "others are not concerned"
    stage.delete(ObjectKey(kind="CiliumNetworkPolicy", namespace="default", name="clash"))
    assert stage.decide("A", "C", "TCP", 80).verdict is Verdict.ACCEPT
    assert not stage.resolver.errors


def stage_labels(name):
    namespace, labels, _ = ENDPOINTS[name]
    texts = [f"k8s:{key}={value}" for key, value in labels.items()]
    return LabelSet.parse([*texts, f"{_NAMESPACE}={namespace}", _CLUSTER])
