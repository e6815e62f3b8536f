"""The rest of Cilium's policy language on real packets: protocols, modes, reports, objects."""

import policy_world
import pytest
import yaml
from policy_world import NODE4, bare, listens, sctp
from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6PacketTooBig
from scapy.layers.sctp import SCTP
from traffic import V4, V6, Echo, curl, echo, eventually, exchange, ip, tcp, token, udp

from lab.daemon import ApiRefused

pytestmark = pytest.mark.needs("veth", "nfqueue", "nfqueue6", "tproxy", "socket", "ipset", "ipv6")

running = policy_world.running
world = policy_world.world

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
    eventually(lambda: listens(b, b.address4, 80), "the server listens")
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
    eventually(lambda: listens(b, b.address4, 81), "the server listens")
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
        'spec:\n  endpointSelector: {matchLabels: {app: b, mode: "on"}}\n'
        "  enableDefaultDeny: {ingress: on}\n  ingress: [{}]\n"
    )
    world.firewall.apply(text)
    shown = world.firewall.cli("policy", "get", "r", "-o", "yaml").stdout
    assert yaml.safe_load(shown)["spec"]["enableDefaultDeny"] == {"ingress": True}
    assert yaml.safe_load(shown)["spec"]["endpointSelector"]["matchLabels"]["mode"] == "on"
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
