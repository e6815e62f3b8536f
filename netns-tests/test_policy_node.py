"""The node as an endpoint, and other nodes as peers, on real packets."""

import policy_world
import pytest
from policy_world import NODE4, listens
from traffic import V4, V6, Echo, curl, eventually, exchange, tcp, token, udp

pytestmark = pytest.mark.needs("veth", "nfqueue", "nfqueue6", "tproxy", "socket", "ipset", "ipv6")

running = policy_world.running
world = policy_world.world

# --- the node itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", [V4, V6], ids=["ipv4", "ipv6"])
def test_host_ingress_is_decided_by_a_node_selector(world, family):
    """Research a.2 nodeSelector: a may reach port 22 of the node, c and the world may not."""
    a, c, w, node = (world.host(name) for name in ("a", "c", "w", "node"))
    assert world.says("w", tcp(w, node, 22, family=family)) == "FORWARDED"
    world.host_policy(
        "nodeSelector: {matchLabels: {role: edge}}\n"
        "ingress: [{fromEndpoints: [{matchLabels: {app: a}}],"
        " toPorts: [{ports: [{port: '22', protocol: TCP}]}]}]"
    )
    assert world.says("a", tcp(a, node, 22, family=family)) == "FORWARDED"
    for name, sender, port in (("a", a, 23), ("c", c, 22), ("w", w, 22)):
        flow = world.verdict(name, tcp(sender, node, port, family=family))
        assert (flow["verdict"], flow["drop_reason_desc"]) == ("DROPPED", "POLICY_DENIED")
        assert flow["traffic_direction"] == "INGRESS"
        assert flow["destination"]["identity"] == 1
        assert "k8s:role=edge" in flow["destination"]["labels"]


def test_a_node_selector_for_another_node_does_not_concern_this_one(world):
    """Research a.9: labels of the node decide; its name is one of them."""
    w, node = world.host("w"), world.host("node")
    deny = "ingressDeny: [{fromEntities: [world]}]"
    world.host_policy(f"nodeSelector: {{matchLabels: {{role: core}}}}\n{deny}")
    assert world.says("w", tcp(w, node, 22)) == "FORWARDED"
    named = "nodeSelector: {matchLabels: {kubernetes.io/hostname: node}}"
    world.host_policy(f"{named}\n{deny}")
    assert world.says("w", tcp(w, node, 22)) == "DROPPED"


def test_an_endpoint_selector_never_selects_the_node(world):
    """Research c: the host endpoint is enforced by a nodeSelector policy only."""
    w, node = world.host("w"), world.host("node")
    world.apply("endpointSelector: {}\ningress: [{}]", kind="CiliumClusterwideNetworkPolicy")
    assert world.says("w", tcp(w, node, 22)) == "FORWARDED"


def test_host_egress_is_decided_and_replies_are_free(world):
    """The node may talk to a's UDP 53 only; its answers to others need no rule."""
    a, b, w, node = (world.host(name) for name in ("a", "b", "w", "node"))
    world.host_policy(
        "nodeSelector: {}\n"
        "egress: [{toEndpoints: [{matchLabels: {app: a}}],"
        " toPorts: [{ports: [{port: '53', protocol: UDP}]}]}]"
    )
    assert world.says("node", udp(node, a, 53, token())) == "FORWARDED"
    flow = world.verdict("node", udp(node, b, 53, token()))
    assert (flow["verdict"], flow["traffic_direction"]) == ("DROPPED", "EGRESS")
    assert world.says("node", udp(node, w, 53, token())) == "DROPPED"
    with w.capture() as capture:
        syn = tcp(w, node, 9)
        w.send(bytes(syn))
        capture.expect(lambda data: data[9] == 6 and data[33] & 0x04, what="no RST")


def test_a_connection_older_than_the_policy_goes_on_where_policy_allows_it(world):
    """A remote login must survive the moment in which the node comes under policy."""
    w, node = world.host("w"), world.host("node")
    world.host_policy(
        "nodeSelector: {}\ningress: [{toPorts: [{ports: [{port: '22', protocol: TCP}]}]}]"
    )
    with w.capture() as capture:  # segments of a connection that nobody saw begin
        w.send(bytes(tcp(w, node, 22, flags="PA", seq=5, ack=7, payload=b"x")))
        capture.expect(lambda data: data[9] == 6 and data[33] & 0x04, what="no answer")
    packet = tcp(w, node, 23, flags="PA", seq=5, ack=7, payload=b"x")
    assert world.says("w", packet) == "DROPPED"


@pytest.mark.parametrize("family", [V4, V6], ids=["ipv4", "ipv6"])
def test_connections_with_the_node_carry_data_both_ways(world, family):
    """Either end may open it; what follows needs no rule."""
    a, node = world.host("a"), world.host("node")
    world.host_policy(
        "nodeSelector: {}\n"
        "ingress: [{fromEndpoints: [{matchLabels: {app: a}}],"
        " toPorts: [{ports: [{port: '8022', protocol: TCP}]}]}]\n"
        "egress: [{toEndpoints: [{matchLabels: {app: a}}],"
        " toPorts: [{ports: [{port: '8023', protocol: TCP}]}]}]"
    )
    for client, server, port in ((a, node, 8022), (node, a, 8023)):
        address = server.address(family)
        with Echo(server, port, family) as echoing, client.connect(address, port) as connection:
            assert exchange(connection, echoing.accept(), token() * 20_000)
    assert world.says("a", tcp(a, node, 8023, family=family)) == "DROPPED"


def test_the_agent_is_not_cut_off_by_a_host_policy_that_denies_all(world):
    """Its API is a unix socket; loopback is never queued."""
    world.host_policy(
        "nodeSelector: {}\ningressDeny: [{fromEntities: [all]}]\negressDeny: [{toEntities: [all]}]"
    )
    assert world.firewall.get("/v1/healthz") == {"status": "ok"}
    assert world.lab.node.run(["ping", "-c1", "-W5", "127.0.0.1"]).returncode == 0
    assert world.lab.node.run(["ping", "-c1", "-W5", NODE4]).returncode == 0


@pytest.mark.parametrize("family", [V4, V6], ids=["ipv4", "ipv6"])
def test_requests_to_a_server_of_the_node_are_judged(world, family):
    """L7 egress of an endpoint and L4 ingress of the node, on one connection."""
    a, node = world.host("a"), world.host("node")
    address = node.address(family)
    node.start(["python3", "-m", "http.server", "--bind", address, "8080"])
    eventually(lambda: listens(node, address, 8080), "the server listens")
    url = f"http://[{address}]:8080/" if family == V6 else f"http://{address}:8080/"
    world.apply(
        "endpointSelector: {matchLabels: {app: a}}\n"
        "egress: [{toEntities: [host], toPorts: [{ports: [{port: '8080', protocol: TCP}],"
        " rules: {http: [{method: GET}]}}]}]"
    )
    assert curl(a, url)[1] == "200"
    assert curl(a, url, "-X", "PUT")[1] == "403"
    world.host_policy("nodeSelector: {}\ningress: [{fromEntities: [world]}]")
    assert curl(a, url, timeout_s=1.0)[1] == "000"


def test_allow_localhost_is_not_applied_to_host_policies(world):
    """Research a.8: the node reaches its endpoints; its own egress policy still counts."""
    b, node = world.host("b"), world.host("node")
    world.apply("endpointSelector: {matchLabels: {app: b}}\ningress: [{}]")
    assert world.says("node", udp(node, b, 99, token())) == "FORWARDED"
    world.host_policy("nodeSelector: {}\negress: [{}]")
    flow = world.verdict("node", udp(node, b, 98, token()))
    assert (flow["verdict"], flow["traffic_direction"]) == ("DROPPED", "EGRESS")


def test_the_node_is_listed_with_its_enforcement_and_may_be_audited(world):
    """`host_audit`: what host policy would drop is AUDIT and passes; Cilium: PolicyAuditMode."""
    w, node = world.host("w"), world.host("node")
    world.host_policy("nodeSelector: {}\ningress: [{}]")
    world.configure(host_audit=True)
    assert world.says("w", tcp(w, node, 22)) == "AUDIT"
    (row,) = [one for one in world.firewall.get("/v1/endpoint") if one["identity"]["id"] == 1]
    assert row["labels"] == ["k8s:kubernetes.io/hostname=node", "k8s:role=edge", "reserved:host"]
    assert row["policy"]["ingress"] == {"enforced": True, "audit": True}
    assert row["policy"]["egress"] == {"enforced": False, "audit": False}
    world.configure()
    assert world.says("w", tcp(w, node, 22)) == "DROPPED"
    assert "node" in world.firewall.cli("endpoint", "list").stdout


# --- other nodes --------------------------------------------------------------------------------


def test_peers_by_node_labels_tell_nodes_apart(world):
    """Research a.6 Nodes: near is in zone b, far is not, w is no node."""
    b, near, far, w = (world.host(name) for name in ("b", "near", "far", "w"))
    world.apply(
        "endpointSelector: {matchLabels: {app: b}}\n"
        "ingress: [{fromNodes: [{matchLabels: {zone: b}}]}]\n"
        "egress: [{toNodes: [{matchLabels: {kubernetes.io/hostname: far}}]}]"
    )
    assert world.says("near", udp(near, b, 5, token())) == "FORWARDED"
    assert world.says("far", udp(far, b, 5, token())) == "DROPPED"
    assert world.says("w", udp(w, b, 5, token())) == "DROPPED"
    assert world.says("b", udp(b, far, 6, token())) == "FORWARDED"
    flow = world.verdict("b", udp(b, near, 6, token()))
    assert flow["verdict"] == "DROPPED"
    assert flow["destination"]["identity"] >> 24 == 2
    assert "reserved:remote-node" in flow["destination"]["labels"]


@pytest.mark.parametrize(
    ("entity", "allowed"),
    [("remote-node", "near far"), ("host", "node"), ("cluster", "a near far node"),
     ("world", "w"), ("none", ""), ("all", "a near far node w")],
)  # fmt: skip
def test_entities_mean_who_they_name(world, entity, allowed):
    """Research a.6 Entities; with allow-localhost policy, the node is no exception."""
    b = world.host("b")
    world.configure(allow_localhost="policy")
    world.apply(
        f"endpointSelector: {{matchLabels: {{app: b}}}}\ningress: [{{fromEntities: [{entity}]}}]"
    )
    found = [
        name
        for name in ("a", "near", "far", "node", "w")
        if world.says(name, udp(world.host(name), b, 5, token())) == "FORWARDED"
    ]
    assert found == allowed.split()
