"""Containers on a bridge, with the rules that their engine makes: policy holds between ports too.

The rules beside ours are those of Docker and Podman (`container_rules`). Evidence is what arrives
at the ends, and the flow records.
"""

import sys

import pytest
from container_rules import rules
from evidence import flow
from rules import peers, policy, ports
from traffic import (
    FAMILIES,
    V4,
    V6,
    Echo,
    curl,
    eventually,
    exchange,
    is_tcp,
    parsed,
    tcp,
    token,
)

pytestmark = pytest.mark.needs(
    "nfqueue", "nfqueue6", "tproxy", "socket", "connmark", "ipset", "bridge"
)

BRIDGE = "docker0"
NODE = {V4: "172.17.0.1", V6: "fd77::1"}
NETWORK = {V4: "172.17.0.0/16", V6: "fd77::/64"}
OPEN = policy("app=b", ingress=[{**peers("app=a"), **ports("80/TCP", "53/UDP")}], name="to-b")


class Container:
    """A host of the lab that has become a port of the bridge."""

    def __init__(self, made, name: str, number: int) -> None:
        self.host = made.host(name)
        self.addresses = {V4: f"172.17.0.{number}", V6: f"fd77::{number}"}
        made.node.run(["ip", "link", "set", self.host.interface, "master", BRIDGE], check=True)
        for argv in (
            ["ip", "addr", "flush", "dev", "eth0", "scope", "global"],
            ["ip", "addr", "add", f"{self.addresses[V4]}/16", "dev", "eth0"],
            ["ip", "addr", "add", f"{self.addresses[V6]}/64", "dev", "eth0", "nodad"],
            ["ip", "route", "replace", "default", "via", NODE[V4]],
            ["ip", "-6", "route", "replace", "default", "via", NODE[V6]],
        ):
            self.host.run(argv, check=True)


@pytest.fixture(params=["docker"])
def node(request, lab, bartizan):
    """a, b and c on a bridge, endpoints; w outside; the engine's rules were there before ours."""
    made = lab(a="app=a", b="app=b", c="app=c", w="app=w")
    run = made.node.run
    run(["ip", "link", "add", BRIDGE, "type", "bridge"], check=True)
    run(["ip", "addr", "add", f"{NODE[V4]}/16", "dev", BRIDGE], check=True)
    run(["ip", "addr", "add", f"{NODE[V6]}/64", "dev", BRIDGE, "nodad"], check=True)
    run(["ip", "link", "set", BRIDGE, "up"], check=True)
    made.containers = {
        name: Container(made, name, number) for number, name in enumerate("abc", start=2)
    }
    b = made.containers["b"].addresses
    for family, program in ((V4, "iptables-restore"), (V6, "ip6tables-restore")):
        text = rules(request.param, six=family == V6, network=NETWORK[family], b=b[family])
        run([program, "--noflush"], stdin=text, check=True)
    made.firewall = bartizan(made, {"workers": 2}, endpoints=False)
    for container in made.containers.values():
        made.firewall.add(container.host, addresses=list(container.addresses.values()))
    made.firewall.apply(OPEN)
    return made


def between(node, source: str, target: str, family: int):
    return (node.containers[name].addresses[family] for name in (source, target))


def refused(node, source: str, reason: str = "POLICY_DENIED"):
    """The record that something from this address was dropped."""

    def matches(record):
        return record.get("IP", {}).get("source") == source

    return flow(node.firewall, matches, verdict="DROPPED", reason=reason)


@pytest.mark.parametrize("family", FAMILIES)
def test_policy_holds_between_ports_of_a_bridge(node, family):
    """What is switched is decided as what is routed; an address is believed at its own port."""
    a, b, c = (node.containers[name].host for name in "abc")
    with Echo(b, 80, family) as server:
        target = node.containers["b"].addresses[family]
        with a.connect(target, 80) as client:
            accepted = server.accept()
            for _ in range(30):
                assert exchange(client, accepted, token())
    source, target = between(node, "c", "b", family)
    with b.capture() as at_b:
        # The hosts' own stacks send: a raw packet would be addressed to the node's link.
        with c.datagram(0, family=family) as sender:
            unwanted = token()
            sender.sendto(unwanted, (target, 53))
            refused(node, source)
        spoofed, true = between(node, "a", "b", family)
        c.run(["ip", "addr", "add", f"{spoofed}/{16 if family == V4 else 64}", "dev", "eth0",
               *(["nodad"] if family == V6 else [])], check=True)  # fmt: skip
        with c.datagram(0, family=family, address=spoofed) as sender:
            sender.sendto(unwanted, (true, 53))
            refused(node, spoofed, "INVALID_SOURCE_IP")
        assert not [data for data in at_b.so_far() if unwanted in data]


@pytest.mark.parametrize("node", ["docker", "podman"], indirect=True)
def test_a_published_port_and_masquerading_are_judged_by_the_real_ends(node):
    """w reaches b by the node's address if b's rules say world; a reaches w by the node's."""
    a, b, w = node.containers["a"].host, node.containers["b"].host, node.host("w")
    egress = [{"toEntities": ["world"], **ports("80/TCP")}]
    node.firewall.apply(policy("app=a", egress=egress, name="from-a"))
    for family in FAMILIES:
        w.send(bytes(tcp(w, node.node.address(family), 8080, family=family)))
        refused(node, w.address(family))
    world = {"fromEntities": ["world"], **ports("80/TCP")}
    node.firewall.apply(policy("app=b", ingress=[world], name="to-b"))
    for family in FAMILIES:
        front = node.node.address(family)
        with Echo(b, 80, family) as server, w.connect(front, 8080) as client:
            accepted = server.accept()
            for _ in range(30):
                assert exchange(client, accepted, token())
        with Echo(w, 80, family) as server, a.connect(w.address(family), 80) as client:
            accepted = server.accept()
            assert accepted.getpeername()[0] != node.containers["a"].addresses[family]
            for _ in range(30):
                assert exchange(client, accepted, token())


@pytest.mark.parametrize("node", ["podman"], indirect=True)
def test_the_way_around_by_a_published_port_is_no_way_around(node):
    """a and c ask the node for b's port: translated at both ends, judged by who they are."""
    a, b, c = (node.containers[name].host for name in "abc")
    with Echo(b, 80) as server, a.connect(NODE[V4], 8080) as client:
        accepted = server.accept()
        assert accepted.getpeername()[0] == NODE[V4]  # it is masqueraded
        for _ in range(30):
            assert exchange(client, accepted, token())
        with pytest.raises(TimeoutError):
            c.connect(NODE[V4], 8080, timeout_s=1.0)
        source, target = between(node, "c", "b", V4)
        record = refused(node, source)
        assert record["IP"]["destination"] == target


def test_requests_from_elsewhere_to_a_container_are_judged(node):
    """Also by its published port. What the container answers comes through the bridge to the proxy,
    its port looked at.
    """
    b, w = node.containers["b"].host, node.host("w")
    b.start([sys.executable, "-m", "lab.demo.deathstar"])
    eventually(lambda: "operational" in b.log(), "the server runs")
    landing = {"method": "POST", "path": "/v1/request-landing"}
    world = {"fromEntities": ["world"], **ports("80/TCP", http=[landing])}
    node.firewall.apply(policy("app=b", ingress=[world], name="to-b"))
    own, published = node.containers["b"].addresses, node.node
    for family in FAMILIES:
        for address, port in ((own[family], 80), (published.address(family), 8080)):
            url = f"http://{address}:{port}" if family == V4 else f"http://[{address}]:{port}"
            landed = curl(w, f"{url}/v1/request-landing", "-X", "POST")
            assert landed == (0, "200", "Ship landed\n")
            assert curl(w, f"{url}/v1/exhaust-port", "-X", "PUT")[1] == "403"
    assert "exhaust-port" not in b.log()
    c, address = node.containers["c"].host, node.containers["b"].addresses[V4]
    with b.capture() as at_b, w.connect(address, 80) as client:
        client.sendall(b"POST /v1/request-landing HTTP/1.1\r\nHost: b\r\nContent-Length: 0\r\n\r\n")
        asked = parsed(at_b.expect(is_tcp(flags="S")))
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        c.send(bytes(tcp(address, w, asked.sport, source_port=80, flags="R")))
        refused(node, address, "INVALID_SOURCE_IP")


def test_what_needs_the_proxy_is_not_switched_past_it(node):
    """L7 rules on what a container asks for: dropped, not passed unread (docs/datapath.md)."""
    a, b = node.containers["a"].host, node.containers["b"].host
    web = ports("80/TCP", http=[{"method": "GET", "path": "/public"}])
    node.firewall.apply(policy("app=b", ingress=[{**peers("app=a"), **web}], name="to-b"))
    with b.listen(80), b.capture() as at_b:
        target = node.containers["b"].addresses[V4]
        code, status, _ = curl(a, f"http://{target}/secret", timeout_s=2)
        assert (code != 0, status) == (True, "000")
        assert not [data for data in at_b.so_far() if data[0] >> 4 == 4 and data[9] == 6]
    source = node.containers["a"].addresses[V4]
    refused(node, source, "PROXY_REDIRECTION_NOT_SUPPORTED_FOR_PROTOCOL")
