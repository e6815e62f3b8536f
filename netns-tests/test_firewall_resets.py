"""Connections that are older than an L7 rule for them end at both ends, and at once."""

import socket
from contextlib import suppress

import pytest
from rules import peers, policy, ports
from traffic import DEADLINE_S, FAMILIES, Echo, eventually, exchange, token

pytestmark = pytest.mark.needs("tproxy", "socket", "connmark", "ipv6")

TCP_CLOSE = 7
"""linux/net/tcp_states.h."""

DIRECT = policy("app=b", ingress=[{**peers("app=a"), **ports("80/TCP")}])
HTTP = policy(
    "app=b", ingress=[{**peers("app=a"), **ports("80/TCP", http=[{"path": "/public/.*"}])}]
)


@pytest.fixture
def two(lab, bartizan):
    """a may reach b."""
    made = lab(a="app=a", b="app=b")
    made.firewall = bartizan(made)
    return made


def is_reset(connection: socket.socket) -> bool:
    """RST closes a connection at once, FIN would leave it in CLOSE_WAIT (TCP_INFO, tcp(7))."""
    state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state == TCP_CLOSE


@pytest.mark.parametrize("speaker", ["client", "server"])
@pytest.mark.parametrize("family", FAMILIES, ids=["ipv4", "ipv6"])
def test_both_ends_of_an_older_connection_are_reset_whoever_speaks(two, family, speaker):
    """Also when the kernel carried it, and also the end that only listens; another one is fine."""
    a, b, firewall = two.host("a"), two.host("b"), two.firewall
    firewall.apply(DIRECT)
    with Echo(b, 80, family) as server, a.connect(b.address(family), 80) as client:
        accepted = server.accept()
        for _ in range(20):  # long enough for the kernel to carry it
            assert exchange(client, accepted, token())
        firewall.apply(HTTP)
        with suppress(ConnectionResetError):  # a late acknowledgment may have been its end already
            (client if speaker == "client" else accepted).send(b"are you there?")
        for end in (client, accepted):
            eventually(lambda end=end: is_reset(end), "the end is told")
        with a.connect(b.address(family), 80) as another:
            another.sendall(b"GET /other HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n")
            another.settimeout(DEADLINE_S)
            assert another.recv(100).startswith(b"HTTP/1.1 403 ")

    def is_recorded() -> bool:
        reasons = (flow.get("drop_reason_desc", "") for flow in firewall.flows())
        return any(reason.startswith("PROXY_REDIRECTION") for reason in reasons)

    eventually(is_recorded, "the drop is recorded")


@pytest.mark.parametrize(
    ("family", "carried"), [(FAMILIES[0], True), (FAMILIES[1], False)], ids=["carried", "seen"]
)
def test_a_connection_on_which_nobody_speaks_is_reset_too(two, family, carried):
    """Also when the kernel carries it; one that may go on directly is not disturbed."""
    a, b, firewall = two.host("a"), two.host("b"), two.firewall
    firewall.apply(policy("app=b", ingress=[{**peers("app=a"), **ports("80/TCP", "81/TCP")}]))
    with (
        Echo(b, 80, family) as server, a.connect(b.address(family), 80) as client,
        Echo(b, 81, family) as other, a.connect(b.address(family), 81) as kept,
    ):  # fmt: skip
        accepted, there = server.accept(), other.accept()
        for _ in range(20 if carried else 1):
            assert exchange(client, accepted, token())
            assert exchange(kept, there, token())
        http = {**peers("app=a"), **ports("80/TCP", http=[{"path": "/public/.*"}])}
        firewall.apply(policy("app=b", ingress=[http, {**peers("app=a"), **ports("81/TCP")}]))
        for end in (client, accepted):
            eventually(lambda end=end: is_reset(end), "the end is told")
        assert exchange(kept, there, token())
