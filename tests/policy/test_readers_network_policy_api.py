"""Tiers and priorities: ClusterNetworkPolicy, AdminNetworkPolicy, BaselineAdminNetworkPolicy."""

from textwrap import dedent, indent

import pytest
from policy_reading import entries, refuse

from conntrack.address import parse_prefix
from firewall.identities.labels import LabelSet
from firewall.policy.model import Action, CidrPeer, FqdnPeer, NodePeer, PortRange, Tier

SUBJECT = "subject: {namespaces: {}}"


def cluster(spec, tier="Admin", priority=7):
    head = "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\n"
    body = f"tier: {tier}\npriority: {priority}\n{dedent(spec)}"
    return f"{head}metadata: {{name: p}}\nspec:\n{indent(body, '  ')}\n"


def admin(spec):
    head = "apiVersion: policy.networking.k8s.io/v1alpha1\nkind: AdminNetworkPolicy\n"
    body = f"priority: 7\n{dedent(spec)}"
    return f"{head}metadata: {{name: p}}\nspec:\n{indent(body, '  ')}\n"


def baseline(spec, name="default"):
    head = "apiVersion: policy.networking.k8s.io/v1alpha1\nkind: BaselineAdminNetworkPolicy\n"
    return f"{head}metadata: {{name: {name}}}\nspec:\n{indent(dedent(spec), '  ')}\n"


def egress(peer, ports="", action="Accept"):
    rule = f"{{action: {action}, to: [{peer}]{ports}}}"
    (found,) = entries(cluster(f"{SUBJECT}\negress: [{rule}]"))
    return found


def refused(rule, field="egress"):
    return "\n".join(refuse(cluster(f"{SUBJECT}\n{field}: [{rule}]")))


TO_ALL = "to: [{namespaces: {}}]"


def test_rules_are_ordered_within_the_priority():
    """Cilium: rule i has priority + i/100."""
    rules = ", ".join(f"{{action: {a}, {TO_ALL}}}" for a in ("Accept", "Deny", "Pass"))
    found = entries(cluster(f"{SUBJECT}\negress: [{rules}]"))
    assert [e.action for e in found] == [Action.ALLOW, Action.DENY, Action.PASS]
    assert [e.priority for e in found] == [7.0, 7.01, 7.02]
    assert {e.tier for e in found} == {Tier.ADMIN}


def test_tiered_rules_never_isolate():
    assert not egress("{namespaces: {}}").default_deny


@pytest.mark.parametrize(
    ("text", "tier", "priority"),
    [
        (cluster(f"{SUBJECT}\negress: [{{action: Deny, {TO_ALL}}}]", "Baseline"), 250, 7),
        (admin(f"{SUBJECT}\negress: [{{action: Deny, {TO_ALL}}}]"), 100, 7),
        (baseline(f"{SUBJECT}\negress: [{{action: Deny, {TO_ALL}}}]"), 250, 0),
    ],
)
def test_tiers(text, tier, priority):
    (found,) = entries(text)
    assert (found.tier, found.priority) == (tier, priority)


def test_subjects_are_pods_by_namespace_and_label():
    spec = """
        subject:
          pods:
            namespaceSelector: {matchLabels: {team: x}}
            podSelector: {matchLabels: {app: a}}
        ingress: [{action: Deny, from: [{namespaces: {}}]}]
    """
    (found,) = entries(cluster(spec))
    labels = ["k8s:app=a", "k8s:io.cilium.k8s.namespace.labels.team=x"]
    assert found.subject.matches(LabelSet.parse([*labels, "k8s:io.kubernetes.pod.namespace=n"]))
    assert not found.subject.matches(LabelSet.parse(labels))


def test_networks_match_endpoints_too():
    found = egress("{networks: [10.0.0.0/8, '::/0']}")
    assert found.peers == (
        CidrPeer(parse_prefix("10.0.0.0/8"), (), match_endpoints=True),
        CidrPeer(parse_prefix("::/0"), (), match_endpoints=True),
    )


def test_nodes_by_label():
    assert isinstance(egress("{nodes: {matchLabels: {a: b}}}").peers[0], NodePeer)


def test_a_domain_wildcard_is_any_number_of_labels():
    """API: `*` matches one or more labels; Cilium writes that `**`."""
    found = egress("{domainNames: ['*.K8s.io', k8s.io.]}")
    assert found.peers == (FqdnPeer(None, "**.k8s.io"), FqdnPeer("k8s.io.", None))


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("{tcp: {destinationPort: {number: 80}}}", [PortRange(6, 80, 80)]),
        ("{udp: {destinationPort: {range: {start: 1, end: 9}}}}", [PortRange(17, 1, 9)]),
        ("{sctp: {}}", [PortRange(132)]),
        ("{destinationNamedPort: web}", [PortRange(p, 0, 0, "web") for p in (6, 17, 132)]),
    ],
)
def test_protocols(item, expected):
    found = egress("{namespaces: {}}", f", protocols: [{item}]")
    assert list(found.ports) == expected


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("{portNumber: {port: 80}}", [PortRange(6, 80, 80)]),
        ("{portNumber: {port: 80, protocol: UDP}}", [PortRange(17, 80, 80)]),
        ("{portRange: {start: 1, end: 9, protocol: SCTP}}", [PortRange(132, 1, 9)]),
        ("{namedPort: web}", [PortRange(p, 0, 0, "web") for p in (6, 17, 132)]),
    ],
)
def test_ports_of_v1alpha1(item, expected):
    (found,) = entries(admin(f"{SUBJECT}\negress: [{{action: Allow, {TO_ALL}, ports: [{item}]}}]"))
    assert list(found.ports) == expected


def test_without_protocols_every_protocol_is_meant():
    assert egress("{namespaces: {}}").ports is None


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{action: Allow, to: [{namespaces: {}}]}", '"Allow" is none of Accept, Deny, Pass'),
        ("{to: [{namespaces: {}}]}", "needs action"),
        ("{action: Deny}", "needs to with at least one peer"),
        ("{action: Deny, to: []}", "needs to with at least one peer"),
        ("{action: Deny, to: [{}]}", "needs exactly one of namespaces, pods, nodes"),
        ("{action: Deny, to: [{services: {}}]}", 'unknown field "services"'),
        ("{action: Deny, to: [{namespaces: {}, pods: {}}]}", "needs exactly one of"),
        ("{action: Deny, to: [{pods: {}}]}", "needs podSelector"),
        ("{action: Deny, to: [{networks: []}]}", "at least one prefix"),
        ("{action: Deny, to: [{domainNames: [a.b]}]}", "only for rules that accept"),
        ("{action: Accept, to: [{domainNames: ['a*.b']}]}", "is no domain name"),
        ("{action: Deny, to: [{namespaces: {}}], protocols: []}", "leave it out"),
        (
            (
                "{action: Deny, to: [{networks: [10.0.0.0/8]}], protocols: "
                "[{destinationNamedPort: web}]}"
            ),
            "have no named ports",
        ),
        (
            (
                "{action: Deny, to: [{namespaces: {}}], protocols: "
                "[{tcp: {destinationPort: {range: {start: 9, end: 9}}}}]}"
            ),
            "start must be less than end",
        ),
        (f"{{action: Deny, to: [{{namespaces: {{}}}}], name: {'x' * 101}}}", "longer than 100"),
    ],
)
def test_what_an_api_server_refuses(rule, message):
    assert message in refused(rule)


def test_ingress_has_pods_only_as_peers():
    """A peer that is not known must not be left out of a rule: the object is refused."""
    assert 'unknown field "networks"' in refused(
        "{action: Deny, from: [{networks: [10.0.0.0/8]}]}", "ingress"
    )


def test_at_most_twenty_five_rules():
    rules = ", ".join([f"{{action: Deny, {TO_ALL}}}"] * 26)
    assert "too many rules, the max is 25" in refuse(cluster(f"{SUBJECT}\negress: [{rules}]"))[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (cluster(SUBJECT, priority=1001), "between 0 and 1000"),
        (cluster(SUBJECT, tier="Normal"), '"Normal" is none of Admin, Baseline'),
        (cluster("subject: {}"), "needs exactly one of namespaces, pods"),
        (cluster("ingress: []"), "needs subject"),
        (admin(f"tier: Admin\n{SUBJECT}"), 'unknown field "tier"'),
        (baseline(SUBJECT, "other"), 'must be named "default"'),
        (
            baseline(f"{SUBJECT}\negress: [{{action: Pass, {TO_ALL}}}]"),
            '"Pass" is none of Allow, Deny',
        ),
    ],
)
def test_the_head_of_an_object_is_checked(text, message):
    assert message in "\n".join(refuse(text))
