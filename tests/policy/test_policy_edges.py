"""Corners of the policy language, each from the text of a policy to the verdict.

The numbers in brackets are those of ../shared/research/cilium.md. A flow is `FROM TO PORT`; what
follows the arrow is `.` allowed, `X` denied, `R` through the proxy.
"""

import pytest
from policy.stage import Stage

from firewall.policy.readers import CAPABILITIES, ReaderSettings, read
from firewall.policy.snapshot import Settings
from firewall.policy.verdict import Verdict

SETTINGS = ReaderSettings(enforceable=frozenset(CAPABILITIES))
SIGNS = {Verdict.ACCEPT: ".", Verdict.DROP: "X", Verdict.REDIRECT: "R"}
CLUSTER = "k8s:io.cilium.k8s.policy.cluster=default"
ENDPOINTS = {
    "a": ("x", ["k8s:app=a", "container:app=z"], ()),
    "b": ("x", ["k8s:app=b"], [("http", 6, 80), ("dns", 17, 53)]),
    "c": ("y", ["k8s:app=b", "k8s:io.cilium.k8s.namespace.labels.team=red"], [("http", 6, 8080)]),
}

SERVICE = """
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}, labels: {{tier: one}}}}
spec: {{{spec}}}
"""
SLICE = """
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: ext-1, namespace: x, labels: {kubernetes.io/service-name: ext}}
addressType: IPv4
endpoints: [{addresses: [198.51.100.7, 10.0.0.2]}]
"""
GROUP = """
apiVersion: cilium.io/v2
kind: CiliumCIDRGroup
metadata: {name: g, labels: {tier: one}}
spec: {externalCIDRs: [198.51.100.0/24, 203.0.113.0/24]}
"""
WEB = SERVICE.format(name="web", namespace="x", spec="selector: {app: b}")
FAR = SERVICE.format(name="web", namespace="y", spec="selector: {app: b}")
EXT = SERVICE.format(name="ext", namespace="x", spec="")


def cnp(spec, namespace="x"):
    return (
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\n"
        f"metadata: {{name: p, namespace: {namespace}}}\n"
        f"spec: {{endpointSelector: {{matchLabels: {{app: a}}}}, {spec}}}\n"
    )


def knp(spec):
    return (
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: k, namespace: x}\n"
        f"spec: {{podSelector: {{matchLabels: {{app: a}}}}, {spec}}}\n"
    )


def to(entry, *objects):
    return [cnp(f"egress: [{{{entry}}}]"), *objects]


def ports(text):
    return f"toPorts: [{{ports: [{text}]}}]"


CASES = {
    # toServices (a.6)
    "a service with a selector means its pods, not its ports": (
        to("toServices: [{k8sService: {serviceName: web, namespace: x}}]", WEB, FAR),
        "a b 80 . | a b 81 . | a c 80 X",
    ),
    "a service without namespace is one of any": (
        to("toServices: [{k8sService: {serviceName: web}}]", WEB, FAR),
        "a b 80 . | a c 80 .",
    ),
    "a service without selector means its addresses outside": (
        to(
            "toServices: [{k8sService: {serviceName: ext}}], " + ports("{port: '80'}"),
            EXT,
            SLICE,
        ),
        "a 198.51.100.7 80 . | a 198.51.100.7 81 X | a 198.51.100.8 80 X | a b 80 X",
    ),
    "services by their own labels": (
        to("toServices: [{k8sServiceSelector: {selector: {matchLabels: {tier: one}}}}]", WEB),
        "a b 80 . | a c 80 X",
    ),
    "a service that is not there is nobody": (
        to("toServices: [{k8sService: {serviceName: web}}]"),
        "a b 80 X",
    ),
    "a denied service": (
        [
            cnp(
                "egress: [{toEntities: [all]}], "
                "egressDeny: [{toServices: [{k8sService: {serviceName: web, namespace: x}}]}]"
            ),
            WEB,
        ],
        "a b 80 X | a c 80 .",
    ),
    # CIDR groups (a.6)
    "a group with exceptions": (
        to("toCIDRSet: [{cidrGroupRef: g, except: [198.51.100.0/28]}]", GROUP),
        "a 198.51.100.200 1 . | a 198.51.100.3 1 X | a 203.0.113.9 1 . | a 192.0.2.9 1 X",
    ),
    "groups by labels": (
        to("toCIDRSet: [{cidrGroupSelector: {matchLabels: {tier: one}}}]", GROUP),
        "a 198.51.100.3 1 . | a 192.0.2.9 1 X",
    ),
    "groups by labels that it has not": (
        to(
            "toCIDRSet: [{cidrGroupSelector: {matchExpressions: "
            "[{key: tier, operator: NotIn, values: [one]}]}}]",
            GROUP,
        ),
        "a 198.51.100.3 1 X",
    ),
    "a group that is not there": (to("toCIDRSet: [{cidrGroupRef: g}]"), "a 198.51.100.3 1 X"),
    # CIDRs, entities, nodes (a.6)
    "0.0.0.0/0 is the world, no endpoint and no node": (
        to("toCIDR: [0.0.0.0/0]"),
        "a 192.0.2.9 1 . | a node 1 X | a api 1 X | a host 1 X | a b 1 X",
    ),
    "a prefix that names a node's address": (to("toCIDR: [192.0.2.50/32]"), "a node 1 X"),
    "host bits are masked": (to("toCIDR: [198.51.100.77/24]"), "a 198.51.100.1 1 ."),
    "an API server is a node too": (
        to("toEntities: [remote-node]"),
        "a node 1 . | a api 1 . | a host 1 X",
    ),
    "not every node is an API server": (
        to("toEntities: [kube-apiserver]"),
        "a node 1 X | a api 1 .",
    ),
    "the cluster": (
        to("toEntities: [cluster]"),
        "a b 1 . | a c 1 . | a node 1 . | a host 1 . | a 192.0.2.9 1 X",
    ),
    "nodes by label, never the host": (
        to("toNodes: [{matchLabels: {zone: b}}]"),
        "a node 1 . | a api 1 X | a host 1 X",
    ),
    # selectors (a.9)
    "a key without source is of any source": (
        [
            cnp("egress: [{}]"),
            cnp("egress: [{toEntities: [all]}]")
            .replace("app: a", "app: z")
            .replace("name: p", "name: q"),
        ],
        "a b 1 .",
    ),
    "a key with a source is of that one": (
        [
            cnp("egress: [{}]"),
            cnp("egress: [{toEntities: [all]}]")
            .replace("app: a", "'k8s:app': z")
            .replace("name: p", "name: q"),
        ],
        "a b 1 X",
    ),
    "NotIn and DoesNotExist stay in the namespace": (
        to("toEndpoints: [{matchExpressions: [{key: app, operator: NotIn, values: [a]}]}]"),
        "a b 1 . | a c 1 X | a 192.0.2.9 1 X | a host 1 X",
    ),
    "a namespace's label leads out of the own one": (
        to("toEndpoints: [{matchLabels: {'k8s:io.cilium.k8s.namespace.labels.team': red}}]"),
        "a c 1 . | a b 1 X",
    ),
    "a namespace by expression": (
        to(
            "toEndpoints: [{matchExpressions: "
            "[{key: 'k8s:io.kubernetes.pod.namespace', operator: Exists}]}]"
        ),
        "a b 1 . | a c 1 . | a 192.0.2.9 1 X",
    ),
    "another cluster": (
        to("toEndpoints: [{matchLabels: {'io.cilium.k8s.policy.cluster': far}}]"),
        "a b 1 X",
    ),
    "a reserved label is not confined": (
        to("toEndpoints: [{matchLabels: {'reserved:world': ''}}]"),
        "a 192.0.2.9 1 . | a b 1 X",
    ),
    # ports (a.7)
    "a named port of egress is the peer's": (
        to(ports("{port: HTTP, protocol: TCP}")),
        "a b 80 . | a b 8080 X | a c 8080 . | a c 80 X | a 192.0.2.9 80 X",
    ),
    "a range and a hole in it": (
        [
            cnp(
                "egress: [{toPorts: [{ports: [{port: '1', endPort: 1024}]}]}], "
                "egressDeny: [{toPorts: [{ports: [{port: '80', protocol: TCP}]}]}]"
            )
        ],
        "a b 1 . | a b 80 X | a b 80/UDP . | a b 1024 . | a b 1025 X",
    ),
    "port 0 with one protocol": (
        to(ports("{port: '0', protocol: UDP}")),
        "a b 53/UDP . | a b 53 X | a b 8/ICMP X",
    ),
    "no port is no ICMP, no ports at all are": (
        to(ports("{port: '0'}")),
        "a b 8/ICMP X | a b 7/SCTP .",
    ),
    "icmps of one family": (
        to("icmps: [{fields: [{family: IPv6, type: 8}]}]"),
        "a b 8/ICMP X | a b 80 X",
    ),
    "empty icmp fields": (to("icmps: [{fields: []}]"), "a b 8/ICMP X"),
    # layer 7 (a.8)
    "http for everyone, no rules for some": (
        [
            cnp(
                "egress: [{toEndpoints: [{matchLabels: {app: b}}]}, "
                "{toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{}]}}]}]"
            )
        ],
        "a b 80 R | a b 81 . | a 192.0.2.9 80 R | a 192.0.2.9 81 X",
    ),
    "a deny needs no proxy": (
        [
            cnp(
                "egress: [{toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: []}}]}], "
                "egressDeny: [{toCIDR: [192.0.2.0/24]}]"
            )
        ],
        "a b 80 R | a 192.0.2.9 80 X | a 198.51.100.1 80 R",
    ),
    # Kubernetes (b)
    "policyTypes without Egress leaves it open": (
        [knp("policyTypes: [Ingress], egress: []")],
        "a b 80 . | b a 80 X",
    ),
    "egress rules without policyTypes isolate both ways": (
        [knp("egress: [{}]")],
        "a b 80 . | b a 80 X",
    ),
    "a block means nodes and pods": (
        [
            knp(
                "policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0, "
                "except: [10.0.0.3/32]}}]}]"
            )
        ],
        "a b 1 . | a c 1 X | a node 1 . | a 192.0.2.9 1 .",
    ),
    "an empty namespaceSelector is every namespace, no host": (
        [knp("ingress: [{from: [{namespaceSelector: {}}]}]")],
        "b a 1 . | c a 1 . | 192.0.2.9 a 1 X | node a 1 X",
    ),
    "formats add up, and a deny wins over all": (
        [
            knp("ingress: [{}]"),
            cnp("ingressDeny: [{fromEndpoints: [{matchLabels: {app: b}}]}]"),
        ],
        "b a 1 X | c a 1 . | 192.0.2.9 a 1 .",
    ),
}


def staged(texts, **settings):
    stage = Stage(settings=Settings(**settings))
    for at, (name, (namespace, labels, named)) in enumerate(ENDPOINTS.items()):
        texts_of = [*labels, f"k8s:io.kubernetes.pod.namespace={namespace}", CLUSTER]
        address = f"10.0.0.{at + 1}"
        stage.endpoint(name, address, texts_of, ports=named, namespace=namespace)
    stage.endpoint("node", "192.0.2.50", ["reserved:remote-node", "node:zone=b"], managed=False)
    api = ["reserved:kube-apiserver", "reserved:remote-node"]
    stage.endpoint("api", "192.0.2.60", api, managed=False)
    stage.endpoint("host", "192.0.2.1", ["reserved:host"], managed=False)
    result = read("---\n".join(texts), "t.yaml", settings=SETTINGS)
    assert not result.errors, list(map(str, result.errors))
    stage.resolver.set_resources(result.resources)
    stage.apply(*result.objects)
    return stage


@pytest.mark.parametrize(("texts", "flows"), CASES.values(), ids=CASES)
def test_a_corner_means(texts, flows):
    stage = staged(texts)
    view = stage.view
    assert not stage.resolver.errors
    found = []
    for flow in flows.split(" | "):
        source, destination, port, _ = flow.split()
        number, _, protocol = port.partition("/")
        decision = stage.decide(source, destination, protocol or "TCP", int(number), view)
        found.append(f"{source} {destination} {port} {SIGNS[decision.verdict]}")
    assert " | ".join(found) == flows
