"""TCP, UDP and ICMP of both families, allowed and denied: seen from both ends and in the record."""

import pytest
from evidence import dropped, forwarded
from rules import echo_requests, peers, policy, ports
from traffic import FAMILIES, Echo, carries, delivered, echo, exchange, is_tcp, tcp, token, udp

FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=["ipv4", "ipv6"])

OPEN = policy("app=b", ingress=[{**peers("app=a"), **ports("80/TCP", "53/UDP")}])
PING = policy("app=b", ingress=[{**peers("app=a"), **echo_requests()}])


@pytest.fixture(scope="module")
def running(module_lab, module_bartizan):
    made = module_lab(a="app=a", b="app=b", c="app=c")
    made.firewall = module_bartizan(made)
    return made


@pytest.fixture
def three(running):
    """Hosts a, b, c under a running firewall; policies are up to the test."""
    running.firewall.clear()
    return running


@FAMILY
def test_without_a_policy_everything_passes(three, family):
    """Default enforcement: an endpoint that no policy selects is not isolated."""
    a, b = three.host("a"), three.host("b")
    for sender, receiver, build in (
        (a, b, lambda payload: udp(a, b, 9, payload, family=family)),
        (b, a, lambda payload: udp(b, a, 9, payload, family=family)),
        (a, b, lambda payload: echo(a, b, payload, family=family)),
    ):
        payload = token()
        delivered(sender, receiver, build(payload), payload)


@FAMILY
def test_tcp_from_an_allowed_peer_connects_and_carries_data_both_ways(three, family):
    """The handshake, the data and the flow record agree."""
    three.firewall.apply(OPEN)
    a, b = three.host("a"), three.host("b")
    with Echo(b, 80, family) as server, a.connect(b.address(family), 80) as client:
        connection = server.accept()
        assert connection.getpeername()[0] == a.address(family)
        assert exchange(client, connection, token() * 1000)
        port = client.getsockname()[1]
        forwarded(three.firewall, tcp(a, b, 80, family=family, source_port=port))


@FAMILY
def test_tcp_from_another_peer_ends_at_the_node(three, family):
    """The SYN never reaches b, no answer reaches c, the record says POLICY_DENIED."""
    three.firewall.apply(OPEN)
    b, c = three.host("b"), three.host("c")
    syn = tcp(c, b, 80, family=family)
    with Echo(b, 80, family), b.capture() as at_b, c.capture() as at_c:
        c.send(bytes(syn))
        record = dropped(three.firewall, syn)
    assert record["source"]["pod_name"] == "c"
    assert record["destination"]["pod_name"] == "b"
    assert record["traffic_direction"] == "INGRESS"
    assert record["l4"]["TCP"]["flags"] == {"SYN": True}
    assert not [p for p in at_b.so_far() if is_tcp(port=80)(p)]
    assert not [p for p in at_c.so_far() if is_tcp(source_port=80)(p)]


@FAMILY
def test_tcp_to_a_port_that_the_rule_does_not_name_is_dropped(three, family):
    """The peer is right, the port is not."""
    three.firewall.apply(OPEN)
    a, b = three.host("a"), three.host("b")
    syn = tcp(a, b, 81, family=family)
    a.send(bytes(syn))
    dropped(three.firewall, syn)


@FAMILY
def test_udp_is_allowed_and_denied_by_peer_and_port(three, family):
    """a:53 arrives unchanged; a:54 and c:53 do not."""
    three.firewall.apply(OPEN)
    a, b, c = (three.host(name) for name in "abc")
    kept = [(a, udp(a, b, 54, token(), family=family)), (c, udp(c, b, 53, token(), family=family))]
    with b.capture() as at_b:
        for sender, packet in kept:
            sender.send(bytes(packet))
            dropped(three.firewall, packet)
        payload = token()
        passed = udp(a, b, 53, payload, family=family)
        a.send(bytes(passed))
        at_b.expect(carries(payload))
        forwarded(three.firewall, passed)
        seen = at_b.so_far()
    for _, packet in kept:
        assert not any(carries(bytes(packet.lastlayer()))(data) for data in seen)


@FAMILY
def test_echo_requests_are_allowed_by_type_and_their_replies_need_no_rule(three, family):
    """a's ping is answered by b's kernel; c's is dropped; a's UDP is, too."""
    three.firewall.apply(PING)
    a, b, c = (three.host(name) for name in "abc")
    with a.capture() as at_a:
        payload = token()
        a.send(bytes(echo(a, b, payload, family=family)))
        at_a.expect(carries(payload))
    denied = echo(c, b, token(), family=family)
    c.send(bytes(denied))
    dropped(three.firewall, denied)
    datagram = udp(a, b, 53, token(), family=family)
    a.send(bytes(datagram))
    dropped(three.firewall, datagram)


@FAMILY
def test_egress_policy_is_enforced_at_the_sender(three, family):
    """a may reach c:53 only; the record names EGRESS."""
    selector = [{"matchLabels": {"app": "c"}}]
    rule = policy("app=a", egress=[{"toEndpoints": selector, **ports("53/UDP")}])
    three.firewall.apply(rule)
    a, b, c = (three.host(name) for name in "abc")
    payload = token()
    delivered(a, c, udp(a, c, 53, payload, family=family), payload)
    denied = udp(a, b, 53, token(), family=family)
    a.send(bytes(denied))
    assert dropped(three.firewall, denied)["traffic_direction"] == "EGRESS"


@FAMILY
def test_a_deny_rule_beats_an_allow_rule(three, family):
    """Cilium: deny policies take precedence; the reason is POLICY_DENY."""
    three.firewall.apply(
        policy(
            "app=b", ingress=[peers("app=a", "app=c")], deny=[{**peers("app=c"), **ports("53/UDP")}]
        )
    )
    a, b, c = (three.host(name) for name in "abc")
    payload = token()
    delivered(a, b, udp(a, b, 53, payload, family=family), payload)
    denied = udp(c, b, 53, token(), family=family)
    c.send(bytes(denied))
    dropped(three.firewall, denied, "POLICY_DENY")
    payload = token()
    delivered(c, b, udp(c, b, 54, payload, family=family), payload)


def test_the_node_reaches_its_endpoints_whatever_their_policy_says(three):
    """allow-localhost=always: health checks must not depend on policy."""
    three.firewall.apply(policy("app=b", ingress=[{}]))
    done = three.node.run(["ping", "-c1", "-W5", three.host("b").address4])
    assert done.returncode == 0, done.stdout
