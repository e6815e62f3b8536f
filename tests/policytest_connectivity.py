"""Cilium's connectivity tests as policy tests: the table of ../shared/corpus/cilium/connectivity.

The policies are upstream's files, templates filled in, or, where the corpus has no file of that
name, written here from the table's words (`WRITTEN`). What a test of the table needs and this lab
has not (an outside network, other nodes, an Ingress, mutual authentication) is in `LEFT_OUT`.
"""

import re
from pathlib import Path

import yaml

CORPUS = Path(__file__).resolve().parents[1] / "../shared/corpus/cilium/connectivity"

NS = "cilium-test"
OUTSIDE, OTHER = "203.0.113.10", "203.0.113.11"
VALUES = {
    "ClusterNameLocal": "default",
    "ExternalCIDRv4": "203.0.113.0/24",
    "ExternalCIDRv6": "2001:db8::/64",
    "ExternalIPv4 | ipToCIDR": f"{OUTSIDE}/32",
    "ExternalIPv6 | ipToCIDR": "2001:db8::10/128",
    "ExternalOtherIPv4": OTHER,
    "ExternalOtherIPv6": "2001:db8::11",
    "ExternalIPv4": OUTSIDE,
    "ExternalIPv6": "2001:db8::10",
    "ExternalTarget": "one.one.one.one.",
}
_RANGE = re.compile(r"\{\{ range \$i := .NodesWithoutCiliumIPs \}\}(.*?)\{\{ end \}\}", re.DOTALL)


def pod(name, ip, *, namespace=NS, ports=(), **labels):
    return {"namespace": namespace, "name": name, "labels": labels, "ips": ip, "ports": list(ports)}


def ips(number):
    return [f"10.244.7.{number}", f"fd00:7::{number}"]


_WEB = [{"name": "http-8080", "port": 8080, "protocol": "TCP"}]
PODS = [
    pod("client", ips(1), kind="client"),
    pod("client2", ips(2), kind="client", other="client"),
    pod("echo-same-node", ips(3), kind="echo", other="echo", ports=_WEB),
    pod("echo-other-node", ips(4), kind="echo", first="echo", ports=_WEB),
    pod("in1", ips(5), namespace="cilium-test-ccnp1", kind="ccnp"),
    pod("in2", ips(6), namespace="cilium-test-ccnp2", kind="ccnp"),
    pod("backend", ips(7), lrp="backend"),
]
for one in PODS:
    one["labels"]["name"] = one["name"]  # as every pod of Cilium's test has
PODS[2]["labels"]["io.cilium.k8s.policy.serviceaccount"] = "echo-same-node"

HOSTS = [
    {"name": "outside", "ips": [OUTSIDE, "2001:db8::10"]},
    {"name": "other", "ips": [OTHER, "2001:db8::11"]},
    {"name": "remote-echo", "ip": "10.99.0.4"},  # a pod of another cluster: nobody's here
    {"name": "frontend", "ip": "169.254.169.255"},
]

RESOLVER = pod("coredns", ips(8), namespace="kube-system", **{"k8s-app": "kube-dns"})
NAMED = {"one.one.one.one": "outside", "k8s.io": "other"}
"""Name -> host, for the tests that need DNS."""

DEFAULT_DENY = "POLICY_DENIED"
POLICY_DENY = "POLICY_DENY"


def check(source, destination, verdict="allow", direction="", **more):
    found = {"from": title(source), "to": title(destination), **more}
    if not {"icmp", "port"} & found.keys():
        found["port"] = "8080/TCP"
    found["verdict"] = "allow" if verdict == "allow" else "deny"
    if verdict != "allow":
        found["reason"] = verdict
    if direction:
        found["direction"] = direction
    return found


def title(name):
    namespaces = {
        "in1": "cilium-test-ccnp1", "in2": "cilium-test-ccnp2", "coredns": "kube-system",
    }  # fmt: skip
    if any(one["name"] == name for one in HOSTS):
        return f"host:{name}"
    return name if name == "node" else f"{namespaces.get(name, NS)}/{name}"


def ping(source, destination, verdict="allow", direction=""):
    return check(source, destination, verdict, direction, icmp="EchoRequest")


def get(source, destination, path, verdict="allow", direction="", **headers):
    request = {"path": path, "headers": headers} if headers else {"path": path}
    return check(source, destination, verdict, direction, http=request, port="8080/TCP")


def everyone(verdict, direction):
    clients, echoes = ("client", "client2"), ("echo-same-node", "echo-other-node")
    return [check(c, e, verdict, direction) for c in clients for e in echoes]


def cilium(name, **spec):
    document = {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy"}
    return document | {"metadata": {"name": name}, "spec": spec}


def kubernetes(name, kind, peers):
    spec = {"podSelector": {"matchLabels": {"kind": kind}}, "policyTypes": ["Ingress"]}
    spec["ingress"] = [{"from": [{"podSelector": {"matchLabels": peers}}]}]
    document = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    return document | {"metadata": {"name": name}, "spec": spec}


def labels(**pairs):
    return {"matchLabels": pairs}


_TO_8080 = {"ports": [{"port": "8080", "protocol": "TCP"}]}
_SECRET = {"method": "GET", "path": "/private$", "headers": ["X-Very-Secret-Token: 42"]}
_PUBLIC = [{"method": "GET", "path": "/$"}, {"method": "GET", "path": "/public$"}, _SECRET]
_ALL = [{"fromEndpoints": [{}]}, {"fromEntities": ["world", "host"]}]

WRITTEN = {
    "allow-all-egress": cilium(
        "allow-all-egress",
        endpointSelector={},
        egress=[{"toEndpoints": [{}]}, {"toEntities": ["world", "host"]}],
    ),
    "allow-all-ingress": cilium("allow-all-ingress", endpointSelector={}, ingress=_ALL),
    "echo-ingress-knp": kubernetes("echo-ingress", "echo", {"other": "client"}),
    "client-ingress-knp": kubernetes("client-ingress", "client", {"other": "client"}),
    "service-account": cilium(
        "service-account",
        endpointSelector=labels(kind="client"),
        egress=[
            {
                "toEndpoints": [
                    labels(**{"io.cilium.k8s.policy.serviceaccount": "echo-same-node"})
                ],
                "toPorts": [_TO_8080],
            }
        ],
    ),
    "expression-deny": cilium(
        "expression-deny",
        endpointSelector=labels(name="client"),
        egressDeny=[
            {
                "toEndpoints": [
                    {"matchExpressions": [{"key": "kind", "operator": "In", "values": ["echo"]}]}
                ],
                "toPorts": [_TO_8080],
            }
        ],
    ),
    "to-cidr-external": cilium(
        "to-cidr-external",
        endpointSelector=labels(kind="client"),
        egress=[{"toCIDRSet": [{"cidr": "203.0.113.0/24", "except": [f"{OTHER}/32"]}]}],
    ),
    "echo-ingress-l7-http": cilium(
        "echo-ingress-l7-http",
        endpointSelector=labels(kind="echo"),
        ingress=[
            {
                "fromEndpoints": [labels(other="client")],
                "toPorts": [_TO_8080 | {"rules": {"http": _PUBLIC}}],
            }
        ],
    ),
    "echo-ingress-l7-http-named-port": cilium(
        "echo-ingress-l7-http-named-port",
        endpointSelector=labels(kind="echo"),
        ingress=[
            {
                "fromEndpoints": [labels(other="client")],
                "toPorts": [
                    {
                        "ports": [{"port": "http-8080", "protocol": "TCP"}],
                        "rules": {"http": _PUBLIC},
                    }
                ],
            }
        ],
    ),
    "client-egress-l7-http": cilium(
        "client-egress-l7-http",
        endpointSelector=labels(other="client"),
        egress=[
            {
                "toEndpoints": [labels(kind="echo")],
                "toPorts": [_TO_8080 | {"rules": {"http": [{"method": "GET", "path": "/$"}]}}],
            }
        ],
    ),
}

_L7 = [
    get("client2", "echo-same-node", "/"),
    get("client2", "echo-same-node", "/public"),
    get("client2", "echo-same-node", "/private", DEFAULT_DENY, "ingress"),
    get("client2", "echo-same-node", "/private", **{"X-Very-Secret-Token": "42"}),
    get("client", "echo-same-node", "/public", DEFAULT_DENY, "ingress"),
]
_ONLY_CLIENT2 = [
    check("client2", "echo-same-node"),
    check("client2", "echo-other-node"),
    check("client", "echo-same-node", DEFAULT_DENY, "ingress"),
    check("client", "echo-other-node", DEFAULT_DENY, "ingress"),
]
_PING_CLIENT2 = [
    ping("client2", "client"),
    ping("client", "client2", DEFAULT_DENY, "ingress"),
]

TESTS = {
    "no-policies": (
        [],
        [
            *everyone("allow", ""),
            ping("client", "client2"),
            check("client", "outside", port="443/TCP"),
            check("outside", "echo-same-node"),
            ping("client", "node"),
        ],
    ),
    "all-ingress-deny": (
        ["deny-all-ingress"],
        [*everyone(DEFAULT_DENY, "ingress"), check("client", "outside", port="443/TCP")],
    ),
    "all-ingress-deny-from-outside": (
        ["deny-all-ingress"],
        [check("outside", "echo-same-node", DEFAULT_DENY, "ingress")],
    ),
    "all-entities-deny": (
        ["deny-all-entities"],
        [
            *everyone(POLICY_DENY, "egress"),
            check("client", "outside", POLICY_DENY, "egress", port="443/TCP"),
        ],
    ),
    "cluster-entity-multi-cluster": (
        ["allow-cluster-entity"],
        [*everyone("allow", ""), check("client", "remote-echo", DEFAULT_DENY, "egress")],
    ),
    "echo-ingress": (["echo-ingress-from-other-client"], _ONLY_CLIENT2),
    "echo-ingress-knp": (["echo-ingress-knp"], _ONLY_CLIENT2),
    "client-ingress": (["client-ingress-from-client2"], _PING_CLIENT2),
    "client-ingress-knp": (["client-ingress-knp"], _PING_CLIENT2),
    "client-ingress-from-other-client-icmp-deny": (
        ["allow-all-egress", "allow-all-ingress", "echo-ingress-icmp-deny"],
        [ping("client2", "client", POLICY_DENY, "ingress"), check("client2", "echo-same-node")],
    ),
    "client-egress-to-echo-service-account": (
        ["service-account"],
        [
            check("client", "echo-same-node"),
            check("client", "echo-other-node", DEFAULT_DENY, "egress"),
        ],
    ),
    "client-egress-to-echo-expression-deny": (
        ["allow-all-egress", "allow-all-ingress", "expression-deny"],
        [
            check("client", "echo-same-node", POLICY_DENY, "egress"),
            check("client2", "echo-same-node"),
        ],
    ),
    "client-ingress-to-echo-named-port-deny": (
        ["allow-all-egress", "allow-all-ingress", "client-egress-to-echo-named-port-deny"],
        [
            check("client", "echo-same-node", POLICY_DENY, "ingress"),
            check("client2", "echo-same-node"),
        ],
    ),
    "to-cidr-external": (
        ["to-cidr-external"],
        [
            {**check("client", "outside", port="443/TCP"), "to": OUTSIDE},
            {**check("client", "other", DEFAULT_DENY, "egress", port="443/TCP"), "to": OTHER},
        ],
    ),
    "client-egress-to-cidr-deny-default": (
        ["client-egress-to-cidr-external-deny"],
        [
            check("client", "other", POLICY_DENY, "egress", port="443/TCP"),
            check("client", "outside", DEFAULT_DENY, "egress", port="443/TCP"),
        ],
    ),
    "from-cidr-host-netns": (
        ["echo-ingress-from-cidr"],
        [
            {**check("outside", "echo-same-node"), "from": OUTSIDE},
            {**check("remote-echo", "echo-same-node", DEFAULT_DENY, "ingress")},
        ],
    ),
    "echo-ingress-l7": (["echo-ingress-l7-http"], _L7),
    "echo-ingress-l7-named-port": (["echo-ingress-l7-http-named-port"], _L7),
    "client-egress-l7": (
        ["client-egress-l7-http"],
        [
            get("client2", "echo-same-node", "/"),
            get("client2", "echo-other-node", "/private", DEFAULT_DENY, "egress"),
        ],
    ),
    "ingress-from-specific-namespace-ccnp": (
        ["allow-ingress-specific-ns-ccnp"],
        [check("in2", "in1"), check("client", "in1", DEFAULT_DENY, "ingress")],
    ),
    "egress-to-specific-namespace-ccnp": (
        ["allow-egress-specific-ns-ccnp"],
        [check("in1", "in2"), check("in1", "echo-same-node", DEFAULT_DENY, "egress")],
    ),
    "policy-local-cluster-egress": (
        ["client-egress-to-echo-no-cluster-policy", "client-egress-only-port-53"],
        [*everyone("allow", ""), check("client", "remote-echo", DEFAULT_DENY, "egress")],
    ),
    "dns-only": (
        ["client-egress-only-dns"],
        [
            check("client", "coredns", port="53/UDP"),
            check("client", "outside", DEFAULT_DENY, "egress", port="80/TCP"),
            check("client", "echo-same-node", DEFAULT_DENY, "egress"),
        ],
    ),
    "to-fqdns-with-proxy": (
        ["client-egress-only-dns", "client-egress-to-fqdns-and-http-get"],
        [
            check("client", "outside", http={"path": "/"}, port="80/TCP"),
            check("client2", "outside", DEFAULT_DENY, "egress", http={"path": "/x"}, port="80/TCP"),
            check("client", "other", DEFAULT_DENY, "egress", port="80/TCP"),
        ],
    ),
    "local-redirect-policy": (
        ["client-egress-to-cidr-lrp-frontend-deny"],
        [check("backend", "frontend", POLICY_DENY, "egress", port="80/TCP")],
    ),
}
"""Test of Cilium -> (policies, checks), for those that need nothing outside of the lab."""

LEFT_OUT = {
    "client-egress-l7-set-header": "header REPLACE with a secret",
    "client-egress-l7-tls-deny-without-headers": "TLS interception",
    "client-egress-tls-sni": "TLS server names",
    "echo-ingress-auth-always-fail": "mutual authentication",
    "host-firewall-egress": "policies for the node",
    "pod-to-controlplane-host-cidr": "other nodes",
    "pod-to-ingress-service-deny-all": "an Ingress",
    "no-interrupted-connections": "a restart, which netns-tests of the datapath make",
}


def policies(name):
    """The documents of a policy file of the corpus, templates filled in."""
    if name in WRITTEN:
        return [WRITTEN[name]]
    text = (CORPUS / f"{name}.yaml").read_text()
    text = _RANGE.sub(f"    - {OUTSIDE}/32\n", text)
    text = text.replace('{{trimSuffix .ExternalTarget "."}}', "one.one.one.one")
    for key, value in VALUES.items():
        text = text.replace(f"{{{{.{key} }}}}", value).replace(f"{{{{.{key}}}}}", value)
    assert "{{" not in text, f"{name}: an unfilled template"
    return list(yaml.safe_load_all(text))


def as_policytest(name):
    """The mapping of the PolicyTest for one test of Cilium."""
    files, checks = TESTS[name]
    documents = [document for file in files for document in policies(file)]
    for document in documents:
        if document["kind"] != "CiliumClusterwideNetworkPolicy":
            document.setdefault("metadata", {}).setdefault("namespace", NS)
    dns = any(check["to"].startswith("kube-system") or "fqdns" in name for check in checks)
    asked = {
        "endpoints": [*PODS, RESOLVER],
        "hosts": [
            {**host, "names": [n for n, owner in NAMED.items() if owner == host["name"]]}
            for host in HOSTS
        ],
        "resolver": title("coredns"),
    }
    return {
        "apiVersion": "bartizan.dev/v1",
        "kind": "PolicyTest",
        "node": {"ips": ["10.0.0.1", "fd00::1"]},
        **(asked if dns else {"endpoints": PODS, "hosts": HOSTS}),
        "policies": documents,
        "expect": checks,
    }
