"""Replies, forged sources and what nobody asked for."""

import pytest
from evidence import dropped, flow, of
from rules import policy, ports
from traffic import (
    FAMILIES,
    V4,
    Echo,
    carries,
    delivered,
    echo,
    exchange,
    fresh_port,
    is_tcp,
    tcp,
    token,
    udp,
)

from lab.topology import HostPlan, Topology, assigned

FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=["ipv4", "ipv6"])

SHUT = policy("app=a", ingress=[{}])
"""a is isolated for INGRESS and nothing is allowed: only replies may reach it."""


PLAN = assigned(
    Topology(
        hosts=(
            *(HostPlan(name=name, labels={"app": name}) for name in "abc"),
            HostPlan(name="outside", managed=False, addresses=("203.0.113.7", "2001:db8::7")),
        )
    )
)


@pytest.fixture(scope="module")
def running(module_lab, module_bartizan):
    made = module_lab(PLAN)
    made.firewall = module_bartizan(made)
    return made


@pytest.fixture
def three(running):
    """Hosts a (shut), b, c under a running firewall, and one outside."""
    running.firewall.clear()
    running.firewall.apply(SHUT)
    return running


@FAMILY
def test_a_datagrams_reply_needs_no_rule(three, family):
    """a asks b by UDP; the answer to that port reaches a, which allows nothing."""
    a, b = three.host("a"), three.host("b")
    port = fresh_port()
    payload = token()
    delivered(a, b, udp(a, b, 53, payload, family=family, source_port=port), payload)
    answer = token()
    reply = udp(b, a, port, answer, family=family, source_port=53)
    delivered(b, a, reply, answer)


@FAMILY
def test_a_connection_that_the_shut_host_opens_carries_data_both_ways(three, family):
    """Replies of TCP, from the SYN-ACK to the last byte."""
    a, b = three.host("a"), three.host("b")
    with Echo(b, 80, family) as server, a.connect(b.address(family), 80) as client:
        assert exchange(client, server.accept(), token() * 5000)


@FAMILY
def test_a_datagram_that_nobody_asked_for_is_dropped(three, family):
    """From the port of a service, to another port than the asker's."""
    a, b = three.host("a"), three.host("b")
    port = fresh_port()
    payload = token()
    delivered(a, b, udp(a, b, 53, payload, family=family, source_port=port), payload)
    for unasked in (
        udp(b, a, port + 1, token(), family=family, source_port=53),
        udp(b, a, port, token(), family=family, source_port=54),
    ):
        b.send(bytes(unasked))
        dropped(three.firewall, unasked)


@FAMILY
@pytest.mark.parametrize("flags", ["SA", "A", "R", "FA", "RA", "PA"])
def test_a_segment_of_no_connection_is_dropped(three, family, flags):
    """What looks like a reply is none when nothing was asked."""
    a, b = three.host("a"), three.host("b")
    segment = tcp(b, a, 4000, family=family, source_port=80, flags=flags, seq=7, ack=9)
    with a.capture() as at_a:
        b.send(bytes(segment))
        dropped(three.firewall, segment, None)
    assert not [p for p in at_a.so_far() if is_tcp(source_port=80)(p)]


@FAMILY
def test_an_echo_reply_to_no_request_is_dropped(three, family):
    """Also one with the number of somebody else's request."""
    a, b = three.host("a"), three.host("b")
    unasked = echo(b, a, token(), family=family, reply=True)
    b.send(bytes(unasked))
    dropped(three.firewall, unasked, None)


@FAMILY
def test_an_icmp_error_about_a_flow_arrives_and_one_about_nothing_is_dropped(three, family):
    """b's kernel answers a's datagram to a closed port by an error, which quotes it."""
    a, b = three.host("a"), three.host("b")
    payload = token()
    with a.capture() as at_a:
        a.send(bytes(udp(a, b, 4999, payload, family=family)))
        # RFC 792 / 4443: the error quotes the datagram that caused it, payload included.
        at_a.expect(lambda data: payload in data and _is_error(data))
    forged = bytes(udp(a, b, 4998, token(), family=family))
    error = _error_about(b, a, forged, family)
    b.send(bytes(error))
    dropped(three.firewall, error, None)


def _is_error(data: bytes) -> bool:
    return data[9] == 1 if data[0] >> 4 == 4 else data[6] == 58


def _error_about(source, destination, quoted, family):
    from scapy.layers.inet import ICMP
    from scapy.layers.inet6 import ICMPv6DestUnreach
    from scapy.packet import Raw
    from traffic import ip

    message = ICMP(type=3, code=3) if family == V4 else ICMPv6DestUnreach(code=4)
    return ip(source, destination, family) / message / Raw(quoted)


@FAMILY
def test_a_source_address_that_is_not_the_senders_is_dropped_as_invalid_source(three, family):
    """a's link with c's address: no identity is lent (Cilium's `Invalid source ip`)."""
    a, b, c = (three.host(name) for name in "abc")
    payload = token()
    spoofed = udp(c, b, 53, payload, family=family)
    with b.capture() as at_b:
        a.send(bytes(spoofed))
        dropped(three.firewall, spoofed, "INVALID_SOURCE_IP")
        honest = token()
        c.send(bytes(udp(c, b, 53, honest, family=family)))
        at_b.expect(carries(honest))
        assert not [p for p in at_b.so_far() if payload in p]


@FAMILY
def test_a_source_address_of_nobody_is_dropped_as_invalid_source_too(three, family):
    """Not only addresses of other endpoints: a link has its own and no other."""
    a, b = three.host("a"), three.host("b")
    nobody = "198.51.100.9" if family == V4 else "2001:db8::9"
    spoofed = udp(nobody, b, 53, token(), family=family)
    a.send(bytes(spoofed))
    dropped(three.firewall, spoofed, "INVALID_SOURCE_IP")


def test_a_spoofed_reply_does_not_ride_on_an_established_flow(three):
    """a talks to b; c answers in b's name from its own link: invalid source, a sees nothing."""
    a, b, c = (three.host(name) for name in "abc")
    port = fresh_port()
    payload = token()
    delivered(a, b, udp(a, b, 53, payload, source_port=port), payload)
    lie = token()
    forged = udp(b, a, port, lie, source_port=53)
    with a.capture() as at_a:
        c.send(bytes(forged))
        flow(three.firewall, of(forged), verdict="DROPPED", reason="INVALID_SOURCE_IP")
        truth = token()
        b.send(bytes(udp(b, a, port, truth, source_port=53)))
        at_a.expect(carries(truth))
        assert not [p for p in at_a.so_far() if lie in p]


@FAMILY
def test_the_world_is_under_policy_as_every_peer(three, family):
    """An unmanaged host has the identity world: its packets need a rule for world."""
    world = {"fromEntities": ["world"], **ports("53/UDP")}
    three.firewall.apply(policy("app=b", ingress=[world]))
    outside, b = three.host("outside"), three.host("b")
    payload = token()
    delivered(outside, b, udp(outside, b, 53, payload, family=family), payload)
    denied = udp(outside, b, 54, token(), family=family)
    outside.send(bytes(denied))
    record = dropped(three.firewall, denied)
    assert "reserved:world" in " ".join(record["source"]["labels"])
