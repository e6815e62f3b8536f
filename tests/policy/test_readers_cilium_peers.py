"""CiliumNetworkPolicy: default deny and every kind of peer (research a.5, a.6)."""

import pytest
from policy_reading import (
    cnp,
    egress,
    entries,
    ingress,
    read_text,
    refuse,
    refuse_egress,
    refuse_ingress,
)

from conntrack.address import parse_prefix
from firewall.policy.model import (
    CidrGroupPeer,
    CidrPeer,
    EntityPeer,
    FqdnPeer,
    NodePeer,
    ServicePeer,
)
from firewall.policy.verdict import TrafficDirection

TCP, UDP, SCTP = 6, 17, 132


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


def test_a_mapped_prefix_matches_nothing_and_says_so():
    text = cnp("endpointSelector: {}\negress: [{toCIDR: ['::ffff:10.0.0.0/104', '::/0']}]")
    (warning,) = read_text(text).warnings
    assert str(warning).endswith("write 10.0.0.0/8")


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


@pytest.mark.parametrize(
    "key",
    [
        "app",
        "k8s:app.kubernetes.io/name",
        "io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name",
        "container:_x",
        "cidr:10.0.0.0/8",
        "cidr:2001-db8--0/32",
        "fqdn:*.a.com",
        "cidrgroup:g",
    ],
)
def test_keys_of_every_source_are_taken(key):
    text = cnp(
        f"endpointSelector: {{}}\ningress: [{{fromEndpoints: [{{matchLabels: {{'{key}': ''}}}}]}}]"
    )
    assert read_text(text).problems == ()


def test_a_reserved_label_that_does_not_exist_is_nobodys():
    text = cnp(
        "endpointSelector: {}\ningress: [{fromEndpoints: [{matchLabels: {'reserved:hots': ''}}]}]"
    )
    (warning,) = read_text(text).warnings
    assert warning.message == 'no identity has the label "reserved:hots"; did you mean "host"?'


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
        ("{key: 'a b', operator: DoesNotExist}", '"a b" is no label key'),
        ("{key: 'k8s:a;b', operator: Exists}", '"a;b" is no label key'),
        ("{key: -a, operator: Exists}", '"-a" is no label key'),
        ("{key: ä, operator: Exists}", "is no label key"),
    ],
)
def test_selectors_are_checked(expression, message):
    found = refuse_ingress(f"{{fromEndpoints: [{{matchExpressions: [{expression}]}}]}}")
    assert message in found
