"""Objects that policies refer to."""

import pytest
from policy_reading import read_text

from conntrack.address import parse_address, parse_prefix
from firewall.policy.objects import (
    BackendsObject,
    CidrGroupObject,
    NamespaceObject,
    ServiceObject,
)
from firewall.policy.readers import ReaderSettings


def one(text):
    result = read_text(text)
    assert result.problems == ()
    (found,) = result.resources
    return found


def test_cidr_groups():
    for version in ("v2", "v2alpha1"):
        found = one(f"""
            apiVersion: cilium.io/{version}
            kind: CiliumCIDRGroup
            metadata: {{name: vpn, labels: {{role: vpn}}}}
            spec: {{externalCIDRs: [10.48.0.0/24, 10.16.0.0/24]}}
        """)
        assert isinstance(found, CidrGroupObject)
        assert found.name == "vpn"
        assert found.labels.strings() == ("cidrgroup:role=vpn",)
        assert found.prefixes == (parse_prefix("10.48.0.0/24"), parse_prefix("10.16.0.0/24"))


def test_a_cidr_group_is_checked():
    text = """
        apiVersion: cilium.io/v2
        kind: CiliumCIDRGroup
        metadata: {name: vpn}
        spec: {externalCIDR: []}
    """
    messages = [str(p) for p in read_text(text).errors]
    assert any('did you mean "externalCIDRs"?' in message for message in messages)


def test_a_cidr_group_that_nothing_uses_is_refused():
    text = """
        apiVersion: cilium.io/v2
        kind: CiliumCIDRGroup
        metadata: {name: a}
        spec: {externalCIDRs: []}
    """
    result = read_text(text, ReaderSettings(enforceable=frozenset()))
    assert result.resources == ()
    assert "[cidr-groups]" in str(result.errors[0])


def test_services_with_and_without_selector():
    found = one("""
        apiVersion: v1
        kind: Service
        metadata: {name: db, namespace: shop, labels: {a: b}}
        spec: {selector: {app: db}, ports: [{port: 1}], type: ClusterIP}
    """)
    assert isinstance(found, ServiceObject)
    assert (found.namespace, found.name, found.selector) == ("shop", "db", (("app", "db"),))
    assert found.labels.strings() == ("k8s:a=b",)
    bare = one("{apiVersion: v1, kind: Service, metadata: {name: db}, spec: {ports: []}}")
    assert bare.selector is None


def test_endpoint_slices_belong_to_the_service_of_their_label():
    found = one("""
        apiVersion: discovery.k8s.io/v1
        kind: EndpointSlice
        metadata: {name: db-1, namespace: shop, labels: {kubernetes.io/service-name: db}}
        addressType: IPv4
        endpoints:
        - {addresses: [1.2.3.4], conditions: {ready: true}}
        - {addresses: [1.2.3.5], conditions: {ready: false}}
        - {addresses: [1.2.3.6]}
        ports: [{port: 80}]
    """)
    assert isinstance(found, BackendsObject)
    assert found.service == "db"
    assert found.addresses == (parse_address("1.2.3.4"), parse_address("1.2.3.6"))


def test_endpoints_belong_to_the_service_of_their_name():
    found = one("""
        apiVersion: v1
        kind: Endpoints
        metadata: {name: db}
        subsets: [{addresses: [{ip: 1.2.3.4}, {ip: "::1"}], ports: []}]
    """)
    assert found.service == "db"
    assert found.addresses == (parse_address("1.2.3.4"), parse_address("::1"))


def test_namespaces_have_labels():
    found = one("{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {team: x}}}")
    assert isinstance(found, NamespaceObject)
    assert found.labels.strings() == ("k8s:team=x",)


def test_a_bad_address_is_told():
    text = """
        apiVersion: v1
        kind: Endpoints
        metadata: {name: db}
        subsets: [{addresses: [{ip: 1.2.3.400}]}]
    """
    assert '"1.2.3.400" is no IP address' in str(read_text(text).errors[0])


@pytest.mark.parametrize("kind", ["Namespace", "Service"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("{team: 'red;k8s:role=admin'}", "is no label value"),
        ("{team: 'a b'}", "is no label value"),
        ("{'te;am': red}", '"te;am" is no Kubernetes label key'),
    ],
)
def test_labels_that_would_tear_an_identity_are_refused(kind, labels, message):
    """Identities are kept as text in which a semicolon ends a label."""
    text = f"apiVersion: v1\nkind: {kind}\nmetadata: {{name: x, labels: {labels}}}\nspec: {{}}\n"
    (error,) = read_text(text).errors
    assert message in error.message
    assert error.line == 3


def test_a_label_of_a_namespace_may_be_empty():
    text = "apiVersion: v1\nkind: Namespace\nmetadata: {name: x, labels: {a: , b: ''}}\n"
    (namespace,) = read_text(text).resources
    assert namespace.labels.strings() == ("k8s:a", "k8s:b")


def test_a_service_selects_by_labels_that_can_be():
    text = "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {selector: {'a;b': c}}\n"
    (error,) = read_text(text).errors
    assert '"a;b" is no Kubernetes label key' in error.message
