"""Objects in a running agent, as the command shows and deletes them: by labels, by selector."""

import json

import pytest

from firewall.identities.reserved import CLUSTER_MIN

RULES = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: one, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: b}}
  labels: [{key: team, value: red}]
  ingress: [{fromEndpoints: [{matchLabels: {app: a}}]}, {fromCIDR: [192.0.2.0/24]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: two, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: a}}
  ingress: [{fromEndpoints: [{matchLabels: {app: a}}]}]
"""


@pytest.fixture
def pair(lab, bartizan):
    """Two endpoints and two policies."""
    made = lab(a="app=a", b="app=b")
    made.firewall = bartizan(made)
    made.firewall.apply(RULES, "rules.yaml")
    return made


def _names(pair, *labels: str) -> list[str]:
    options = [word for label in labels for word in ("-l", label)]
    done = pair.firewall.cli("policy", "get", "-o", "json", *options)
    assert done.returncode == 0, done.stderr
    return [one["key"]["name"] for one in json.loads(done.stdout)["objects"]]


def test_objects_are_listed_and_deleted_by_the_labels_of_kubernetes(pair):
    """Cilium's `io.cilium.k8s.policy.*`, and a rule's own; the source may be left out."""
    assert _names(pair, "k8s:io.cilium.k8s.policy.name=one") == ["one"]
    assert _names(pair, "io.cilium.k8s.policy.namespace=default") == ["one", "two"]
    assert _names(pair, "io.cilium.k8s.policy.namespace=default", "team=red") == ["one"]
    assert _names(pair, "io.cilium.k8s.policy.name=three") == []
    done = pair.firewall.cli("policy", "delete", "-l", "io.cilium.k8s.policy.name=one")
    assert done.returncode == 0, done.stderr
    assert "default/one deleted" in done.stdout
    assert _names(pair) == ["two"]
    again = pair.firewall.cli("policy", "delete", "-l", "io.cilium.k8s.policy.name=one")
    assert again.returncode == 1


def test_selectors_show_whom_rules_mean_now(pair):
    """SELECTOR LABELS USERS IDENTITIES, as Cilium's agent prints them."""
    done = pair.firewall.cli("policy", "selectors")
    assert done.stdout.split("\n", 1)[0].split() == ["SELECTOR", "LABELS", "USERS", "IDENTITIES"]
    rows = pair.firewall.told("policy", "selectors")
    named = next(row for row in rows if "app=a" in row["selector"])
    assert named["users"] == 2
    [identity] = named["identities"]
    assert identity == pair.firewall.endpoint("a")["identity"]["id"] >= CLUSTER_MIN
    outside = next(row for row in rows if row["selector"] == "192.0.2.0/24")
    assert outside["labels"] == ["CiliumNetworkPolicy/default/one"]
