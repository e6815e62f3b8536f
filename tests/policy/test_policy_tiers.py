"""Admin, ordinary and baseline policies together: which of them has the last word.

A NetworkPolicy decides finally for the pods it selects; only others come to the baseline
(network-policy-api v1alpha2, spec.tier; v1alpha1, Pass). A tier's rules come in the order of
priority, then of the list; Pass goes on with the next tier.
"""

import pytest
from policy.stage import Stage

from firewall.policy.readers import ReaderSettings, read
from firewall.policy.snapshot import Settings
from firewall.policy.verdict import Verdict

ISOLATED = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: isolated}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress]}
"""
FRIENDS = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]
"""
CILIUM = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: isolated}
spec: {endpointSelector: {matchLabels: {app: web}}, ingress: [{}]}
"""
DENIES = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: denies}
spec:
  endpointSelector: {matchLabels: {app: web}}
  enableDefaultDeny: {ingress: false}
  ingressDeny: [{toPorts: [{ports: [{port: "22", protocol: TCP}]}]}]
"""
LEAVING = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: leaving}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Egress]}
"""


def cluster(tier, *rules, priority=1, name="c"):
    listed = "".join(
        f"\n  - {{action: {action}, from: [{{pods: {{podSelector: {{{selector}}}}}}}]}}"
        for action, selector in rules
    )
    return (
        "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\n"
        f"metadata: {{name: {name}}}\nspec:\n  tier: {tier}\n  priority: {priority}\n"
        f"  subject: {{namespaces: {{}}}}\n  ingress:{listed}\n"
    )


def old(kind, *rules):
    head = "priority: 1\n  " if kind == "AdminNetworkPolicy" else ""
    listed = "".join(f"\n  - {{action: {a}, from: [{{namespaces: {{{s}}}}}]}}" for a, s in rules)
    return (
        f"apiVersion: policy.networking.k8s.io/v1alpha1\nkind: {kind}\n"
        f"metadata: {{name: default}}\nspec:\n  {head}subject: {{namespaces: {{}}}}\n"
        f"  ingress:{listed}\n"
    )


ALL = ""
FRIEND = "matchLabels: {app: friend}"


@pytest.mark.parametrize(
    ("policies", "friend", "stranger"),
    [
        ([cluster("Baseline", ("Accept", ALL))], True, True),
        ([cluster("Baseline", ("Deny", ALL))], False, False),
        # An isolated endpoint never comes to the baseline, whatever it says.
        ([cluster("Baseline", ("Accept", ALL)), ISOLATED], False, False),
        ([cluster("Baseline", ("Accept", ALL)), FRIENDS], True, False),
        ([cluster("Baseline", ("Deny", ALL)), FRIENDS], True, False),
        ([cluster("Baseline", ("Accept", ALL)), CILIUM], False, False),
        ([old("BaselineAdminNetworkPolicy", ("Allow", ALL)), ISOLATED], False, False),
        # Isolation of the other direction, or a policy that does not isolate, leaves it alone.
        ([cluster("Baseline", ("Deny", ALL)), LEAVING], False, False),
        ([cluster("Baseline", ("Deny", FRIEND)), DENIES], False, True),
        # Admin decides before; Pass leaves the word to the others.
        ([cluster("Admin", ("Accept", ALL)), ISOLATED], True, True),
        ([cluster("Admin", ("Pass", FRIEND), ("Deny", ALL)), ISOLATED], False, False),
        ([cluster("Admin", ("Pass", FRIEND), ("Deny", ALL)), FRIENDS], True, False),
        ([cluster("Admin", ("Pass", FRIEND), ("Deny", ALL))], True, False),
        (
            [cluster("Admin", ("Pass", ALL)), cluster("Baseline", ("Deny", FRIEND), name="b")],
            False,
            True,
        ),
        (
            [
                old("AdminNetworkPolicy", ("Pass", ALL)),
                old("BaselineAdminNetworkPolicy", ("Allow", ALL)),
                ISOLATED,
            ],
            False,
            False,
        ),
        # The order of rules, and of priorities.
        ([cluster("Admin", ("Accept", FRIEND), ("Deny", ALL))], True, False),
        ([cluster("Admin", ("Deny", ALL), ("Accept", FRIEND))], False, False),
        (
            [
                cluster("Admin", ("Deny", ALL), priority=9),
                cluster("Admin", ("Accept", FRIEND), priority=8, name="b"),
            ],
            True,
            False,
        ),
    ],
)
def test_the_tiers_have_their_say_in_order(policies, friend, stranger):
    stage = staged(policies)
    found = [
        stage.decide(name, "web", "TCP", 80).verdict is Verdict.ACCEPT
        for name in ("friend", "stranger")
    ]
    assert found == [friend, stranger]


def staged(policies, **settings):
    stage = Stage(settings=Settings(**settings))
    for at, name in enumerate(("web", "friend", "stranger")):
        labels = [f"k8s:app={name}", "k8s:io.kubernetes.pod.namespace=default"]
        labels.append("k8s:io.cilium.k8s.policy.cluster=default")
        stage.endpoint(name, f"10.0.0.{at + 1}", labels, namespace="default")
    result = read("---\n".join(policies), "t.yaml", settings=ReaderSettings())
    assert not result.errors, list(map(str, result.errors))
    stage.apply(*result.objects)
    return stage


def test_isolation_by_a_setting_stands_behind_the_baseline():
    """`enforcement: always` is what holds where no policy says anything, as in Cilium."""
    stage = staged([cluster("Baseline", ("Accept", FRIEND))], enforcement="always")
    assert stage.decide("friend", "web", "TCP", 80).ingress.allowed
    assert not stage.decide("stranger", "web", "TCP", 80).ingress.allowed
