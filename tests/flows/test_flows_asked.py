"""A record as a question: who opened the flow to whom, whichever packet the record is about."""

import msgspec
import pytest

from conntrack.address import parse_address
from firewall.flows.asked import question_of
from firewall.flows.flow import (
    Addresses,
    Explanation,
    Extensions,
    Flow,
    Http,
    HttpHeader,
    Icmp,
    Layer4,
    Layer7,
    Ports,
    Tcp,
)
from firewall.policy.course import CLEAR, Form

A, B = parse_address("10.0.0.1"), parse_address("10.0.0.2")
THERE = Addresses(source="10.0.0.1", destination="10.0.0.2")
BACK = Addresses(source="10.0.0.2", destination="10.0.0.1")


@pytest.mark.parametrize(
    ("flow", "traffic"),
    [
        (Flow(ip=THERE, l4=Layer4(tcp=Tcp(4000, 80))), (A, B, 6, 80)),
        (Flow(ip=THERE, l4=Layer4(udp=Ports(4000, 53)), is_reply=False), (A, B, 17, 53)),
        (Flow(ip=BACK, l4=Layer4(udp=Ports(53, 4000)), is_reply=True), (A, B, 17, 53)),
        (Flow(ip=THERE, l4=Layer4(sctp=Ports(1, 9))), (A, B, 132, 9)),
        (Flow(ip=THERE, l4=Layer4(icmpv4=Icmp(8))), (A, B, 1, 8)),
        (Flow(ip=BACK, l4=Layer4(icmpv4=Icmp(0)), is_reply=True), (A, B, 1, 8)),
        (Flow(ip=BACK, l4=Layer4(icmpv6=Icmp(129)), is_reply=True), (A, B, 58, 128)),
        (Flow(ip=THERE, l4=Layer4(icmpv4=Icmp(0))), (A, B, 1, 0)),
        (Flow(ip=THERE, extensions=Extensions(Explanation(protocol=47))), (A, B, 47, 0)),
    ],
)
def test_the_question_is_who_opened_the_flow(flow, traffic):
    """A reply is turned round; an echo reply was asked for by an echo request."""
    found = question_of(flow)
    assert found == (traffic, None, None)


@pytest.mark.parametrize("response", [False, True])
def test_a_request_and_its_response_ask_the_same(response):
    """The record of a response names the server as the source."""
    http = Http(
        method="PUT",
        url="http://b.x:8080/v1/x?y=1",
        headers=(HttpHeader("user-agent", "curl"),),
    )
    flow = Flow(
        ip=BACK if response else THERE,
        l4=Layer4(tcp=Tcp(80, 4000) if response else Tcp(4000, 80)),
        l7=Layer7(type="RESPONSE" if response else "REQUEST", http=http),
        is_reply=response,
    )
    traffic, request, form = question_of(flow)
    assert form is None
    assert traffic == (A, B, 6, 80)
    assert request == (b"PUT", b"/v1/x?y=1", b"b.x:8080", ((b"user-agent", b"curl"),))


def test_an_unreadable_packet_asks_nothing():
    """It has no addresses."""
    assert question_of(Flow()) is None
    assert question_of(msgspec.structs.replace(Flow(), ip=Addresses())) is None


@pytest.mark.parametrize(
    ("said", "url", "form"),
    [
        (Explanation(server_name="a.b"), "https://a.b/", Form(tls=True, server_name="a.b")),
        (Explanation(), "http://a.b/", None),
        (Explanation(layer7="TLS", server_name="a.b"), "", Form(tls=True, server_name="a.b")),
        (Explanation(layer7="TLS", detail="server_name_denied"), "", Form(tls=True)),
        (Explanation(layer7="TCP", detail="clear_text_denied"), "", CLEAR),
        (Explanation(layer7="TLS", detail="client_hello_refused{x}"), "", None),
    ],
)
def test_how_a_proxied_connection_began_is_asked_again(said, url, form):
    http = Http(method="GET", url=url) if url else None
    flow = Flow(
        ip=THERE,
        l4=Layer4(tcp=Tcp(4000, 443)),
        l7=Layer7(type="REQUEST", http=http),
        extensions=Extensions(said),
    )
    assert question_of(flow).form == form
