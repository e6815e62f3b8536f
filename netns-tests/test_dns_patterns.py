"""DNS as it is used: resolvers that are endpoints or the node, patterns, answers in fragments."""

import json
import socket
import sys
import time
from datetime import datetime

import dns.flags
import dns.message
import pytest
import questions
from dns.edns import EDECode
from dns.rcode import NXDOMAIN
from evidence import opens
from questions import addresses, query
from traffic import DEADLINE_S, FAMILIES, V4, eventually

from lab import topology
from lab.laboratory import Machine
from lab.topology import HostPlan, Topology

pytestmark = pytest.mark.needs("tproxy", "tproxy6", "socket", "connmark")

V4S = tuple(f"203.0.113.{n}" for n in range(1, 40))
V6S = tuple(f"2001:db8::{n:x}" for n in range(1, 40))
WEB = 80
FLOOR_S = 7200

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: a}}
  egress:
  - toEndpoints: [{matchLabels: {k8s-app: kube-dns}}]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules:
        dns:
        - {matchName: One.Example.}
        - {matchPattern: "*.two.example"}
        - {matchPattern: "**.three.example"}
        - {matchPattern: "*four.example"}
        - {matchPattern: "f*e.example"}
  - toFQDNs:
    - {matchName: one.example}
    - {matchPattern: "*.two.example"}
    - {matchPattern: "**.three.example"}
    - {matchPattern: "*four.example"}
    - {matchPattern: "f*e.example"}
    toPorts: [{ports: [{port: "80", protocol: TCP}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: resolver, namespace: default}
spec:
  endpointSelector: {matchLabels: {k8s-app: kube-dns}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: a}}]
    toPorts: [{ports: [{port: "53", protocol: ANY}]}]
"""
NODE = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: node, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: a}}
  egress:
  - toEntities: [host]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules: {dns: [{matchPattern: "*.node.example"}]}
  - toFQDNs: [{matchPattern: "*.node.example"}]
"""
HOST = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: host}
spec:
  nodeSelector: {}
  egress:
  - toEndpoints: [{matchLabels: {k8s-app: kube-dns}}]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules: {dns: [{matchPattern: "*.host.example"}]}
  - toFQDNs: [{matchPattern: "*.host.example"}]
"""
ALLOWED = (
    "one.example", "twO.twO.eXample", "x.two.example", "x.three.example", "y.x.three.example",
    "four.example", "xfour.example", "five.example", "fe.example", "f-_9e.example",
)  # fmt: skip
FORBIDDEN = (
    "x.one.example", "two.example", "y.x.two.example", "three.example", "x.four.example",
    "f.e.example", "one.example.org", r"x\.y.two.example", r"one\000.example", ".",
    r"f\195\164e.example",
)  # fmt: skip


class World:
    """A client, its cluster's resolver, and web servers outside."""

    def __init__(self, make_lab, start_bartizan) -> None:
        plan = Topology(
            hosts=(
                HostPlan(name="a", labels={"app": "a"}),
                HostPlan(name="dns", labels={"k8s-app": "kube-dns"}),
                HostPlan(name="world", managed=False, addresses=(*V4S, *V6S)),
            )
        )
        self.lab = make_lab(topology.assigned(plan))
        self.a, self.dns, self.world = (self.lab.host(name) for name in ("a", "dns", "world"))
        self.zone = self.lab.folder / "zone"
        self.records = []
        self.add("ns.example A 192.0.2.1")
        questions.serve(self.dns, self.zone, self.dns.address4, self.dns.address6)
        self.world.start([sys.executable, "-m", "http.server", str(WEB), "--bind", "::"])
        eventually(lambda: "serving" in self.dns.log(), "the resolver serves")
        names = {
            "proxy_response_max_delay_s": 10,
            "reject_response_code": "nameError",
            "min_ttl_s": FLOOR_S,
        }
        config = {"workers": 2, "host_firewall": "on", "fqdn": names}
        self.firewall = start_bartizan(self.lab, config)
        self.firewall.apply(POLICY)

    def add(self, *records: str) -> None:
        """Serve these, too."""
        self.records += records
        self.zone.write_text("\n".join(self.records) + "\n")

    def serve_on_node(self) -> None:
        node = self.lab.node
        if "serving" not in node.log():
            questions.serve(node, self.zone, node.address4, node.address6)
            eventually(lambda: "serving" in node.log(), "the node's resolver serves")

    def opens(self, address: str, machine: Machine | None = None) -> bool:
        """Whether a, or another machine, may reach the web server there."""
        return opens(self.firewall, machine or self.a, address, WEB)


@pytest.fixture(scope="module")
def world(module_lab, module_bartizan):
    return World(module_lab, module_bartizan)


def ask(protocol: str, machine: Machine, server: str, name: str) -> dns.message.Message:
    if protocol == "udp":
        return questions.udp(machine, server, query(name))
    return questions.tcp(machine, server, query(name))[0]


def test_names_are_allowed_by_patterns_as_in_cilium(world):
    """What the resolver is asked for is what the rules mean, and each answer opens its address."""
    world.add(*(f"{name} A {V4S[number]}" for number, name in enumerate(ALLOWED)))
    for name in ALLOWED:
        answer = questions.udp(world.a, world.dns.address4, query(name))
        assert str(answer.question[0].name) == f"{name}."  # case kept
        (address,) = addresses(answer) - {V4S[0]} or {V4S[0]}
        assert world.opens(address), name
    asked = world.dns.log()
    for name in ALLOWED:
        assert f" {name}. A" in asked
    for name in FORBIDDEN:
        refused = questions.udp(world.a, world.dns.address4, query(name, use_edns=0))
        assert (refused.rcode(), refused.options[0].code) == (NXDOMAIN, EDECode.BLOCKED), name
        (answer,) = questions.tcp(world.a, world.dns.address4, query(name))
        assert (answer.rcode(), answer.edns) == (NXDOMAIN, -1)
    assert len(world.dns.log().splitlines()) == len(asked.splitlines())
    counted = [
        (row["protocol"], row["received"], row["forwarded"], row["denied"])
        for row in world.firewall.get("/v1/proxy")["redirects"]
        if row["parser"] == "dns" and row["protocol"] != "SCTP"
    ]
    allowed, forbidden = len(ALLOWED), len(FORBIDDEN)
    assert sorted(counted) == [
        ("TCP", forbidden, 0, forbidden),
        ("UDP", allowed + forbidden, allowed, forbidden),
    ]
    records = world.firewall.flows(protocol="dns")
    assert {record["traffic_direction"] for record in records} == {"EGRESS"}
    status = world.firewall.cli("status").stdout
    assert f"{allowed + 2 * forbidden} requests received, {2 * forbidden} refused" in status


@pytest.mark.parametrize("family", FAMILIES, ids=["ipv4", "ipv6"])
def test_an_answer_longer_than_a_packet_comes_whole(world, family):
    """EDNS: 4,000 bytes in fragments, from the resolver to the proxy and on to the client."""
    count = 220 if family == V4 else 130
    world.add(
        *(
            f"many.two.example {'A' if family == V4 else 'AAAA'} "
            + (f"198.51.100.{n}" if family == V4 else f"2001:db8:1::{n:x}")
            for n in range(count)
        )
    )
    kind = "A" if family == V4 else "AAAA"
    asked = query("many.two.example", kind, use_edns=0, payload=4096)
    answer = questions.udp(world.a, world.dns.address(family), asked)
    assert not answer.flags & dns.flags.TC
    assert len(addresses(answer)) == count


def test_a_question_cut_into_bytes_is_a_question(world):
    wire = query("one.example").to_wire()
    with world.a.connect(world.dns.address4, 53) as sock:
        sock.settimeout(DEADLINE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in len(wire).to_bytes(2, "big") + wire:
            sock.send(bytes([byte]))
        stream = sock.makefile("rb")
        answer = stream.read(int.from_bytes(stream.read(2), "big"))
    assert addresses(dns.message.from_wire(answer)) == {V4S[0]}


@pytest.mark.parametrize("family", FAMILIES, ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_a_resolver_on_the_node_is_asked_through_the_proxy_as_well(world, family, protocol):
    name = f"{protocol}-{family:d}.node.example"
    at = V4S[30 + 2 * FAMILIES.index(family) + (protocol == "tcp")]
    world.add(f"{name} A {at}")
    world.serve_on_node()
    world.firewall.apply(NODE)
    server = world.lab.node.address(family)
    assert not world.opens(at)
    assert addresses(ask(protocol, world.a, server, name)) == {at}
    assert world.opens(at)
    assert ask(protocol, world.a, server, f"{protocol}.other.example").rcode() == NXDOMAIN
    assert "other.example" not in world.lab.node.log()


def test_an_answer_counts_for_the_least_life_that_is_set(world):
    """Its TTL is 30 s, and the client is told so."""
    begun = time.time()
    asked = query("one.example")
    (told,) = questions.udp(world.a, world.dns.address4, asked).answer
    listed = world.firewall.cli("fqdn", "cache", "list", "-p", "one.example", "-o", "json").stdout
    (row,) = json.loads(listed)
    ends = datetime.fromisoformat(row["expiration_time"]).timestamp()
    assert (told.ttl, row["ttl"]) == (30, 30)
    assert begun + FLOOR_S - 1 <= ends <= time.time() + FLOOR_S


@pytest.mark.parametrize("family", FAMILIES, ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_the_nodes_own_questions_are_under_host_policy(world, family, protocol):
    name = f"{protocol}-{family:d}.host.example"
    at = V4S[34 + 2 * FAMILIES.index(family) + (protocol == "tcp")]
    world.add(f"{name} A {at}")
    world.firewall.apply(HOST)
    node, server = world.lab.node, world.dns.address(family)
    assert not world.opens(at, node)
    assert addresses(ask(protocol, node, server, name)) == {at}
    assert world.opens(at, node)
    assert ask(protocol, node, server, f"{protocol}.else.example").rcode() == NXDOMAIN
    assert "else.example" not in world.dns.log()
    world.firewall.withdraw("CiliumClusterwideNetworkPolicy", "host")
