"""CiliumNetworkPolicy and its cluster-wide form, rule by rule (research a.1-a.11)."""

import json

import pytest
from policy_reading import (
    EVERY_CAPABILITY,
    accept,
    ccnp,
    cnp,
    egress,
    entries,
    entry,
    ingress,
    read_text,
    refuse,
    refuse_egress,
    refuse_ingress,
)

from conntrack.address import parse_prefix
from firewall.identities.labels import LabelSet
from firewall.policy.model import (
    Action,
    CidrGroupPeer,
    CidrPeer,
    EntityPeer,
    FqdnPeer,
    NodePeer,
    PortRange,
    ServicePeer,
)
from firewall.policy.readers import ReaderSettings, read
from firewall.policy.readers.settings import CAPABILITIES, ENFORCED, SWITCHED
from firewall.policy.verdict import TrafficDirection

TCP, UDP, SCTP = 6, 17, 132


def pod(namespace="shop", cluster="default", **labels):
    texts = [f"k8s:{key}={value}" for key, value in labels.items()]
    if namespace:
        texts.append(f"k8s:io.kubernetes.pod.namespace={namespace}")
    if cluster:
        texts.append(f"k8s:io.cilium.k8s.policy.cluster={cluster}")
    return LabelSet.parse(texts)


HOST = LabelSet.parse(["reserved:host"])
WORLD = LabelSet.parse(["reserved:world"])


# --- objects -----------------------------------------------------------------------------------


def test_spec_and_specs_add_up():
    text = """
        apiVersion: cilium.io/v2
        kind: CiliumNetworkPolicy
        metadata: {name: p}
        spec: {endpointSelector: {}, ingress: [{}]}
        specs:
        - {endpointSelector: {}, egress: [{}]}
        - {endpointSelector: {}, egressDeny: [{}]}
    """
    found = entries(text)
    assert [e.origin.path for e in found] == [
        "spec.ingress[0]",
        "specs[0].egress[0]",
        "specs[1].egressDeny[0]",
    ]
    assert [e.action for e in found] == [Action.ALLOW, Action.ALLOW, Action.DENY]


def test_a_policy_needs_a_rule():
    text = "{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: p}, specs: []}"
    assert "empty policy" in refuse(text)[0]


def test_a_policy_needs_a_name():
    text = "{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {}, spec: {}}"
    found = refuse(text)
    assert any("metadata: needs a name" in line for line in found)
    assert any("rule must have one of endpointSelector" in line for line in found)


def test_one_bad_rule_refuses_the_object_and_no_other():
    bad = cnp("endpointSelector: {}\ningress: [{fromEntities: [moon]}]")
    good = cnp("endpointSelector: {}\ningress: [{}]").replace("name: p", "name: q")
    result = read_text(f"{bad}---\n{good}")
    assert [str(one.key) for one in result.objects] == ["CiliumNetworkPolicy/shop/q"]
    assert len(result.errors) == 1


def test_every_problem_of_a_file_is_found_at_once():
    spec = """
        endpointSelector: {matchLabel: {}}
        ingress:
        - fromEndpoint: [{}]
          toPorts:
          - ports: [{port: "http-", protocol: TPC}]
        - fromCIDR: [10.0.0.0/33]
    """
    found = refuse(cnp(spec))
    places = [line.partition(": ")[0] for line in found]
    assert places == ["5:22", "7:5", "9:22", "9:41", "10:16"]
    assert found[1] == (
        '7:5: spec.ingress[0].fromEndpoint: unknown field "fromEndpoint"; '
        'did you mean "fromEndpoints"?'
    )
    assert "spec.ingress[0].toPorts[0].ports[0].port: unable to parse port" in found[2]
    assert found[3].endswith('did you mean "TCP"?')
    assert "prefix length 33 is longer than 32 bits" in found[4]


def test_the_demos_description_beside_spec_is_a_warning():
    """Cilium's Star Wars demo has it there."""
    text = cnp("endpointSelector: {}\ningress: [{}]") + "description: the demo\n"
    assert accept(text)
    assert "only a comment" in str(read_text(text).warnings[0])


def test_fields_of_the_api_server_are_accepted():
    text = cnp("endpointSelector: {}\ningress: [{}]").replace(
        "{name: p, namespace: shop}",
        "{name: p, namespace: shop, uid: 1-2, resourceVersion: '5', generation: 1, managedFields: "
        "[{a: b}], annotations: {x: y}, creationTimestamp: null, ownerReferences: []}",
    )
    found = accept(text + "status: {conditions: []}\n")
    assert "k8s:io.cilium.k8s.policy.uid=1-2" in found.labels


def test_the_wrong_api_version_names_the_right_one():
    text = cnp("endpointSelector: {}\ningress: [{}]").replace("cilium.io/v2", "cilium.io/v3")
    assert 'must be cilium.io/v2, not "cilium.io/v3"' in refuse(text)[0]


def test_a_kind_with_a_typing_error_is_no_workload():
    text = cnp("endpointSelector: {}\ningress: [{}]", "CiliumNetworkPolcy")
    assert 'did you mean "CiliumNetworkPolicy"?' in refuse(text)[0]


def test_other_kinds_are_skipped_with_a_warning():
    result = read_text("{apiVersion: apps/v1, kind: Deployment, metadata: {name: x}}")
    assert (result.objects, result.errors) == ((), ())
    assert "is no policy and is skipped" in str(result.warnings[0])


def test_kinds_that_change_traffic_are_not_skipped():
    text = "{apiVersion: cilium.io/v2, kind: CiliumLocalRedirectPolicy, metadata: {name: x}}"
    assert "is not supported" in refuse(text)[0]


@pytest.mark.parametrize("kind", ["List", "CiliumNetworkPolicyList"])
def test_lists_of_objects(kind):
    item = "{metadata: {name: a}, spec: {endpointSelector: {}, ingress: [{}]}}"
    if kind == "List":
        item = item.replace(
            "{metadata", "{apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata"
        )
    version = "v1" if kind == "List" else "cilium.io/v2"
    found = accept(f"{{apiVersion: {version}, kind: {kind}, metadata: {{}}, items: [{item}]}}")
    assert str(found.key) == "CiliumNetworkPolicy/default/a"


def test_bare_rules_are_named_by_their_labels():
    """`cilium policy import` took a JSON list of rules."""
    text = """[
      {"endpointSelector": {"matchLabels": {"id": "a"}}, "ingress": [{}],
       "labels": [{"key": "name", "value": "r1"}]},
      {"endpointSelector": {"matchLabels": {"id": "b"}}, "egress": [{}],
       "labels": ["unspec:name=r1"]},
      {"endpointSelector": {}, "egress": [{}]}
    ]"""
    result = read_text(text)
    assert result.problems == ()
    first, second = result.objects
    assert str(first.key) == "Rule/unspec:name=r1"
    assert len(first.entries) == 2
    assert first.entries[0].subject.describe() == "any:id=a"
    assert str(second.key).startswith("Rule/rule-")
    assert second.key == read_text(text).objects[1].key
    again = read_text(json.dumps(first.document)).objects
    assert [one.key for one in again] == [first.key]


def test_two_versions_of_one_object_refuse_each_other():
    one = cnp("endpointSelector: {}\ningress: [{}]")
    other = cnp("endpointSelector: {}\negress: [{}]")
    result = read_text(f"{one}---\n{other}")
    assert result.objects == ()
    assert [p.line for p in result.errors] == [1, 8]


def test_the_same_object_twice_is_a_warning():
    one = cnp("endpointSelector: {}\ningress: [{}]")
    result = read_text(f"{one}---\n{one}")
    assert len(result.objects) == 1
    assert [p.severity for p in result.problems] == ["warning"]


def test_origin_says_where_and_from_what():
    text = cnp("""
        endpointSelector: {}
        labels: [{key: team, value: x, source: k8s}]
        ingress:
        - fromEndpoints: [{}]
    """)
    origin = entries(text)[0].origin
    assert (origin.file, origin.line, origin.column) == ("p.yaml", 8, 5)
    assert (origin.kind, origin.namespace, origin.name) == ("CiliumNetworkPolicy", "shop", "p")
    assert origin.labels == (
        "k8s:team=x",
        "k8s:io.cilium.k8s.policy.derived-from=CiliumNetworkPolicy",
        "k8s:io.cilium.k8s.policy.name=p",
        "k8s:io.cilium.k8s.policy.namespace=shop",
    )


def test_the_document_is_kept_as_it_was_read():
    found = accept(cnp('endpointSelector: {matchLabels: {a: "1"}}\ningress: [{toPorts: []}]'))
    assert found.document["spec"] == {
        "endpointSelector": {"matchLabels": {"a": "1"}},
        "ingress": [{"toPorts": []}],
    }


# --- subjects ----------------------------------------------------------------------------------


def test_a_subject_is_confined_to_the_policys_namespace():
    subject = entry("endpointSelector: {matchLabels: {app: a}}\ningress: [{}]").subject
    assert subject.matches(pod(app="a"))
    assert not subject.matches(pod("other", app="a"))


def test_another_namespace_in_the_subject_is_replaced_with_a_warning():
    spec = "endpointSelector: {matchLabels: {k8s:io.kubernetes.pod.namespace: x}}\ningress: [{}]"
    result = read_text(cnp(spec))
    assert result.objects[0].entries[0].subject.matches(pod("shop"))
    assert "selects another namespace" in str(result.warnings[0])


def test_a_cluster_wide_subject_is_not_confined():
    (found,) = entries(ccnp("endpointSelector: {matchLabels: {app: a}}\ningress: [{}]"))
    assert found.subject.matches(pod("anywhere", app="a"))


def test_node_selectors_belong_to_cluster_wide_policies():
    assert "rule cannot have nodeSelector" in refuse(cnp("nodeSelector: {}\ningress: [{}]"))[0]
    (found,) = entries(ccnp("nodeSelector: {matchLabels: {a: b}}\ningress: [{}]"))
    assert found.subject_is_node


def test_exactly_one_subject():
    both = "endpointSelector: {}\nnodeSelector: {}\ningress: [{}]"
    assert "cannot have both" in refuse(ccnp(both))[0]
    assert "must have one of" in refuse(cnp("ingress: [{}]"))[0]


@pytest.mark.parametrize("spec", ["ingress: []", "ingress: []\negress: []", "description: x"])
def test_a_rule_without_entries_is_refused(spec):
    assert "rule must have at least one of" in refuse(cnp(f"endpointSelector: {{}}\n{spec}"))[0]


# --- missing, empty, wildcard (a.4) ------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "peers", "ports"),
    [
        ('{toPorts: [{ports: [{port: "80", protocol: TCP}]}]}', None, 1),
        ("{}", (), None),
        ("{fromEndpoints: []}", (), None),
        ('{fromEndpoints: [], toPorts: [{ports: [{port: "80", protocol: TCP}]}]}', (), 1),
        ("{fromEndpoints: null, toPorts: []}", (), None),
        ("{toPorts: []}", (), None),
        ("{icmps: [{fields: [{type: 8}]}]}", None, 1),
        ("{fromEntities: [all]}", (EntityPeer("all"),), None),
    ],
)
def test_missing_is_not_empty(item, peers, ports):
    """Cilium pkg/policy/l4_filter_test.go TestL3Wildcarding."""
    found = ingress(item)
    assert found.peers == peers
    assert (None if found.ports is None else len(found.ports)) == ports


def test_the_empty_selector_is_the_own_namespace_in_a_namespaced_policy():
    (peer,) = ingress("{fromEndpoints: [{}]}").peers
    assert peer.selector.matches(pod())
    assert not peer.selector.matches(pod("other"))
    assert not peer.selector.matches(HOST)
    assert not peer.selector.matches(WORLD)


def test_the_empty_selector_is_every_namespace_in_a_cluster_wide_policy():
    (found,) = entries(ccnp("endpointSelector: {}\ningress: [{fromEndpoints: [{}]}]"))
    (peer,) = found.peers
    assert peer.selector.matches(pod("any"))
    assert not peer.selector.matches(HOST)
    assert not peer.selector.matches(WORLD)


@pytest.mark.parametrize(
    "key",
    [
        "k8s:io.kubernetes.pod.namespace",
        "io.kubernetes.pod.namespace",
        "any:io.kubernetes.pod.namespace",
        "io.cilium.k8s.namespace.labels.team",
    ],
)
def test_a_peer_that_names_a_namespace_is_not_confined(key):
    (peer,) = ingress(f'{{fromEndpoints: [{{matchLabels: {{"{key}": bob}}}}]}}').peers
    assert "k8s:io.kubernetes.pod.namespace=shop" not in peer.selector.describe()


def test_a_peer_of_a_cluster_wide_policy_is_in_some_namespace_even_by_namespace_label():
    expression = "{key: io.cilium.k8s.namespace.labels.team, operator: DoesNotExist}"
    peer = f"{{fromEndpoints: [{{matchExpressions: [{expression}]}}]}}"
    (found,) = entries(ccnp(f"endpointSelector: {{}}\ningress: [{peer}]"))
    assert found.peers[0].selector.matches(pod("any"))
    assert not found.peers[0].selector.matches(HOST)


def test_a_reserved_peer_is_not_confined():
    (peer,) = ingress('{fromEndpoints: [{matchLabels: {"reserved:host": ""}}]}').peers
    assert peer.selector.matches(HOST)


def test_rules_for_init_know_no_namespaces():
    spec = """
        endpointSelector: {matchLabels: {"reserved:init": ""}}
        ingress: [{fromEndpoints: [{matchLabels: {a: b}}]}]
    """
    (found,) = entries(ccnp(spec))
    assert "pod.namespace" not in found.peers[0].selector.describe()


def test_peers_are_of_the_local_cluster_unless_they_say_otherwise():
    """policy-default-local-cluster, true since Cilium 1.19."""
    (peer,) = ingress("{fromEndpoints: [{matchLabels: {a: b}}]}").peers
    assert not peer.selector.matches(pod(cluster="far", a="b"))
    named = '{fromEndpoints: [{matchLabels: {"io.cilium.k8s.policy.cluster": far}}]}'
    assert ingress(named).peers[0].selector.matches(pod(cluster="far"))
    spec = "endpointSelector: {}\ningress: [{fromEndpoints: [{}]}]"
    anywhere = ReaderSettings(default_local_cluster=False)
    assert entry(spec, anywhere).peers[0].selector.matches(pod(cluster="far"))
    renamed = ReaderSettings(cluster_name="east")
    assert entry(spec, renamed).peers[0].selector.matches(pod(cluster="east"))


# --- default deny (a.5) ------------------------------------------------------------------------


def test_default_deny_follows_the_entries_unless_it_is_said():
    assert ingress("{}").default_deny
    spec = "endpointSelector: {}\nenableDefaultDeny: {egress: false}\nEXTRA"
    both = spec.replace("EXTRA", "ingress: [{}]\negressDeny: [{}]")
    found = entries(cnp(both))
    assert [(e.direction, e.default_deny) for e in found] == [
        (TrafficDirection.INGRESS, True),
        (TrafficDirection.EGRESS, False),
    ]


def test_default_deny_without_entries_has_no_effect_and_says_so():
    spec = "endpointSelector: {}\nenableDefaultDeny: {egress: true}\ningress: [{}]"
    assert "has no effect" in str(read_text(cnp(spec)).warnings[0])


def test_an_empty_list_beside_another_does_not_isolate_and_says_so():
    found = read_text(cnp("endpointSelector: {}\ningress: []\negress: [{}]"))
    assert [e.direction for e in found.objects[0].entries] == [TrafficDirection.EGRESS]
    assert "does not isolate" in str(found.warnings[0])


# --- peers (a.6) -------------------------------------------------------------------------------


def test_one_kind_of_peer_per_entry():
    found = refuse_ingress("{fromEndpoints: [{}], fromCIDR: [10.0.0.0/8]}")
    assert "combining fromEndpoints and fromCIDR is not supported yet" in found


def test_an_empty_kind_beside_another_means_nobody_and_says_so():
    """Cilium pkg/policy/utils/parserules.go mergeEndpointSelectors."""
    spec = "endpointSelector: {}\ningress: [{fromEndpoints: [], fromCIDR: [10.0.0.0/8]}]"
    result = read_text(cnp(spec))
    assert result.objects[0].entries[0].peers == ()
    assert "so nobody is meant" in str(result.warnings[0])


def test_cidrs_are_masked_and_of_both_families():
    found = egress('{toCIDR: [10.1.2.3/8, "fd00::1/64"]}')
    assert found.peers == (
        CidrPeer(parse_prefix("10.0.0.0/8")),
        CidrPeer(parse_prefix("fd00::/64")),
    )


@pytest.mark.parametrize(
    ("cidr", "message"),
    [
        ("10.0.0.1", "no length; write 10.0.0.1/32"),
        ("10.0.0.0/255.0.255.0", "a mask with holes is no CIDR"),
        ("10.0.0.0/08", "unable to parse CIDR"),
        ("10.0.0/8", "unable to parse CIDR"),
        ("10.0.0.256/8", "unable to parse CIDR"),
        ("'fd00::/129'", "unable to parse CIDR"),
        ("'fe80::1%eth0/64'", "unable to parse CIDR"),
        ("''", "IP must be specified"),
        ("[]", "must be a string, not a list"),
    ],
)
def test_what_is_no_cidr(cidr, message):
    assert message in refuse_egress(f"{{toCIDR: [{cidr}]}}")


def test_cidr_sets_have_exceptions_inside():
    found = egress("{toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}]}")
    assert found.peers == (CidrPeer(parse_prefix("10.0.0.0/8"), (parse_prefix("10.1.0.0/16"),)),)
    outside = "{toCIDRSet: [{cidr: 10.0.0.0/8, except: ['fd00::/16', 11.0.0.0/16]}]}"
    assert refuse_egress(outside).count("does not contain exclude CIDR prefix") == 2


def test_a_cidr_set_item_is_one_thing():
    assert "exactly one of" in refuse_egress("{toCIDRSet: [{except: [10.0.0.0/8]}]}")
    assert "exactly one of" in refuse_egress("{toCIDRSet: [{cidr: 10.0.0.0/8, cidrGroupRef: a}]}")


def test_cidr_groups_by_name_and_by_labels():
    found = egress("{toCIDRSet: [{cidrGroupRef: vpn, except: [10.1.0.0/16]}]}")
    assert found.peers == (CidrGroupPeer("vpn", None, (parse_prefix("10.1.0.0/16"),)),)
    (peer,) = egress("{toCIDRSet: [{cidrGroupSelector: {matchLabels: {a: b}}}]}").peers
    assert (peer.name, peer.selector.describe()) == (None, "any:a=b")
    assert "is no name of a CiliumCIDRGroup" in refuse_egress("{toCIDRSet: [{cidrGroupRef: A_b}]}")


@pytest.mark.parametrize(
    "entity",
    [
        "all",
        "world",
        "world-ipv4",
        "world-ipv6",
        "cluster",
        "cluster-mesh",
        "host",
        "remote-node",
        "kube-apiserver",
        "init",
        "ingress",
        "unmanaged",
        "health",
        "none",
    ],
)
def test_entities(entity):
    assert egress(f"{{toEntities: [{entity}]}}").peers == (EntityPeer(entity),)


def test_an_unknown_entity_is_named():
    found = refuse_ingress("{fromEntities: [hots]}")
    assert 'unsupported entity: hots; did you mean "host"?' in found


def test_services_by_name_and_by_labels():
    found = egress("{toServices: [{k8sService: {serviceName: db, namespace: x}}]}")
    assert found.peers == (ServicePeer("db", "x", None),)
    selector = "{toServices: [{k8sServiceSelector: {selector: {matchLabels: {a: b}}}}]}"
    (peer,) = egress(selector).peers
    assert (peer.name, peer.namespace, peer.selector.describe()) == (None, "", "any:a=b")
    assert "needs exactly one of" in refuse_egress("{toServices: [{}]}")
    assert "needs serviceName" in refuse_egress("{toServices: [{k8sService: {namespace: x}}]}")
    assert "needs selector" in refuse_egress("{toServices: [{k8sServiceSelector: {}}]}")


def test_names_are_lower_case():
    found = egress("{toFQDNs: [{matchName: Cilium.IO}, {matchPattern: '*.Cilium.io'}]}")
    assert found.peers == (FqdnPeer("cilium.io", None), FqdnPeer(None, "*.cilium.io"))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("{matchName: a.com, matchPattern: b.com}", "only one of matchName or matchPattern"),
        ("{}", "one of matchName or matchPattern is needed"),
        ("{matchName: '*.a.com'}", "is a pattern; write it as matchPattern"),
        ("{matchName: 'a b'}", "is no DNS name"),
        ("{matchName: 'a..b'}", "is no DNS name"),
        ("{matchName: ''}", "is no DNS name"),
        ("{matchPattern: 'a[b]'}", "is no DNS name"),
        (f"{{matchName: {'a' * 256}}}", "is longer than 255 characters"),
        (f"{{matchName: {'a' * 250}!}}", "is no DNS name"),
    ],
)
def test_what_is_no_name(item, message):
    assert message in refuse_egress(f"{{toFQDNs: [{item}]}}")


def test_nodes():
    assert isinstance(ingress("{fromNodes: [{matchLabels: {a: b}}]}").peers[0], NodePeer)


def test_peers_of_the_other_direction_are_explained():
    assert 'did you mean "fromEndpoints"?' in refuse_ingress("{toEndpoints: [{}]}")
    assert 'did you mean "toCIDR"?' in refuse_egress("{fromCIDR: []}")


def test_names_cannot_be_denied():
    spec = "endpointSelector: {}\negressDeny: [{toFQDNs: [{matchName: a.com}]}]"
    assert "names cannot be denied" in refuse(cnp(spec))[0]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("{key: a, operator: in, values: [b]}", '"in" is none of In, NotIn'),
        ("{key: a, operator: In}", "needs at least one value"),
        ("{key: a, operator: Exists, values: [b]}", "takes no values"),
        ("{operator: Exists}", "needs key"),
        ("{key: 'moon:a', operator: Exists}", "unknown label source"),
        ("{key: a, operator: In, values: ['b c']}", "is no label value"),
    ],
)
def test_selectors_are_checked(expression, message):
    found = refuse_ingress(f"{{fromEndpoints: [{{matchExpressions: [{expression}]}}]}}")
    assert message in found


# --- ports (a.7) -------------------------------------------------------------------------------


def ports(item):
    return ingress(f"{{toPorts: [{{ports: [{item}]}}]}}").ports


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ('{port: "80", protocol: TCP}', [PortRange(TCP, 80, 80)]),
        ("{port: 80, protocol: tcp}", [PortRange(TCP, 80, 80)]),
        ('{port: "80", endPort: 90, protocol: UDP}', [PortRange(UDP, 80, 90)]),
        ('{port: "80", endPort: 0, protocol: UDP}', [PortRange(UDP, 80, 80)]),
        ('{port: "0", protocol: TCP}', [PortRange(TCP, 0, 65535)]),
        ('{port: "53"}', [PortRange(p, 53, 53) for p in (TCP, UDP, SCTP)]),
        ('{port: "53", protocol: ANY}', [PortRange(p, 53, 53) for p in (TCP, UDP, SCTP)]),
        ("{port: Web-1, protocol: TCP}", [PortRange(TCP, 0, 0, "web-1")]),
        ('{port: "0x10", protocol: TCP}', [PortRange(TCP, 0, 0, "0x10")]),
        ("{port: http, endPort: 90, protocol: TCP}", [PortRange(TCP, 0, 0, "http")]),
        ("{protocol: GRE}", [PortRange(47)]),
        ('{port: "0", protocol: VRRP}', [PortRange(112)]),
    ],
)
def test_ports(item, expected):
    assert list(ports(item)) == expected


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("{protocol: TCP}", "port must be specified"),
        ('{port: ""}', "port must be specified"),
        ('{port: "65536"}', "the highest port is 65535"),
        ('{port: "-1"}', "unable to parse port"),
        ('{port: "8 0"}', "unable to parse port"),
        ('{port: "080"}', "unable to parse port"),
        ('{port: "web--1"}', "unable to parse port"),
        ('{port: "a234567890123456"}', "unable to parse port"),
        ('{port: "80", protocol: ICMP}', "ICMP has types, not ports; use icmps"),
        ('{port: "80", endPort: 79}', "must not be lower than port 80"),
        ('{port: "80", endPort: 65536}', "must be between 0 and 65535"),
        ('{port: "0", endPort: 5}', "already means every port"),
        ('{port: "80", protocol: GRE}', "the protocol has no ports"),
        ("80", "must be a mapping, not 80"),
    ],
)
def test_what_is_no_port(item, message):
    assert message in refuse_ingress(f"{{toPorts: [{{ports: [{item}]}}]}}")


def test_at_most_forty_ports():
    items = ", ".join(f'{{port: "{n}"}}' for n in range(1, 42))
    found = refuse_ingress(f"{{toPorts: [{{ports: [{items}]}}]}}")
    assert "too many ports, the max is 40" in found


def test_every_ports_item_is_an_entry_with_the_same_peers():
    item = """{fromEntities: [world], toPorts: [
        {ports: [{port: "80", protocol: TCP}], rules: {http: [{}]}},
        {ports: [{port: "81", protocol: TCP}]}]}"""
    first, second = entries(cnp(f"endpointSelector: {{}}\ningress: [{item}]"))
    assert first.peers == second.peers == (EntityPeer("world"),)
    assert (first.l7 is not None, second.l7) == (True, None)
    assert second.origin.path == "spec.ingress[0].toPorts[1]"


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("{type: 8}", PortRange(1, 8, 8)),
        ('{family: IPv4, type: "255"}', PortRange(1, 255, 255)),
        ("{family: IPv4, type: EchoRequest}", PortRange(1, 8, 8)),
        ("{family: IPv6, type: EchoRequest}", PortRange(58, 128, 128)),
        ("{family: IPv6, type: NeighborSolicitation}", PortRange(58, 135, 135)),
    ],
)
def test_icmp_types(field, expected):
    assert ingress(f"{{icmps: [{{fields: [{field}]}}]}}").ports == (expected,)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("{family: hoge, type: 8}", "wrong family: hoge"),
        ("{type: 256}", "is no type of ICMP over IPv4"),
        ("{type: PacketTooBig}", "is no type of ICMP over IPv4"),
        ("{family: IPv6, type: Echo}", "is no type of ICMP over IPv6"),
        ("{family: IPv4}", "needs type"),
        ("{type: 8, code: 0}", 'unknown field "code"'),
    ],
)
def test_what_is_no_icmp_type(field, message):
    assert message in refuse_ingress(f"{{icmps: [{{fields: [{field}]}}]}}")


def test_icmps_and_ports_exclude_each_other():
    item = '{icmps: [{fields: [{type: 8}]}], toPorts: [{ports: [{port: "80"}]}]}'
    assert "may only be present without toPorts" in refuse_ingress(item)


# --- layer 7 (a.8) -----------------------------------------------------------------------------


def l7(rules, port='{port: "80", protocol: TCP}', extra=""):
    return f"{{toPorts: [{{ports: [{port}], rules: {rules}{extra}}}]}}"


def test_http_rules():
    rule = (
        "{method: GET, path: '/a|/b', host: 'x[.]com', headers: ['X-A: 1', X-B], "
        "headerMatches: [{name: X-C, value: c}, {name: X-D, mismatch: REPLACE, value: d}]}"
    )
    found = ingress(l7(f"{{http: [{rule}]}}")).l7
    assert found.kind == "http"
    (http,) = found.http
    assert (http.method, http.path, http.host) == ("GET", "/a|/b", "x[.]com")
    assert http.headers == ("X-A: 1", "X-B")
    assert [(m.name, m.value, m.mismatch) for m in http.header_matches] == [
        ("X-C", "c", ""),
        ("X-D", "d", "REPLACE"),
    ]


def test_an_empty_list_of_rules_allows_everything_through_the_proxy():
    found = ingress(l7("{http: []}"))
    assert found.l7 is not None
    assert found.l7.http == ()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (l7("{http: [{path: '*'}]}"), "error parsing regexp"),
        (l7("{http: [{method: '('}]}"), "error parsing regexp"),
        (l7("{http: [{host: '(?=a)'}]}"), "error parsing regexp"),
        (l7("{http: [{headers: ['']}]}"), "is empty"),
        (l7("{http: [{headers: [X-A: b]}]}"), "put quotes around it"),
        (l7("{http: [{headerMatches: [{value: x}]}]}"), "needs the header's name"),
        (l7("{http: [{headerMatches: [{name: a, mismatch: log}]}]}"), 'did you mean "LOG"?'),
        (l7("{http: [{headerMatches: [{name: a, secret: {}}]}]}"), "needs the secret's name"),
        (l7("{http: [], dns: []}"), "multiple L7 protocol rule types"),
        (l7("{}"), "needs exactly one of http, dns"),
        (l7("{htpp: []}"), 'did you mean "http"?'),
        (l7("{kafka: [{topic: a}]}"), "removed in Cilium 1.20"),
        (l7("{l7proto: x, l7: [{a: b}]}"), "removed in Cilium 1.20"),
        (l7("{http: []}", '{port: "80"}'), "L7 rules can only apply to TCP"),
        (l7("{http: []}", '{port: "80", protocol: UDP}'), "L7 rules can only apply to TCP"),
        (l7("{http: []}", '{port: "0", protocol: TCP}'), "can not be used when a port is 0"),
        (l7("{dns: [{matchName: a.com}]}", '{port: "53"}'), "not allowed on ingress"),
        (
            l7("{http: []}", extra=", serverNames: [a.com]"),
            "not allowed with L7 rules without TLS termination",
        ),
        ('{toPorts: [{ports: [{port: "443"}], serverNames: []}]}', "leave it out"),
        ('{toPorts: [{ports: [{port: "443"}], serverNames: [""]}]}', "empty server name"),
        ('{toPorts: [{ports: [{port: "443"}], terminatingTLS: {}}]}', "needs secret"),
        (
            """{toPorts: [{ports: [{port: "53", protocol: TCP}], rules: {dns: []},
                originatingTLS: {secret: {name: a}}}]}""",
            "is not allowed with DNS rules",
        ),
        (
            '{toPorts: [{ports: [{port: "443"}], listener: {name: a, envoyConfig: {name: b}}}]}',
            "listener is not allowed on ingress",
        ),
        ("{authentication: {mode: maybe}}", '"maybe" is none of disabled, required'),
        ("{authentication: {}}", "needs mode"),
    ],
)
def test_layer_7_is_checked(item, message):
    assert message in refuse_ingress(item)


def test_http_rules_may_cover_a_range_of_ports():
    found = ingress(l7("{http: [{}]}", '{port: "80", endPort: 90, protocol: TCP}'))
    assert found.ports == (PortRange(TCP, 80, 90),)


def test_dns_rules():
    rules = "{dns: [{matchName: A.com}, {matchPattern: '*'}]}"
    found = egress(l7(rules, '{port: "53"}')).l7
    assert [(d.match_name, d.match_pattern) for d in found.dns] == [("a.com", None), (None, "*")]
    assert "port 53 must be specified" in refuse_egress(f"{{toPorts: [{{rules: {rules}}}]}}")
    ranged = l7(rules, '{port: "53", endPort: 54, protocol: UDP}')
    assert "range of ports" in refuse_egress(ranged)


def test_server_names_beside_other_protocols_are_warned_of():
    """Cilium takes them; what cannot be read stays closed."""
    item = "{toPorts: [{ports: [{port: '443'}], serverNames: [a.com]}]}"
    result = read(cnp(f"endpointSelector: {{}}\negress: [{item}]"), "p.yaml")
    assert [problem.message for problem in result.problems] == [
        "TLS is read in TCP; other protocols of these ports stay closed"
    ]
    assert result.objects


def test_tls_and_listeners():
    tls = "{secret: {namespace: n, name: s}, trustedCA: ca}"
    item = f"""{{toPorts: [{{ports: [{{port: "443", protocol: TCP}}], serverNames: ["*.A.com"],
        terminatingTLS: {tls}, originatingTLS: {tls}, rules: {{http: [{{}}]}}}}]}}"""
    found = egress(item)
    assert found.server_names == ("*.a.com",)
    assert (found.terminating_tls.trusted_ca, found.terminating_tls.certificate) == ("ca", "")
    listener = "{name: l, priority: 5, envoyConfig: {kind: CiliumEnvoyConfig, name: e}}"
    item = f'{{toPorts: [{{ports: [{{port: "80", protocol: TCP}}], listener: {listener}}}]}}'
    assert egress(item).listener.priority == 5
    wrong = item.replace("priority: 5", "priority: 101")
    assert "between 0 and 100" in refuse_egress(wrong)


def test_deny_entries_have_ports_only():
    spec = f"endpointSelector: {{}}\ningressDeny: [{l7('{http: []}')}]"
    assert "is not for deny entries" in refuse(cnp(spec))[0]


def test_host_policies_have_no_layer_7_but_dns():
    on_ingress = ccnp(f"nodeSelector: {{}}\ningress: [{l7('{http: []}')}]")
    assert "not supported on host ingress yet" in refuse(on_ingress)[0]
    on_egress = ccnp(f"nodeSelector: {{}}\negress: [{l7('{http: []}')}]")
    assert "not supported on host egress" in refuse(on_egress)[0]
    port = '{port: "53", protocol: UDP}'
    assert entries(ccnp(f"nodeSelector: {{}}\negress: [{l7('{dns: []}', port)}]"))


def test_log_values_are_short_and_printable():
    spec = "endpointSelector: {}\nlog: {value: VALUE}\ningress: [{}]"
    assert entry(spec.replace("VALUE", "team a")).log == "team a"
    assert "longer than 32" in refuse(cnp(spec.replace("VALUE", "x" * 33)))[0]
    assert "cannot be printed" in refuse(cnp(spec.replace("VALUE", '"a\\u0007b"')))[0]


# --- removed, and not enforced -----------------------------------------------------------------


def test_removed_fields_say_since_when():
    assert "removed in Cilium 1.19" in refuse_ingress("{fromRequires: [{}]}")
    assert "removed in Cilium 1.19" in refuse_egress("{toRequires: [{}]}")


def test_groups_are_refused():
    assert "no cloud provider is asked" in refuse_egress("{toGroups: [{aws: {}}]}")


NEEDS = {
    "http": ("ingress", l7("{http: []}")),
    "header-matches": ("ingress", l7("{http: [{headerMatches: [{name: a}]}]}")),
    "header-mismatch-actions": (
        "ingress",
        l7("{http: [{headerMatches: [{name: a, mismatch: LOG}]}]}"),
    ),
    "secrets": ("ingress", l7("{http: [{headerMatches: [{name: a, secret: {name: s}}]}]}")),
    "dns": ("egress", l7("{dns: []}", '{port: "53"}')),
    "fqdn": ("egress", "{toFQDNs: [{matchName: a.com}]}"),
    "server-names": (
        "egress",
        '{toPorts: [{ports: [{port: "443", protocol: TCP}], serverNames: [a.com]}]}',
    ),
    "tls": (
        "egress",
        '{toPorts: [{ports: [{port: "443", protocol: TCP}], originatingTLS: {secret: {name: a}}}]}',
    ),
    "listener": (
        "egress",
        '{toPorts: [{ports: [{port: "1"}], listener: {name: a, envoyConfig: {name: b}}}]}',
    ),
    "authentication": ("ingress", "{authentication: {mode: required}}"),
    "nodes": ("ingress", "{fromNodes: [{}]}"),
    "services": ("egress", "{toServices: [{k8sService: {serviceName: a}}]}"),
    "cidr-groups": ("egress", "{toCIDRSet: [{cidrGroupRef: a}]}"),
    "extended-protocols": ("ingress", "{toPorts: [{ports: [{protocol: GRE}]}]}"),
    "host-policy": ("nodes", "{}"),
    "namespaces": ("", ""),
}


def test_every_capability_has_a_case():
    assert set(NEEDS) == set(CAPABILITIES)
    assert set(CAPABILITIES) >= ENFORCED


@pytest.mark.parametrize("capability", sorted(set(CAPABILITIES) - {"namespaces"}))
def test_what_is_not_enforced_is_refused_not_ignored(capability):
    section, item = NEEDS[capability]
    if section == "nodes":
        text = ccnp(f"nodeSelector: {{}}\ningress: [{item}]")
    else:
        text = cnp(f"endpointSelector: {{}}\n{section}: [{item}]")
    assert read_text(text, EVERY_CAPABILITY).errors == ()
    without = ReaderSettings(enforceable=frozenset(CAPABILITIES) - {capability})
    (error,) = refuse(text, without)
    assert error.endswith(f"[{capability}]")
    setting = SWITCHED.get(capability)
    told = f"needs `{setting}: on`" if setting else "is not enforced by this version"
    assert told in error


@pytest.mark.parametrize("capability", sorted(SWITCHED))
def test_offline_what_a_setting_decides_is_accepted_with_a_warning(capability):
    """No daemon is asked, so the author is told what it needs."""
    section, item = NEEDS[capability]
    spec = f"nodeSelector: {{}}\ningress: [{item}]" if section == "nodes" else ""
    text = ccnp(spec or f"endpointSelector: {{}}\n{section}: [{item}]")
    result = read_text(text, ReaderSettings(assumed=frozenset(SWITCHED)))
    assert result.errors == ()
    assert [f"`{SWITCHED[capability]}: on`" in str(w) for w in result.warnings] == [True]


def test_nodes_as_peers_are_the_other_nodes():
    """Research a.6: an added `reserved:remote-node Exists`."""
    (peer,) = ingress("{fromNodes: [{matchLabels: {a: b}}]}").peers
    assert peer.selector.has_key("remote-node", ("reserved",))


def test_authentication_that_is_off_needs_nothing():
    assert entry(
        "endpointSelector: {}\ningress: [{authentication: {mode: disabled}}]", ReaderSettings()
    )
