"""Events and names for the flow tests: the cast of Cilium's demo, xwing, tiefighter, deathstar."""

from conntrack.address import parse_address
from firewall.flows.event import DnsEvent, HttpEvent, PacketEvent
from firewall.flows.note import Noter
from firewall.flows.record import EndpointName
from firewall.policy.snapshot import OriginRow
from firewall.policy.verdict import DropReason, PolicyMatch, TrafficDirection, Verdict

AT_NS = 1_795_354_272_129_456_789
"""2026-11-22T13:31:12.129456789Z."""

SYN = 2
SYN_ACK = 18

LABELS = {
    1: ("reserved:host",),
    2: ("reserved:world",),
    22654: ("k8s:class=xwing", "k8s:io.kubernetes.pod.namespace=default", "k8s:org=alliance"),
    31028: ("k8s:class=tiefighter", "k8s:io.kubernetes.pod.namespace=default", "k8s:org=empire"),
    16530: ("k8s:class=deathstar", "k8s:io.kubernetes.pod.namespace=default", "k8s:org=empire"),
}
ENDPOINTS = {
    3184: EndpointName("xwing", "default"),
    99: EndpointName("tiefighter", "default"),
    232: EndpointName("deathstar", "default"),
}

RULE = OriginRow(
    kind="CiliumNetworkPolicy",
    namespace="default",
    name="rule1",
    path="spec.ingress[0]",
    file="sw_l3_l4_policy.yaml",
    line=12,
    column=5,
    labels=("k8s:io.cilium.k8s.policy.name=rule1",),
)


class Cast:
    node_name = "lab0"

    def labels(self, identity):
        return LABELS.get(identity, ())

    def endpoint(self, number, address):
        return ENDPOINTS.get(number or address)

    def dns_names(self, address):
        return ("one.one.one.one",) if address == parse_address("1.1.1.1") else ()


def packet(**changed):
    """A SYN from xwing to deathstar that no rule allows."""
    fields = {
        "time_ns": AT_NS,
        "verdict": Verdict.DROP,
        "drop_reason": DropReason.POLICY_DENIED,
        "direction": TrafficDirection.INGRESS,
        "source": parse_address("10.0.0.30"),
        "destination": parse_address("10.0.0.147"),
        "protocol": 6,
        "source_port": 54842,
        "destination_port": 80,
        "tcp_flags": SYN,
        "icmp_type": -1,
        "icmp_code": -1,
        "length": 60,
        "source_identity": 22654,
        "destination_identity": 16530,
        "source_endpoint": 3184,
        "destination_endpoint": 232,
        "match": PolicyMatch.NONE,
        "audited": False,
        "reply": False,
        "ct_state": "new",
        "interface_index": 0,
        "proxy_port": 0,
        "policy_revision": 7,
    }
    return PacketEvent(**(fields | changed))


def allowed(**changed):
    """A SYN from tiefighter to deathstar that rule1 allows."""
    fields = {
        "verdict": Verdict.ACCEPT,
        "drop_reason": 0,
        "source": parse_address("10.0.0.99"),
        "source_identity": 31028,
        "source_endpoint": 99,
        "match": PolicyMatch.L3_L4,
        "ingress_allowed_by": (RULE,),
    }
    return packet(**(fields | changed))


def request(**changed):
    """The PUT that the L7 policy refuses."""
    fields = {
        "time_ns": AT_NS,
        "kind": "request",
        "verdict": Verdict.DROP,
        "drop_reason": DropReason.POLICY_DENIED,
        "direction": TrafficDirection.INGRESS,
        "source": parse_address("10.0.0.99"),
        "destination": parse_address("10.0.0.147"),
        "source_port": 33656,
        "destination_port": 80,
        "source_identity": 31028,
        "destination_identity": 16530,
        "source_endpoint": 99,
        "destination_endpoint": 232,
        "method": "PUT",
        "url": "http://deathstar.default.svc.cluster.local/v1/exhaust-port",
        "protocol": "HTTP/1.1",
        "code": 0,
        "latency_ns": 0,
        "request_id": "",
        "policy_revision": 7,
    }
    return HttpEvent(**(fields | changed))


def response(**changed):
    """The answer to an allowed POST."""
    fields = {
        "kind": "response",
        "verdict": Verdict.ACCEPT,
        "drop_reason": 0,
        "method": "POST",
        "url": "http://deathstar/v1/request-landing",
        "code": 200,
        "latency_ns": 1_700_000,
        "allowed_by": (RULE,),
    }
    return request(**(fields | changed))


def question(**changed):
    """A question of an endpoint to a server outside, and with kind="response" its answer."""
    fields = {
        "time_ns": AT_NS,
        "kind": "request",
        "verdict": Verdict.ACCEPT,
        "drop_reason": 0,
        "direction": TrafficDirection.EGRESS,
        "source": parse_address("10.0.0.99"),
        "destination": parse_address("203.0.113.53"),
        "source_port": 33656,
        "destination_port": 53,
        "source_identity": 31028,
        "destination_identity": 2,
        "source_endpoint": 99,
        "destination_endpoint": 0,
        "transport": 17,
        "query": "api.example.",
        "query_types": ("A",),
        "rcode": 0,
        "addresses": (),
        "ttl_s": 0,
        "cnames": (),
        "answer_types": (),
        "latency_ns": 0,
        "policy_revision": 7,
        "allowed_by": (RULE,),
    }
    return DnsEvent(**(fields | changed))


def flow(event=None):
    return note(event).flow


def note(event=None):
    return Noter(Cast()).note(event or packet())
