"""Every policy of the shared corpus: the valid ones are accepted, the invalid ones refused.

A file that upstream cannot mean to be applied as it is (templates with placeholders, objects that
are no policies, a file of which an API server refuses a part) is listed with the reason.
"""

import functools
import json
from dataclasses import replace

import pytest
import yaml
from policy_reading import CORPUS, EVERY_CAPABILITY, load_yaml, refuse

from firewall.policy.readers import ENFORCED, ReaderSettings, read

CILIUM = CORPUS / "cilium"
KUBERNETES = CORPUS / "k8s"

pytestmark = pytest.mark.skipif(not CILIUM.is_dir(), reason="needs ../shared/corpus/cilium")

ENVOY = "an Envoy configuration, which is not enforced"
PLACEHOLDER = "a template with placeholders"
TEMPLATE = "a Go template"
ADDRESS = "holds the placeholder NODE_WITHOUT_CILIUM_IP"
NO_YAML = "no YAML: output of a command"

REFUSED = {
    "examples/kubernetes-egress-gateway/egress-gateway-policy.yaml": "an egress gateway",
    "examples/kubernetes/servicemesh/envoy/envoy-admin-listener-nodeselector.yaml": ENVOY,
    "examples/kubernetes/servicemesh/envoy/envoy-admin-listener.yaml": ENVOY,
    "examples/kubernetes/servicemesh/envoy/envoy-circuit-breaker.yaml": ENVOY,
    "examples/kubernetes/servicemesh/envoy/envoy-helloworld-v1-90-v2-10.yaml": ENVOY,
    "examples/kubernetes/servicemesh/envoy/envoy-prometheus-metrics-listener.yaml": ENVOY,
    "examples/kubernetes/servicemesh/envoy/envoy-traffic-management-test.yaml": ENVOY,
    "examples/policies/auth/auth.yaml": "an unknown field `auth`",
    "examples/policies/l3/requires/requires.yaml": "fromRequires, removed in Cilium 1.19",
    "test/k8s/manifests/ccnp-host-ingress-from-cidr-to-ports.yaml": ADDRESS,
    "test/k8s/manifests/ccnp-host-policy-nodeport-tests.yaml": ADDRESS,
    "test/k8s/manifests/cnp-ingress-from-cidr-to-ports.yaml": ADDRESS,
    "test/k8s/manifests/cnp-second-namespaces/templates/policy.yaml": TEMPLATE,
    "docs-snippets/Documentation__network__kubernetes__configuration.rst.1.txt": NO_YAML,
    "docs-snippets/Documentation__operations__performance__scalability__report.rst.1.yaml": (
        PLACEHOLDER
    ),
    "docs-snippets/Documentation__operations__performance__scalability__report.rst.2.yaml": (
        PLACEHOLDER
    ),
    "docs-snippets/Documentation__operations__upgrade.rst.5.txt": NO_YAML,
    "docs-snippets/Documentation__operations__upgrade.rst.6.txt": NO_YAML,
    "docs-snippets/Documentation__security__aws.rst.1.yaml": "toGroups asks a cloud provider",
    "scale-test/fqdn/fqdn-cnp.yaml": TEMPLATE,
    "scale-test/l7/manifests/policy.yaml": TEMPLATE,
    "scale-test/netpol/cnp.yaml": TEMPLATE,
    "connectivity/client-egress-only-dns.yaml": TEMPLATE,
    "connectivity/client-egress-only-port-53.yaml": TEMPLATE,
    "connectivity/client-egress-to-cidr-cp-host-knp.yaml": TEMPLATE,
    "connectivity/client-egress-to-cidr-external-deny.yaml": TEMPLATE,
    "connectivity/client-egress-to-fqdns-and-http-get.yaml": TEMPLATE,
    "connectivity/echo-ingress-from-cidr.yaml": TEMPLATE,
    "connectivity/local-redirect-policy.yaml": "a local redirect policy",
}
"""Files of which something is refused, with the reason."""

ENDS_AT_65537 = "endPort 65537, which an API server refuses as well"


def without_places(found):
    """Return the entries as they are wherever they stand in a file."""
    return [
        replace(entry, origin=replace(entry.origin, path="", line=0, column=0))
        for entry in found.entries
    ]


def policy_files():
    folders = ("examples", "test", "docs-snippets", "scale-test", "connectivity")
    suffixes = (".yaml", ".json", ".txt")
    return [
        str(file.relative_to(CILIUM))
        for folder in folders
        for file in sorted((CILIUM / folder).rglob("*"))
        if file.suffix in suffixes
    ]


@pytest.mark.parametrize("name", policy_files())
def test_ciliums_own_files(name):
    result = read((CILIUM / name).read_text(), name, settings=EVERY_CAPABILITY)
    if name in REFUSED:
        assert result.errors
        return
    assert [str(p) for p in result.errors] == []
    for found in result.objects:
        (again,) = read(json.dumps(found.document), name, settings=EVERY_CAPABILITY).objects
        assert again.key == found.key
        assert without_places(again) == without_places(found)
    policies = (CILIUM / name).read_text().count("NetworkPolicy\n")
    assert bool(result.objects) or not policies


def test_the_list_of_refused_files_is_of_files_that_exist():
    assert set(REFUSED) <= set(policy_files())


@functools.cache
def semantic_cases():
    return load_yaml(CILIUM / "semantic_cases.yaml") if CILIUM.is_dir() else {}


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c["id"]) for c in semantic_cases().get("cases", ())]
)
def test_policies_of_the_semantic_cases_are_valid(case):
    result = read(case.get("policies") or "", case["id"], settings=EVERY_CAPABILITY)
    assert [str(p) for p in result.problems] == []


SAYS = {
    "INV-01": "at least one of ingress",
    "INV-03": "cannot have both endpointSelector and nodeSelector",
    "INV-05": "is none of In, NotIn, Exists, DoesNotExist",
    "INV-07": "combining toEndpoints and toFQDNs is not supported yet",
    "INV-09": '"enable-node-selector-labels" flag is set',
    "INV-11": "wrong family: hoge",
    "INV-13": "L7 rules can only apply to TCP",
    "INV-15": "port 53 must be specified for DNS rules",
    "INV-17": "multiple L7 protocol rule types",
    "INV-19": "error parsing regexp",
    "INV-21": "not allowed with L7 rules without TLS termination",
    "INV-23": "listener is not allowed on ingress",
    "INV-25": "allow CIDR prefix 10.0.0.0/24 does not contain exclude CIDR prefix 10.0.0.0/16",
    "INV-27": "10.0.1.32/32",
    "INV-29": "only one of matchName or matchPattern",
    "INV-31": "not supported on host ingress yet",
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c["id"]) for c in semantic_cases().get("invalid_policies", ())]
)
def test_policies_to_refuse_are_refused_for_the_right_reason(case):
    """INV-09 is about a switch that is off in Cilium; here a reader without that capability."""
    document = {
        "apiVersion": "cilium.io/v2",
        "kind": case.get("kind", "CiliumNetworkPolicy"),
        "metadata": {"name": "p"},
        "spec": case["spec"],
    }
    without_nodes = ReaderSettings(enforceable=ENFORCED - {"nodes"})
    settings = without_nodes if case["id"] == "INV-09" else EVERY_CAPABILITY
    found = "\n".join(refuse(yaml.safe_dump(document), settings))
    assert SAYS.get(case["id"], "") in found


def kubernetes_files():
    return [str(f.relative_to(KUBERNETES)) for f in sorted(KUBERNETES.rglob("*.yaml"))]


def policies_of(case):
    """Return every set of objects that a case applies at once."""
    yield case["policies"]
    for step in case.get("steps") or ():
        for action in step.get("actions") or ():
            yield from ([v] for k, v in action.items() if k in ("createPolicy", "updatePolicy"))


@pytest.mark.parametrize("name", kubernetes_files())
def test_kubernetes_policies(name):
    case = load_yaml(KUBERNETES / name)
    for policies in policies_of(case):
        text = yaml.dump_all(policies, Dumper=yaml.CSafeDumper)
        result = read(text, name, settings=EVERY_CAPABILITY)
        if "endPort: 65537" in text:
            assert "not 65537" in "\n".join(map(str, result.errors)), ENDS_AT_65537
            continue
        assert [str(p) for p in result.errors] == []
        assert len(result.objects) == len(policies)
