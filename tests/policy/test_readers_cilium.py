"""CiliumNetworkPolicy and its cluster-wide form: objects, subjects, wildcards (a.1-a.4)."""

import json

import pytest
from policy_reading import (
    HOST,
    WORLD,
    accept,
    ccnp,
    cnp,
    entries,
    entry,
    ingress,
    pod,
    read_text,
    refuse,
)

from firewall.policy.model import (
    Action,
    EntityPeer,
)
from firewall.policy.readers import ReaderSettings

TCP, UDP, SCTP = 6, 17, 132


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


def test_lists_in_lists_are_read_to_the_bottom():
    """As kubectl does; a policy that is skipped would be believed in."""
    text = cnp("endpointSelector: {}\ningress: [{}]")
    for _ in range(3):
        text = "apiVersion: v1\nkind: List\nitems:\n- " + text.strip().replace("\n", "\n  ")
    assert accept(text).key.kind == "CiliumNetworkPolicy"


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
