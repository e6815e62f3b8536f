"""The rest of Cilium's policy language on real packets: one lab and one daemon for all cases.

The node is an endpoint here (`host_firewall: on`); `near` and `far` are other nodes by label, `w`
is the world. Every answer is read from the flow record of the very packet that was sent.
"""

import os
import signal

import pytest
import yaml
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Raw
from traffic import V4, V6, Echo, curl, echo, eventually, exchange, ip, tcp, token, udp

from lab import daemon
from lab.daemon import ApiRefused
from lab.laboratory import Lab
from lab.topology import HostPlan, NamedPort, Topology, assigned

pytestmark = pytest.mark.needs("veth", "nfqueue", "nfqueue6", "tproxy", "socket", "ipset", "ipv6")

NAMED = (
    NamedPort(name="web", port=80),
    NamedPort(name="mgmt", port=7000, protocol="SCTP"),
)
HOSTS = (
    HostPlan(name="a", labels={"app": "a"}, ports=(NamedPort(name="web", port=8080),)),
    HostPlan(name="b", labels={"app": "b"}, ports=NAMED),
    HostPlan(name="c", labels={"app": "c"}),
    HostPlan(name="near", managed=False),
    HostPlan(name="far", managed=False),
    HostPlan(name="w", managed=False),
)
NODE4 = "10.0.0.1"
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132, "icmpv4": 1, "icmpv6": 58}


class World:
    """The lab with its daemon, and words for what the tests do."""

    def __init__(self):
        self.lab = Lab(assigned(Topology(name="language", hosts=HOSTS)))
        try:
            self.config = {
                "workers": 2,
                "host_firewall": True,
                "node_labels": ["role=edge"],
                "nodes": [self.node("near", "zone=b"), self.node("far", "zone=c")],
                "policy": {"extended_protocols": True},
            }
            self.firewall = daemon.start(self.lab, self.config)
        except BaseException:
            self.lab.close()
            raise

    def node(self, name, *labels):
        return {
            "name": name,
            "addresses": list(self.host(name).addresses),
            "labels": list(labels),
        }

    def host(self, name):
        return self.lab.node if name == "node" else self.lab.host(name)

    def clear(self):
        """No policies, defaults."""
        self.configure()
        self.firewall.request("DELETE", "/v1/policy", None, {"all": "1", "wait": 10})

    def configure(self, *, host_audit=False, **policy):
        """Set live settings (of `policy`, and `host_audit`) as an operator does: file, SIGHUP."""
        document = yaml.safe_load(self.firewall.config_path.read_text())
        wanted = {"policy": {"extended_protocols": True, **policy}, "host_audit": host_audit}
        if {name: document.get(name, False) for name in wanted} == wanted:
            return
        document |= wanted
        before = self.firewall.get("/v1/status")["revision"]
        self.firewall.config_path.write_text(yaml.safe_dump(document))
        os.kill(self.firewall.process.pid, signal.SIGHUP)

        def enforced():
            status = self.firewall.get("/v1/status")
            revisions = {worker["revision"] for worker in status["workers"]}
            return status["revision"] > before and revisions == {status["revision"]}

        eventually(enforced, "the settings are enforced")

    def config_without_host_firewall(self):
        """The configuration as it is, but for the node."""
        document = yaml.safe_load(self.firewall.config_path.read_text())
        return {**document, "host_firewall": False}

    def apply(self, *specs, kind="CiliumNetworkPolicy"):
        """Apply a policy of `specs` (YAML text of one rule each)."""
        document = {
            "apiVersion": "cilium.io/v2",
            "kind": kind,
            "metadata": {"name": "rule"},
            "specs": [yaml.safe_load(spec) for spec in specs],
        }
        if kind == "CiliumNetworkPolicy":
            document["metadata"]["namespace"] = "default"
        return self.firewall.apply(yaml.safe_dump(document))

    def host_policy(self, *specs):
        """Apply rules to the node itself."""
        return self.apply(*specs, kind="CiliumClusterwideNetworkPolicy")

    def verdict(self, sender, packet):
        """Send a packet; return the flow record of it alone."""
        known = {flow["uuid"] for flow in self.firewall.flows()}
        if sender == "node":
            self.emit(packet)
        else:
            self.host(sender).send(bytes(packet))
        return self.record(packet, known)

    def emit(self, packet):
        """Send a packet as the node's own: routed by its kernel, through OUTPUT."""
        family = V4 if IP in packet else V6
        with self.lab.node.open_socket(family, 3, 255) as raw:  # SOCK_RAW, IPPROTO_RAW
            raw.sendto(bytes(packet), (packet.dst, 0))

    def record(self, packet, known=frozenset()):
        """Wait for the record of a packet that is not among those known before."""
        return eventually(
            lambda: next(
                (
                    flow
                    for flow in self.firewall.flows()
                    if flow["uuid"] not in known and is_about(flow, packet)
                ),
                None,
            ),
            f"a record of {packet.summary()}",
        )

    def says(self, sender, packet):
        """`FORWARDED`, `DROPPED`, `AUDIT`, `REDIRECTED`."""
        return self.verdict(sender, packet)["verdict"]

    def close(self):
        self.lab.close()


def is_about(flow, packet):
    """Whether a record has a packet's addresses and ports, or ICMP type."""
    addresses = flow.get("IP", {})
    if (addresses.get("source"), addresses.get("destination")) != (packet.src, packet.dst):
        return False
    layer4 = {name.lower(): found for name, found in flow.get("l4", {}).items()}
    if ICMP in packet and isinstance(packet.payload, ICMP):
        return "icmpv4" in layer4 and layer4["icmpv4"].get("type", 0) == packet[ICMP].type
    for layer, name in ((TCP, "tcp"), (UDP, "udp"), (SCTP, "sctp")):
        if layer in packet:
            found = layer4.get(name, {})
            ends = found.get("source_port"), found.get("destination_port")
            return ends == (packet[layer].sport, packet[layer].dport)
    if IPv6 in packet and packet.nh == PROTOCOLS["icmpv6"]:
        return "icmpv6" in layer4 and layer4["icmpv6"].get("type", 0) == packet.payload.type
    return not layer4


def sctp(source, destination, port, family=V4):
    """The first packet of an SCTP association."""
    base = udp(source, destination, port, b"x", family=family)
    chunk = SCTPChunkInit(init_tag=7, a_rwnd=65_536, n_out_streams=1, n_in_streams=1)
    return ip(source, destination, family) / SCTP(sport=base.sport, dport=port, tag=0) / chunk


def bare(source, destination, protocol, payload=b"\0" * 20):
    """An IPv4 packet of a protocol without ports."""
    return ip(source, destination, proto=protocol) / Raw(payload)


@pytest.fixture(scope="module")
def running():
    made = World()
    yield made
    made.close()


@pytest.fixture
def world(running):
    running.clear()
    return running


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
    eventually(lambda: _listens(node, address, 8080), "the server listens")
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


# --- protocols and ports ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number"),
    [("IGMP", 2), ("IPIP", 4), ("IPV6", 41), ("GRE", 47), ("ESP", 50), ("AH", 51), ("VRRP", 112)],
)
def test_extended_protocols_are_told_apart(world, name, number):
    """Research a.7: port empty or 0, only this protocol is allowed."""
    a, b = world.host("a"), world.host("b")
    other = 50 if number != 50 else 51
    world.apply(
        "endpointSelector: {matchLabels: {app: b}}\n"
        "ingress: [{fromEndpoints: [{matchLabels: {app: a}}],"
        f" toPorts: [{{ports: [{{port: '0', protocol: {name}}}]}}]}}]"
    )
    assert world.says("a", bare(a, b, other)) == "DROPPED"
    assert world.says("a", udp(a, b, 5, token())) == "DROPPED"
    with b.capture() as capture:
        a.send(bytes(bare(a, b, number)))
        capture.expect(lambda data: data[0] >> 4 == 4 and data[9] == number)


@pytest.mark.parametrize("family", [V4, V6], ids=["ipv4", "ipv6"])
def test_sctp_ports_are_enforced(world, family):
    """Research a.7: SCTP is a protocol with ports."""
    a, b = world.host("a"), world.host("b")
    world.apply(
        "endpointSelector: {matchLabels: {app: b}}\n"
        "ingress: [{toPorts: [{ports: [{port: '7000', endPort: 7010, protocol: SCTP}]}]}]"
    )
    with b.capture() as capture:
        packet = sctp(a, b, 7005, family)
        assert world.says("a", packet) == "FORWARDED"
        capture.expect(lambda data: bytes(packet[SCTP]) in data)
    assert world.says("a", sctp(a, b, 7011, family)) == "DROPPED"
    assert world.says("a", tcp(a, b, 7005, family=family)) == "DROPPED"


def test_icmp_types_by_name_and_number(world):
    """Research a.7: names per family, never codes; ports do not allow ICMP."""
    a, b, c = (world.host(name) for name in "abc")
    world.apply(
        "endpointSelector: {matchLabels: {app: b}}\n"
        "ingress: [{fromEndpoints: [{matchLabels: {app: a}}], icmps: [{fields: ["
        "{family: IPv4, type: EchoRequest}, {family: IPv6, type: 128}]}]},"
        " {fromEndpoints: [{matchLabels: {app: c}}],"
        " toPorts: [{ports: [{port: '0', protocol: ANY}]}]}]"
    )
    for family in (V4, V6):
        assert world.says("a", echo(a, b, token(), family=family)) == "FORWARDED"
        assert world.says("c", echo(c, b, token(), family=family)) == "DROPPED"
    assert world.says("a", ip(a, b) / ICMP(type=13, id=9)) == "DROPPED"


def test_port_0_is_every_port_of_the_protocol(world):
    """Research a.7: `port: "0"`."""
    a, b = world.host("a"), world.host("b")
    world.apply(
        "endpointSelector: {matchLabels: {app: b}}\n"
        "ingress: [{toPorts: [{ports: [{port: '0', protocol: UDP}]}]}]"
    )
    assert world.says("a", udp(a, b, 1, token())) == "FORWARDED"
    assert world.says("a", udp(a, b, 65_535, token())) == "FORWARDED"
    assert world.says("a", tcp(a, b, 1)) == "DROPPED"


def test_named_ports_are_the_subjects_on_ingress_and_the_peers_on_egress(world):
    """Research a.7: `web` is 80 at b and 8080 at a; an unknown name allows nothing."""
    a, b, c = (world.host(name) for name in "abc")
    world.apply(
        "endpointSelector: {matchLabels: {app: b}}\n"
        "ingress: [{toPorts: [{ports: [{port: web}, {port: mgmt, protocol: SCTP}]}]}]",
        "endpointSelector: {matchLabels: {app: c}}\n"
        "egress: [{toPorts: [{ports: [{port: web, protocol: TCP}]}]}]",
    )
    assert world.says("a", tcp(a, b, 80)) == "FORWARDED"
    assert world.says("a", tcp(a, b, 8080)) == "DROPPED"
    assert world.says("a", udp(a, b, 80, token())) == "DROPPED"
    assert world.says("a", sctp(a, b, 7000)) == "FORWARDED"
    assert world.says("c", tcp(c, a, 8080)) == "FORWARDED"
    assert world.says("c", tcp(c, a, 80)) == "DROPPED"
    assert world.says("c", tcp(c, b, 80)) == "FORWARDED"


# --- what is reported, and modes ----------------------------------------------------------------


def test_the_log_value_of_the_deciding_rule_is_in_the_flow(world):
    """Research a.2: `log.value` is returned as `policy_log`."""
    a, b, c = (world.host(name) for name in "abc")
    world.apply(
        "endpointSelector: {matchLabels: {app: b}}\nlog: {value: open sesame}\n"
        "ingress: [{fromEndpoints: [{matchLabels: {app: a}}]}]",
        "endpointSelector: {matchLabels: {app: b}}\nlog: {value: go away}\n"
        "ingressDeny: [{fromEndpoints: [{matchLabels: {app: c}}]}]",
    )
    assert world.verdict("a", udp(a, b, 5, token()))["policy_log"] == ["open sesame"]
    assert world.verdict("c", udp(c, b, 5, token()))["policy_log"] == ["go away"]


def test_enable_default_deny_off_only_denies_what_is_denied_and_watches_l7(world):
    """Research a.5: both directions; L7 rules of such a policy refuse nothing."""
    a, b, c = (world.host(name) for name in "abc")
    world.apply(
        "endpointSelector: {matchLabels: {app: b}}\n"
        "enableDefaultDeny: {ingress: false, egress: false}\n"
        "ingress: [{fromEndpoints: [{matchLabels: {app: a}}], toPorts: [{ports:"
        " [{port: '80', protocol: TCP}], rules: {http: [{method: PUT}]}}]}]\n"
        "egressDeny: [{toEndpoints: [{matchLabels: {app: c}}]}]"
    )
    assert world.says("c", udp(c, b, 5, token())) == "FORWARDED"
    assert world.says("b", udp(b, a, 5, token())) == "FORWARDED"
    assert world.says("b", udp(b, c, 5, token())) == "DROPPED"
    b.start(["python3", "-m", "http.server", "--bind", b.address4, "80"])
    eventually(lambda: _listens(b, b.address4, 80), "the server listens")
    assert curl(a, f"http://{b.address4}/")[1] == "200"
    watched = eventually(
        lambda: [
            flow["verdict"]
            for flow in world.firewall.flows()
            if flow["Type"] == "L7"
            and flow["l7"]["type"] == "REQUEST"
            and flow["IP"]["destination"] == b.address4
        ],
        "a record of the request",
    )
    assert watched[-1] in ("FORWARDED", "REDIRECTED")
    only_put = (
        "endpointSelector: {matchLabels: {app: a}}\n%s"
        "egress: [{toEndpoints: [{matchLabels: {app: b}}], toPorts: [{ports:"
        " [{port: '80', protocol: TCP}], rules: {http: [{method: PUT}]}}]}]"
    )
    world.apply(only_put % "enableDefaultDeny: {egress: false}\n")
    assert curl(a, f"http://{b.address4}/")[1] == "200"
    assert world.says("a", udp(a, c, 5, token())) == "FORWARDED"
    world.apply(only_put % "")
    assert curl(a, f"http://{b.address4}/")[1] == "403"
    assert world.says("a", udp(a, c, 6, token())) == "DROPPED"
    world.apply(
        "endpointSelector: {matchLabels: {app: b}}\n"
        "ingress: [{fromEndpoints: [{matchLabels: {app: a}}], toPorts: [{ports:"
        " [{port: '80', protocol: TCP}], rules: {http: [{method: PUT}]}}]}]\n"
    )
    assert curl(a, f"http://{b.address4}/")[1] == "403"


def _listens(host, address, port):
    try:
        host.connect(address, port, timeout_s=0.2).close()
    except OSError:
        return False
    return True


def test_audit_mode_of_the_daemon_lets_pass_and_says_so(world):
    """Research c: verdict AUDIT; taken off again, the same traffic is dropped."""
    a, b = world.host("a"), world.host("b")
    world.configure(audit=True)
    world.apply("endpointSelector: {matchLabels: {app: b}}\ningress: [{}]")
    with b.capture() as capture:
        payload = token()
        flow = world.verdict("a", udp(a, b, 5, payload))
        capture.expect(lambda data: payload in data)
    assert flow["verdict"] == "AUDIT"
    world.configure()
    assert world.says("a", udp(a, b, 5, token())) == "DROPPED"


def test_audit_mode_lets_requests_pass_too(world):
    """Research c says not for L7; here it is (docs/compatibility.md), and ends with the mode."""
    a, b = world.host("a"), world.host("b")
    b.start(["python3", "-m", "http.server", "--bind", b.address4, "81"])
    eventually(lambda: _listens(b, b.address4, 81), "the server listens")
    world.configure(audit=True)
    world.apply(
        "endpointSelector: {matchLabels: {app: b}}\n"
        "ingress: [{toPorts: [{ports: [{port: '81', protocol: TCP}],"
        " rules: {http: [{method: PUT}]}}]}]"
    )
    assert curl(a, f"http://{b.address4}:81/")[1] == "200"
    assert world.says("a", tcp(a, b, 82)) == "AUDIT"
    world.configure()
    assert curl(a, f"http://{b.address4}:81/")[1] == "403"


def test_audit_mode_of_one_endpoint_concerns_it_alone(world):
    """Research c: the endpoint option PolicyAuditMode."""
    a, b, c = (world.host(name) for name in "abc")
    world.apply("endpointSelector: {}\ningress: [{}]")
    world.firewall.add(b, audit=True)
    try:
        assert world.says("a", udp(a, b, 5, token())) == "AUDIT"
        assert world.says("a", udp(a, c, 5, token())) == "DROPPED"
    finally:
        world.firewall.add(b, audit=False)
    assert world.says("a", udp(a, b, 5, token())) == "DROPPED"


def test_enforcement_modes_are_switched_live(world):
    """Research c: default isolates whom a rule selects, always everybody, never nobody."""
    a, b, c = (world.host(name) for name in "abc")
    world.apply("endpointSelector: {matchLabels: {app: b}}\ningress: [{}]")
    assert world.says("a", udp(a, b, 5, token())) == "DROPPED"
    assert world.says("a", udp(a, c, 5, token())) == "FORWARDED"
    world.configure(enforcement="always")
    assert world.says("a", udp(a, c, 5, token())) == "DROPPED"
    w, node = world.host("w"), world.host("node")
    assert world.says("w", tcp(w, node, 22)) == "FORWARDED"  # the host needs a policy of its own
    world.configure(enforcement="never")
    assert world.says("a", udp(a, b, 5, token())) == "FORWARDED"


def test_allow_localhost_policy_puts_the_node_under_the_endpoints_policy(world):
    """Research c: host to local pod is allowed unless allow-localhost=policy."""
    b, node = world.host("b"), world.host("node")
    world.apply("endpointSelector: {matchLabels: {app: b}}\ningress: [{}]")
    assert world.says("node", udp(node, b, 5, token())) == "FORWARDED"
    world.configure(allow_localhost="policy")
    assert world.says("node", udp(node, b, 5, token())) == "DROPPED"


def test_an_endpoint_that_is_init_is_enforced_in_both_directions(world):
    """Research c: in mode default too; a policy for reserved:init opens what it says."""
    a, c = world.host("a"), world.host("c")
    row = {"labels": ["reserved:init"]}
    world.firewall.add(c, **row)
    try:
        assert world.firewall.endpoint("c")["identity"]["id"] == 5
        assert world.says("a", udp(a, c, 5, token())) == "DROPPED"
        assert world.says("c", udp(c, a, 5, token())) == "DROPPED"
        world.apply(
            "endpointSelector: {matchLabels: {'reserved:init': ''}}\n"
            "ingress: [{fromEntities: [all]}]",
            kind="CiliumClusterwideNetworkPolicy",
        )
        assert world.says("a", udp(a, c, 6, token())) == "FORWARDED"
        assert world.says("c", udp(c, a, 6, token())) == "DROPPED"
    finally:
        world.firewall.add(c)


@pytest.mark.parametrize("family", [V4, V6], ids=["ipv4", "ipv6"])
def test_fragmentation_needed_passes_without_a_flow(world, family):
    """Research c: always allowed; another ICMP error about no flow is not."""
    a, w = world.host("a"), world.host("w")
    world.apply("endpointSelector: {matchLabels: {app: a}}\ningress: [{}]\negress: [{}]")
    quoted = udp(a, w, 5, token(), family=family)
    if family == V4:
        needed = ip(w, a) / ICMP(type=3, code=4, nexthopmtu=1280) / quoted
        other = ip(w, a) / ICMP(type=3, code=1) / quoted
    else:
        needed = ip(w, a, family) / ICMPv6PacketTooBig(mtu=1280) / quoted
        other = None
    with a.capture() as capture:
        w.send(bytes(needed))
        capture.expect(lambda data: bytes(quoted)[-16:] in data)
    if other is not None:
        assert world.says("w", other) == "DROPPED"


# --- objects that policies refer to -------------------------------------------------------------


def test_a_cidr_group_takes_effect_when_it_is_applied_changed_and_deleted(world):
    """Research a.1: CiliumCIDRGroup, on the running daemon."""
    b, w, far = world.host("b"), world.host("w"), world.host("far")
    world.configure()
    world.apply(
        "endpointSelector: {matchLabels: {app: b}}\n"
        "ingress: [{fromCIDRSet: [{cidrGroupRef: friends}]}]"
    )
    assert world.says("w", udp(w, b, 5, token())) == "DROPPED"
    group = (
        "apiVersion: cilium.io/v2\nkind: CiliumCIDRGroup\nmetadata: {name: friends}\n"
        "spec: {externalCIDRs: [%s/32]}"
    )
    world.firewall.apply(group % w.address4)
    assert world.says("w", udp(w, b, 5, token())) == "FORWARDED"
    assert world.says("far", udp(far, b, 5, token())) == "DROPPED"
    (shown,) = world.firewall.get("/v1/policy", kind="CiliumCIDRGroup")["objects"]
    assert shown["key"] == {"kind": "CiliumCIDRGroup", "namespace": "", "name": "friends"}
    assert shown["document"]["spec"] == {"externalCIDRs": [f"{w.address4}/32"]}
    done = world.firewall.cli("policy", "delete", "friends", "--kind", "CiliumCIDRGroup")
    assert done.returncode == 0, done.stderr
    assert world.says("w", udp(w, b, 5, token())) == "DROPPED"
    assert world.firewall.get("/v1/policy", kind="CiliumCIDRGroup")["objects"] == []


def test_a_service_without_selector_means_the_addresses_of_its_slices(world):
    """Research a.6 Services: EndpointSlice addresses become CIDRs, and go with the slice."""
    a, w = world.host("a"), world.host("w")
    world.apply(
        "endpointSelector: {matchLabels: {app: a}}\n"
        "egress: [{toServices: [{k8sService: {serviceName: ext, namespace: default}}]}]"
    )
    assert world.says("a", udp(a, w, 5, token())) == "DROPPED"
    world.firewall.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: ext, namespace: default}\nspec: {}\n"
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n"
        "metadata: {name: ext-1, namespace: default,"
        " labels: {kubernetes.io/service-name: ext}}\n"
        f"endpoints: [{{addresses: [{w.address4}]}}]\n"
    )
    assert world.says("a", udp(a, w, 6, token())) == "FORWARDED"
    kinds = {row["key"]["kind"] for row in world.firewall.get("/v1/policy")["objects"]}
    assert kinds == {"CiliumNetworkPolicy", "Service", "EndpointSlice"}
    world.firewall.withdraw("EndpointSlice", "ext-1")
    assert world.says("a", udp(a, w, 7, token())) == "DROPPED"


def test_a_policy_with_unquoted_booleans_comes_back_readable(world):
    """`enableDefaultDeny: {ingress: on}` is what was written, and can be applied again."""
    text = (
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: r}\n"
        "spec:\n  endpointSelector: {matchLabels: {app: b, mode: on}}\n"
        "  enableDefaultDeny: {ingress: on}\n  ingress: [{}]\n"
    )
    world.firewall.apply(text)
    shown = world.firewall.cli("policy", "get", "r", "-o", "yaml").stdout
    assert yaml.safe_load(shown)["spec"]["enableDefaultDeny"] == {"ingress": True}
    world.firewall.apply(shown)
    assert world.firewall.cli("policy", "get", "r", "-o", "yaml").stdout == shown


def test_a_text_with_an_error_changes_nothing(world):
    """Research a.1: an invalid object is refused whole."""
    with pytest.raises(ApiRefused) as refused:
        world.apply("endpointSelector: {}\ningress: [{fromEntities: [wrold]}]")
    assert refused.value.status == 422
    assert world.firewall.get("/v1/policy")["objects"] == []


def test_a_daemon_without_the_host_firewall_starts_and_says_what_is_not_enforced(world):
    """The way out of a lockout: `host_firewall: off`, restart; the policy can then be deleted."""
    w, node = world.host("w"), world.host("node")
    world.host_policy("nodeSelector: {}\ningress: [{}]")
    assert world.says("w", tcp(w, node, 22)) == "DROPPED"
    before = world.firewall.config_path.read_text()
    world.firewall.stop()
    world.firewall.config_path.write_text(yaml.safe_dump(world.config_without_host_firewall()))
    world.firewall.start()
    try:
        told = world.firewall.cli("status").stdout
        assert "CiliumClusterwideNetworkPolicy/rule" in told
        with w.capture() as capture:
            w.send(bytes(tcp(w, node, 22)))
            capture.expect(lambda data: data[9] == 6 and data[33] & 0x04, what="no RST")
        with pytest.raises(ApiRefused) as refused:
            world.host_policy("nodeSelector: {}\ningress: [{}]")
        assert "needs `host_firewall: on`" in str(refused.value)
        world.firewall.withdraw("CiliumClusterwideNetworkPolicy", "rule", "")
        assert "host_firewall" not in world.firewall.cli("status").stdout
    finally:
        world.firewall.stop()
        world.firewall.config_path.write_text(before)
    with Echo(node, 8024) as echoing, w.connect(NODE4, 8024) as login:
        served = echoing.accept()
        assert exchange(login, served, token())
        world.firewall.start()  # the connection is older than the firewall that now sees it
        assert exchange(login, served, token() * 1000)
