"""NetworkPolicy (networking.k8s.io/v1): its own defaults, in labels (research b)."""

from textwrap import indent

import pytest
from policy_reading import entries, read_text, refuse

from conntrack.address import parse_prefix
from firewall.identities.labels import LabelSet
from firewall.policy.model import CidrPeer, PortRange
from firewall.policy.readers import ReaderSettings
from firewall.policy.verdict import TrafficDirection

INGRESS, EGRESS = TrafficDirection.INGRESS, TrafficDirection.EGRESS


def knp(spec):
    head = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n"
    return f"{head}metadata: {{name: p, namespace: shop}}\nspec:\n{indent(spec, '  ')}\n"


def directions(spec):
    return [e.direction for e in entries(knp(spec))]


DEFAULTS = ReaderSettings()


def one(rule, field="ingress", settings=DEFAULTS):
    types = "Ingress" if field == "ingress" else "Egress"
    spec = f"podSelector: {{}}\npolicyTypes: [{types}]\n{field}: [{rule}]"
    (found,) = entries(knp(spec), settings)
    return found


def refused(rule, field="ingress"):
    return "\n".join(refuse(knp(f"podSelector: {{}}\n{field}: [{rule}]")))


def pod(namespace="shop", **labels):
    texts = [
        f"k8s:io.kubernetes.pod.namespace={namespace}",
        "k8s:io.cilium.k8s.policy.cluster=default",
        *(f"k8s:{key.replace('__', '.')}={value}" for key, value in labels.items()),
    ]
    return LabelSet.parse(texts)


def team(value):
    return {"io__cilium__k8s__namespace__labels__team": value}


@pytest.mark.parametrize(
    ("spec", "isolated"),
    [
        ("podSelector: {}", [INGRESS]),
        ("podSelector: {}\npolicyTypes: []", [INGRESS]),
        ("podSelector: {}\ningress: []", [INGRESS]),
        ("podSelector: {}\negress: [{}]", [INGRESS, EGRESS]),
        ("podSelector: {}\negress: []", [INGRESS]),
        ("podSelector: {}\npolicyTypes: [Egress]", [EGRESS]),
        ("podSelector: {}\npolicyTypes: [Egress]\negress: []", [EGRESS]),
        ("podSelector: {}\npolicyTypes: [Ingress, Egress]", [INGRESS, EGRESS]),
    ],
)
def test_policy_types_decide_what_is_isolated(spec, isolated):
    """Missing: Ingress always, Egress if there are egress rules (SEM-64)."""
    assert directions(spec) == isolated
    assert all(e.default_deny for e in entries(knp(spec)))


def test_isolation_without_rules_allows_nothing():
    (found,) = entries(knp("podSelector: {}"))
    assert (found.peers, found.ports) == ((), None)


def test_rules_that_policy_types_leave_out_have_no_effect_and_say_so():
    result = read_text(knp("podSelector: {}\npolicyTypes: [Ingress]\negress: [{}]"))
    assert [e.direction for e in result.objects[0].entries] == [INGRESS]
    assert "has no effect" in str(result.warnings[0])


@pytest.mark.parametrize("rule", ["{}", "{from: []}", "{from: null, ports: []}"])
def test_missing_and_empty_mean_everything(rule):
    """The opposite of Cilium's own format (SEM-60)."""
    found = one(rule)
    assert (found.peers, found.ports) == (None, None)


def test_keys_are_workload_labels_of_the_own_namespace():
    (found,) = entries(knp("podSelector: {matchLabels: {app: a}}"))
    assert found.subject.matches(pod(app="a"))
    assert not found.subject.matches(pod("other", app="a"))
    assert not found.subject.matches(LabelSet.parse(["any:app=a"]))


def test_a_missing_pod_selector_selects_all_pods():
    (found,) = entries(knp("policyTypes: [Ingress]"))
    assert found.subject.matches(pod())


def test_pod_selectors_of_peers_are_of_the_own_namespace():
    (peer,) = one("{from: [{podSelector: {matchLabels: {a: b}}}]}").peers
    assert peer.selector.matches(pod(a="b"))
    assert not peer.selector.matches(pod("other", a="b"))


def test_namespace_selectors_look_at_the_namespaces_labels():
    (peer,) = one("{from: [{namespaceSelector: {matchLabels: {team: x}}}]}").peers
    assert peer.selector.matches(pod("any", **team("x")))
    assert not peer.selector.matches(pod("any", team="x"))


def test_both_selectors_in_one_item_are_both_demanded():
    both = "namespaceSelector: {matchLabels: {team: x}}, podSelector: {matchLabels: {a: b}}"
    (peer,) = one(f"{{from: [{{{both}}}]}}").peers
    assert peer.selector.matches(pod("any", a="b", **team("x")))
    assert not peer.selector.matches(pod("any", **team("x")))
    assert not peer.selector.matches(pod("any", a="b"))


@pytest.mark.parametrize(
    "selector",
    ["{}", "{matchExpressions: [{key: team, operator: DoesNotExist}]}"],
)
def test_a_namespace_selector_matches_pods_only(selector):
    """Without a namespace label there is no namespace: host and world are no peers."""
    (peer,) = one(f"{{from: [{{namespaceSelector: {selector}}}]}}").peers
    assert peer.selector.matches(pod("any"))
    assert not peer.selector.matches(LabelSet.parse(["reserved:host"]))


def test_ip_blocks_match_pods_too_unless_cilium_is_followed():
    rule = "{from: [{ipBlock: {cidr: 10.1.2.3/8, except: [10.1.0.0/16]}}]}"
    prefixes = parse_prefix("10.0.0.0/8"), (parse_prefix("10.1.0.0/16"),)
    assert one(rule).peers == (CidrPeer(*prefixes, match_endpoints=True),)
    cilium = ReaderSettings(ip_block_matches_endpoints=False)
    assert one(rule, settings=cilium).peers == (CidrPeer(*prefixes, match_endpoints=False),)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("{}", PortRange(6)),
        ("{protocol: UDP}", PortRange(17)),
        ("{port: 80}", PortRange(6, 80, 80)),
        ("{port: 80, endPort: 90, protocol: SCTP}", PortRange(132, 80, 90)),
        ("{port: http}", PortRange(6, 0, 0, "http")),
        ('{port: "http", protocol: UDP}', PortRange(17, 0, 0, "http")),
        ("{port: 9p}", PortRange(6, 0, 0, "9p")),
        ('{port: "on"}', PortRange(6, 0, 0, "on")),
    ],
)
def test_ports(item, expected):
    """The protocol defaults to TCP alone (SEM-65)."""
    assert one(f"{{ports: [{item}]}}", "egress").ports == (expected,)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{ports: [{port: 0}]}", "must be between 1 and 65535"),
        ("{ports: [{port: 65536}]}", "must be between 1 and 65535"),
        ("{ports: [{port: 80, endPort: 65537}]}", "must be between 1 and 65535, not 65537"),
        ("{ports: [{port: 80, endPort: 79}]}", "greater than or equal to port 80"),
        ("{ports: [{port: http, endPort: 79}]}", "when port is a name"),
        ("{ports: [{endPort: 79}]}", "when port is not"),
        ('{ports: [{port: "80"}]}', "at least one letter; write the number without quotes"),
        ("{ports: [{port: 0x50}]}", "write the number in plain decimal digits"),
        ("{ports: [{port: 8e3}]}", "write the number in plain decimal digits"),
        ("{ports: [{port: 8_0}]}", "write the number in plain decimal digits"),
        ("{ports: [{port: on}]}", 'kubectl reads on as true or false; write "on"'),
        ("{ports: [{port: a--b}]}", "is no port name"),
        ("{ports: [{protocol: tcp}]}", 'did you mean "TCP"?'),
        ("{ports: [{protocol: ICMP}]}", "must be TCP, UDP or SCTP"),
        ("{from: [{}]}", "must specify a peer"),
        ("{from: [{ipBlock: {}}]}", "needs cidr"),
        ("{from: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}", "may not specify both"),
        ("{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}", "does not contain"),
        ("{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}", "strict subset"),
        ("{to: []}", 'unknown field "to"'),
        ("{from: [{podSelector: {matchLabels: {'k8s:a': b}}}]}", "is no Kubernetes label key"),
    ],
)
def test_what_an_api_server_refuses(rule, message):
    assert message in refused(rule)


def test_policy_types_are_two_words():
    assert 'did you mean "Ingress"?' in refuse(knp("podSelector: {}\npolicyTypes: [ingress]"))[0]


def test_rules_carry_where_they_come_from():
    (found,) = entries(knp("podSelector: {}\ningress:\n- {}"))
    assert (found.origin.path, found.origin.line) == ("spec.ingress[0]", 7)
    assert "k8s:io.cilium.k8s.policy.derived-from=NetworkPolicy" in found.origin.labels


def test_more_than_two_policy_types_are_refused():
    """Even if they are the same: the API server counts them."""
    spec = "podSelector: {}\npolicyTypes: [Ingress, Egress, Ingress]"
    (found,) = refuse(knp(spec))
    assert found.endswith("policyTypes: may not specify more than two policyTypes")
