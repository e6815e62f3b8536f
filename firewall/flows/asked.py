"""A flow record as the question that its decision answered.

A record of a reply, or of a response, names the sides as they sent; the question is always who
opened the flow to whom. An ICMP reply was asked for by the request of its kind.
"""

from typing import NamedTuple
from urllib.parse import urlsplit

from conntrack.address import parse_address
from firewall.flows.flow import Flow, Layer4
from firewall.policy.course import CLEAR, Form
from firewall.policy.explanation import Request

TCP, UDP, SCTP, ICMP, ICMPV6 = 6, 17, 132, 1, 58
"""IANA protocol numbers."""

_REQUEST_OF = {(ICMP, 0): 8, (ICMPV6, 129): 128, (ICMP, 14): 13}
"""ICMP and ICMPv6 reply type -> the type that asked for it (RFC 792, RFC 4443)."""


class FlowQuestion(NamedTuple):
    """Source and destination (packed), protocol, port or ICMP type; the http request or None.

    `form`: how the connection began; None: the proxy did not need to know.
    """

    traffic: tuple[bytes, bytes, int, int]
    request: Request | None
    form: Form | None = None


def question_of(flow: Flow) -> FlowQuestion | None:
    """Return what was asked, None if the record has no addresses (an unreadable packet)."""
    if flow.ip is None or not flow.ip.source:
        return None
    source, destination = parse_address(flow.ip.source), parse_address(flow.ip.destination)
    protocol, ports = _ports(flow)
    if flow.is_reply:
        source, destination = destination, source
        ports = ports[1], ports[0]
    port = ports[1]
    if protocol in (ICMP, ICMPV6):
        port = _REQUEST_OF.get((protocol, port), port) if flow.is_reply else port
    return FlowQuestion((source, destination, protocol, port), _request(flow), _form(flow))


def _form(flow: Flow) -> Form | None:
    """Return how a connection began of which the proxy saw it; None: it did not look, or not yet.

    What began as something else than clear text or a valid hello is left out.
    """
    said = flow.extensions.value if flow.extensions is not None else None
    if flow.l7 is None or said is None:
        return None
    if flow.l7.http is not None:
        secure = flow.l7.http.url.startswith("https://")
        return Form(tls=True, server_name=said.server_name) if secure else None
    if said.layer7 == "TLS" and "client_hello" not in said.detail:
        return Form(tls=True, server_name=said.server_name)
    return CLEAR if said.layer7 == "TCP" and "client_hello" not in said.detail else None


def _ports(flow: Flow) -> tuple[int, tuple[int, int]]:
    """Return the protocol and both ports; of ICMP the type stands for both."""
    layer4 = flow.l4 or Layer4()
    for protocol, layer in ((TCP, layer4.tcp), (UDP, layer4.udp), (SCTP, layer4.sctp)):
        if layer is not None:
            return protocol, (layer.source_port, layer.destination_port)
    for protocol, message in ((ICMP, layer4.icmpv4), (ICMPV6, layer4.icmpv6)):
        if message is not None:
            return protocol, (message.type, message.type)
    protocol = flow.extensions.value.protocol if flow.extensions is not None else 0
    return protocol, (0, 0)


def _request(flow: Flow) -> Request | None:
    http = flow.l7.http if flow.l7 is not None else None
    if http is None or not http.method:
        return None
    url = urlsplit(http.url)
    path = url.path + (f"?{url.query}" if url.query else "")
    headers = [(h.key.encode("latin-1"), h.value.encode("latin-1")) for h in http.headers]
    return Request(
        http.method.encode("latin-1"),
        path.encode("latin-1", "replace"),
        url.netloc.encode("latin-1", "replace"),
        tuple(headers),
    )
