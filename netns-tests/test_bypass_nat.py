"""Translated flows (NAT): policy is about the real ends, whatever a user's rules do in between.

The user's rules are made with iptables, as Docker or kube-proxy make them, before or after ours.
Evidence is what arrives at the ends, and the flow records.
"""

import pytest
from evidence import dropped, flow
from rules import peers, policy, ports
from traffic import DEADLINE_S, Echo, carries, eventually, exchange, tcp, token, udp

pytestmark = pytest.mark.needs("nfqueue", "nfqueue6", "tproxy", "socket", "connmark", "ipset")

SERVICE = "10.96.0.10"
"""An address that nobody has: what stands for b."""

TO_B = policy("app=b", ingress=[{**peers("app=a"), **ports("8080/TCP", "5353/UDP")}], name="to-b")
FROM_A = policy(
    "app=a",
    egress=[{"toEndpoints": [{"matchLabels": {"app": "b"}}], **ports("8080/TCP", "5353/UDP")}],
    name="from-a",
)


def nat(node, *rule: str) -> None:
    node.run(["iptables", "-t", "nat", *rule], check=True)


def to_b(node, b, *more: str, chain: str = "PREROUTING") -> None:
    """SERVICE:80/tcp and :53/udp become b:8080 and b:5353."""
    for protocol, port, target in (("tcp", 80, 8080), ("udp", 53, 5353)):
        where = ["-d", SERVICE, "-p", protocol, "--dport", str(port), *more]
        nat(node, "-A", chain, *where, "-j", "DNAT", "--to", f"{b.address4}:{target}")


@pytest.fixture(scope="module", params=[True, False], ids=["bypass", "userspace"])
def running(request, module_lab, module_bartizan):
    made = module_lab(a="app=a", b="app=b", c="app=c", w="app=w")
    made.firewall = module_bartizan(made, {"bypass": request.param, "workers": 1}, endpoints=False)
    for name in "abc":
        made.firewall.add(made.host(name))
    made.bypass = request.param
    yield made
    made.close()  # the other one takes the same names


@pytest.fixture
def node(running):
    """a, b and c are endpoints, w is the world outside; no rules of the user's."""
    running.firewall.clear()
    yield running
    nat(running.node, "-F")
    running.node.run(["conntrack", "-F"])
    running.node.run(["ip", "route", "del", SERVICE])
    running.node.run(["nft", "delete table inet user"])


def talk(node, client, accepted, count: int = 30) -> None:
    """Exchange, and show that the kernel carries the flow if it shall."""
    for _ in range(count):
        assert exchange(client, accepted, token())
    if node.bypass:

        def marked() -> bool:
            listed = node.node.run(["conntrack", "-L", "-p", "tcp"], check=True).stdout
            return any(" mark=" in line and "mark=0 " not in line for line in listed.splitlines())

        eventually(marked, "the kernel carries it")


def test_a_service_is_judged_by_its_backend(node):
    """DNAT in front of b: a may, by egress and ingress rules for b alone; c may not."""
    a, b, c = (node.host(name) for name in "abc")
    to_b(node.node, b)
    node.firewall.apply(TO_B)
    node.firewall.apply(FROM_A)
    with Echo(b, 8080) as server, a.connect(SERVICE, 80) as client:
        talk(node, client, server.accept())
    with a.datagram() as client, b.datagram(5353) as server:
        client.settimeout(DEADLINE_S)
        server.settimeout(DEADLINE_S)
        for _ in range(20):
            client.sendto(b"question", (SERVICE, 53))
            server.sendto(b"answer", server.recvfrom(100)[1])
            assert client.recvfrom(100)[1] == (SERVICE, 53)
    refused = udp(c, SERVICE, 53, token())
    c.send(bytes(refused))
    wanted = {"source": c.address4, "destination": b.address4}
    flow(
        node.firewall,
        lambda record: wanted.items() <= record.get("IP", {}).items(),
        verdict="DROPPED",
        reason="POLICY_DENIED",
    )


def test_what_is_not_translated_is_dropped_all_the_same(node):
    """A destination outside that a's egress rules do not name: deferred, then dropped."""
    a, w = node.host("a"), node.host("w")
    node.firewall.apply(FROM_A)
    with w.capture() as at_w:
        packet = udp(a, w, 9, token())
        a.send(bytes(packet))
        dropped(node.firewall, packet)
        to_node = tcp(a, node.node.address4, 9)
        a.send(bytes(to_node))
        dropped(node.firewall, to_node)
        assert not [data for data in at_w.so_far() if bytes(packet.load) in data]


def test_a_forwarded_port_is_no_hole(node):
    """From outside, by an address of the node: b's rules decide, though w is nobody's endpoint."""
    b, w = node.host("b"), node.host("w")
    to_b(node.node, b)
    node.firewall.apply(TO_B)
    with b.capture() as at_b:
        payload = token()
        w.send(bytes(udp(w, SERVICE, 53, payload)))
        wanted = {"source": w.address4, "destination": b.address4}
        flow(
            node.firewall,
            lambda record: wanted.items() <= record.get("IP", {}).items(),
            verdict="DROPPED",
            reason="POLICY_DENIED",
        )
        assert not [data for data in at_b.so_far() if payload in data]
    world = {"fromEntities": ["world"], **ports("8080/TCP")}
    node.firewall.apply(policy("app=b", ingress=[world], name="to-b"))
    with Echo(b, 8080) as server, w.connect(SERVICE, 80) as client:
        talk(node, client, server.accept())


@pytest.mark.parametrize("when", ["before", "after"])
def test_masquerading_does_not_hide_an_endpoint(node, when):
    """a talks to the world by the node's address, to b by its own; replies come back to it."""
    a, b, w = (node.host(name) for name in "abw")
    masquerade = ["-A", "POSTROUTING", "-o", w.interface, "-j", "MASQUERADE"]
    if when == "before":
        nat(node.node, *masquerade)
    egress = [{"toEntities": ["world"], **ports("80/TCP")}]
    node.firewall.apply(policy("app=a", egress=egress, name="from-a"))
    if when == "after":
        nat(node.node, *masquerade)
    with Echo(w, 80) as server, a.connect(w.address4, 80) as client:
        accepted = server.accept()
        assert accepted.getpeername()[0] != a.address4  # it is masqueraded
        talk(node, client, accepted)
    refused = tcp(a, w, 81)
    a.send(bytes(refused))
    dropped(node.firewall, refused)
    to_b_refused = udp(a, b, 53, token())
    a.send(bytes(to_b_refused))
    dropped(node.firewall, to_b_refused)


def test_a_revocation_reaches_translated_flows(node):
    """A running connection by way of the service stops."""
    a, b = node.host("a"), node.host("b")
    to_b(node.node, b)
    node.firewall.apply(TO_B)
    with Echo(b, 8080) as server, a.connect(SERVICE, 80) as client:
        accepted = server.accept()
        talk(node, client, accepted)
        node.firewall.apply(policy("app=b", ingress=[{}], name="to-b"))
        accepted.settimeout(1.0)
        assert not exchange(client, accepted, token())


def test_a_spoofed_source_is_not_translated_into_a_true_one(node):
    """c uses a's address towards the service."""
    a, b, c = (node.host(name) for name in "abc")
    to_b(node.node, b)
    node.firewall.apply(TO_B)
    with b.capture() as at_b:
        payload, last = token(), token()
        c.send(bytes(udp(a, SERVICE, 53, payload)))
        a.send(bytes(udp(a, SERVICE, 53, last)))
        at_b.expect(carries(last), DEADLINE_S)
        assert not [data for data in at_b.so_far() if payload in data]


def test_the_nodes_own_talk_with_a_service_is_judged(node):
    """OUTPUT is translated after our rules in mangle, and before those of nftables."""
    b = node.host("b")
    to_b(node.node, b, chain="OUTPUT")
    node.node.run(["ip", "route", "add", SERVICE, "dev", b.interface], check=True)
    node.firewall.apply(TO_B)
    with Echo(b, 8080) as server, node.node.connect(SERVICE, 80) as client:
        talk(node, client, server.accept())  # the node may reach its endpoints
    flow(
        node.firewall,
        lambda record: record.get("IP", {}).get("destination") == b.address4,
        verdict="FORWARDED",
    )


def test_a_users_nft_rules_and_ours_do_not_meet(node):
    """Drops and counts of a user's own table are carried out; ours go on."""
    a, b = node.host("a"), node.host("b")
    node.firewall.apply(TO_B)
    table = (
        "table inet user { chain c { type filter hook forward priority 0; "
        "udp dport 5353 counter drop; tcp dport 8080 counter accept; }; }\n"
    )
    node.node.run(["nft", "-f", "-"], stdin=table, check=True)
    with Echo(b, 8080) as server, a.connect(b.address4, 8080) as client, b.capture() as at_b:
        payload = token()
        a.send(bytes(udp(a, b, 5353, payload)))
        talk(node, client, server.accept())
        assert not [data for data in at_b.so_far() if payload in data]

    def counted() -> bool:
        listed = node.node.run(["nft", "list", "table", "inet", "user"], check=True).stdout
        return "packets 0" not in listed

    eventually(counted, "the user's rules count")
