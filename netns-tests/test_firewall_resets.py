"""Connections that are older than an L7 rule for them end at both ends, and at once."""

import socket
from contextlib import suppress

import pytest
from rules import peers, policy, ports
from traffic import DEADLINE_S, FAMILIES, V4, V6, Echo, eventually, exchange, token

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
    ("family", "speaker"), [(V4, "client"), (V6, "server"), (V4, "nobody")],
    ids=["ipv4-client", "ipv6-server", "ipv4-nobody"],
)  # fmt: skip
def test_both_ends_are_reset_where_both_are_translated(two, family, speaker):
    """A service that is masqueraded, too: neither end knows the other's address."""
    a, b, firewall = two.host("a"), two.host("b"), two.firewall
    service = {V4: "10.96.0.10", V6: "fd00:96::10"}[family]
    program, there = ("iptables", b.address4) if family == V4 else ("ip6tables", f"[{b.address6}]")
    dialed = ["-A", "PREROUTING", "-d", service, "-p", "tcp", "--dport", "8000"]
    hidden = ["-A", "POSTROUTING", "-o", b.interface, "-j", "MASQUERADE"]
    if family == V6:  # what is hidden behind must be an address of the node
        two.node.run(["ip", "address", "add", "fd00:77::1/128", "dev", "lo"], check=True)
    for rule in ([*dialed, "-j", "DNAT", "--to", f"{there}:80"], hidden):
        two.node.run([program, "-t", "nat", *rule], check=True)
    firewall.apply(DIRECT)
    with Echo(b, 80, family) as server, a.connect(service, 8000) as client:
        accepted = server.accept()
        assert accepted.getpeername()[0] != a.address(family)
        for _ in range(20):
            assert exchange(client, accepted, token())
        firewall.apply(HTTP)
        if speaker != "nobody":
            with suppress(ConnectionResetError):
                (client if speaker == "client" else accepted).send(b"are you there?")
        for end in (client, accepted):
            eventually(lambda end=end: is_reset(end), "the end is told")


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
