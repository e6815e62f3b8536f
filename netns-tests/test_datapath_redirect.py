"""Redirected flows: the kernel hands them to a transparent listener, whatever state they are in."""

import socket
import struct

import datapath_rig
import pytest
from datapath_rig import Rule
from traffic import DEADLINE_S, FAMILIES, V4, Echo, eventually, exchange, is_tcp, tcp, token

from firewall.datapath.marks import Kind, Marks
from firewall.policy.snapshot import Settings
from firewall.policy.verdict import DropReason, Verdict

rig = datapath_rig.rig
pytestmark = pytest.mark.needs("nfqueue", "nfqueue6", "tproxy", "socket", "ipset", "set", "ipv6")

TCP = 6
PORT = 10080
IP_TRANSPARENT = 19  # linux/in.h
IPV6_TRANSPARENT = 75  # linux/in6.h
SO_MARK = 36


def transparent(machine, family) -> socket.socket:
    """A socket as the proxy has them: transparent, marked FROM_PROXY."""
    one = machine.open_socket(family, socket.SOCK_STREAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.setsockopt(socket.SOL_SOCKET, SO_MARK, Marks().of(Kind.FROM_PROXY).value)
    if family == V4:
        one.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    else:
        one.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    one.settimeout(DEADLINE_S)
    return one


class Proxy:
    """A transparent listener in the node, on loopback, and its connections."""

    def __init__(self, rig, family) -> None:
        self.node = rig.lab.node
        self.family = family
        self.listener = transparent(self.node, family)
        self.listener.bind(("127.0.0.1" if family == V4 else "::1", PORT))
        self.listener.listen()
        self.opened = [self.listener]

    def accept(self) -> socket.socket:
        connection, _ = self.listener.accept()
        connection.settimeout(DEADLINE_S)
        self.opened.append(connection)
        return connection

    def upstream(self, downstream: socket.socket) -> socket.socket:
        """Connect to where the client wanted to go, from the client's address."""
        one = transparent(self.node, self.family)
        self.opened.append(one)
        one.bind((downstream.getpeername()[0], 0))
        one.connect(downstream.getsockname()[:2])
        return one

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for one in self.opened:
            one.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_redirected_connection_reaches_the_proxy_and_the_server_sees_the_client(rig, family):
    one = rig(proxy_port=PORT)
    one.start()
    one.publish(Rule("a", "b", TCP, (80, 80), http=True))
    a, b = one.lab.host("a"), one.lab.host("b")
    with Proxy(one, family) as proxy, Echo(b, 80, family) as server:
        client = a.connect(b.address(family), 80)
        downstream = proxy.accept()
        assert downstream.getsockname()[:2] == (b.address(family), 80)
        assert downstream.getpeername()[:2] == client.getsockname()[:2]
        assert exchange(client, downstream, b"d" * 50_000)
        upstream = proxy.upstream(downstream)
        accepted = server.accept()
        assert accepted.getpeername()[0] == a.address(family)
        assert exchange(upstream, accepted, b"u" * 50_000)
        client.close()
    event = one.event(lambda e: e.verdict == Verdict.REDIRECT)
    assert (event.proxy_port, event.destination_port) == (PORT, 80)
    assert one.drop_count() == 0
    # Only the first packet asks the worker: the rest finds its socket in the kernel.
    assert one.metric("proxy_redirected_count_total") <= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_node_itself_is_redirected_too(rig, family):
    """The packet is routed again after OUTPUT, to loopback, where TPROXY waits."""
    one = rig(proxy_port=PORT, settings=Settings(allow_localhost="policy"))
    one.start()
    one.publish(Rule(None, "b", TCP, (80, 80), http=True))
    b = one.lab.host("b")
    with Proxy(one, family) as proxy, Echo(b, 80, family) as server:
        client = one.lab.node.connect(b.address(family), 80)
        downstream = proxy.accept()
        assert downstream.getsockname()[:2] == (b.address(family), 80)
        assert exchange(client, downstream, b"d" * 5_000)
        upstream = proxy.upstream(downstream)
        accepted = server.accept()
        assert exchange(upstream, accepted, b"u" * 5_000)
        client.close()
    assert one.drop_count() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_listener_the_connection_does_not_pass_directly(rig, family):
    one = rig(proxy_port=PORT)
    one.start()
    one.publish(Rule("a", "b", TCP, (80, 80), http=True))
    a, b = one.lab.host("a"), one.lab.host("b")
    with Echo(b, 80, family) as server:
        with pytest.raises((TimeoutError, ConnectionError)):
            a.connect(b.address(family), 80, timeout_s=1.0)
        server.server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_rules_that_need_a_proxy_are_closed_while_there_is_none(rig):
    one = rig(proxy_port=0)
    one.start()
    one.publish(Rule("a", "b", TCP, (80, 80), http=True))
    a, b = one.lab.host("a"), one.lab.host("b")
    with Echo(b, 80), pytest.raises(TimeoutError):
        a.connect(b.address4, 80, timeout_s=0.5)
    one.dropped(DropReason.PROXY_REDIRECTION_NOT_SUPPORTED_FOR_PROTOCOL, "no proxy")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_segment_without_a_flow_is_dropped_recorded_and_not_answered(rig, family):
    """The proxy's kernel would reset it; a stranger's segment is no reason to speak."""
    one = rig(proxy_port=PORT)
    one.start()
    one.publish(Rule("a", "b", TCP, (80, 80), http=True))
    a, b = one.lab.host("a"), one.lab.host("b")
    where = {"family": family, "source_port": 4100, "seq": 7, "ack": 9}
    with Proxy(one, family), a.capture() as capture:
        for flags in ("A", "PA"):
            a.send(bytes(tcp(a, b, 80, **where, flags=flags, payload=token())))
        event = one.dropped(DropReason.INVALID_PACKET_DROPPED, "a flow begins with SYN", 2)
        assert (event.source_port, event.destination_port) == (4100, 80)
        # What would be an answer comes on the way of one that is.
        a.connect(b.address(family), 80).close()
        capture.expect(is_tcp(source_port=80, flags="SA"))
        assert not [data for data in capture.so_far() if is_tcp(port=4100)(data)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_direct_connection_that_now_needs_the_proxy_is_reset_at_both_ends(rig, family):
    one = rig(proxy_port=PORT)
    one.start()
    one.publish(Rule("a", "b", TCP, (80, 80)))
    a, b = one.lab.host("a"), one.lab.host("b")
    with Proxy(one, family), Echo(b, 80, family) as server:
        client = a.connect(b.address(family), 80)
        accepted = server.accept()
        assert exchange(client, accepted, b"direct")
        one.publish(Rule("a", "b", TCP, (80, 80), http=True))
        accepted.settimeout(DEADLINE_S)
        with pytest.raises(ConnectionResetError):
            client.send(b"more")
            client.recv(10)
        with pytest.raises(ConnectionResetError):
            accepted.recv(10)
        client.close()
    one.dropped(DropReason.PROXY_REDIRECTION_NOT_SUPPORTED_FOR_PROTOCOL, "older than the L7 rules")


def test_the_server_cannot_speak_into_a_proxied_connection(rig):
    one = rig(proxy_port=PORT)
    one.start()
    one.publish(Rule("a", "b", TCP, (80, 80), http=True))
    a, b = one.lab.host("a"), one.lab.host("b")
    with Proxy(one, V4) as proxy:
        client = a.connect(b.address4, 80)
        proxy.accept()
        port = client.getsockname()[1]
        b.send(bytes(tcp(b, a, port, source_port=80, flags="SA", seq=1, ack=1)))
        b.send(bytes(tcp(b, a, port, source_port=80, flags="A", seq=1, ack=1)))
        one.dropped(DropReason.INVALID_PACKET_DROPPED, count=2)
        client.close()


def test_a_neighbour_cannot_speak_into_a_proxied_connection(rig):
    """The socket rule does not let a forged source around the worker."""
    one = rig(proxy_port=PORT, hosts={"a": "app=a", "b": "app=b", "c": "app=c"})
    one.start()
    one.publish(Rule("a", "b", TCP, (80, 80), http=True))
    a, b, c = (one.lab.host(name) for name in "abc")
    with Proxy(one, V4) as proxy:
        client = a.connect(b.address4, 80)
        downstream = proxy.accept()
        port = client.getsockname()[1]
        c.send(bytes(tcp(a, b, 80, source_port=port, flags="R", seq=1)))
        one.dropped(DropReason.INVALID_SOURCE_IP)
        assert exchange(client, downstream, b"alive")
        client.close()


def test_a_new_connection_from_the_same_port_reaches_the_proxy_again(rig):
    one = rig(proxy_port=PORT)
    one.start()
    one.publish(Rule("a", "b", TCP, (80, 80), http=True))
    a, b = one.lab.host("a"), one.lab.host("b")
    reset_on_close = struct.pack("ii", 1, 0)  # struct linger: no TIME_WAIT on the client
    with Proxy(one, V4) as proxy:
        for _ in range(3):
            client = a.connect(b.address4, 80, source_port=4242)
            downstream = proxy.accept()
            assert exchange(client, downstream, b"again")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_on_close)
            client.close()
            eventually(lambda peer=downstream: _is_over(peer), "the proxy sees the end")


def _is_over(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_other_bits_of_the_mark_survive_a_redirect(rig):
    one = rig(proxy_port=PORT)
    one.start()
    one.publish(Rule("a", "b", TCP, (80, 80), http=True))
    a, b = one.lab.host("a"), one.lab.host("b")
    raw = [
        "iptables",
        "-t",
        "raw",
        "-A",
        "PREROUTING",
        "-p",
        "tcp",
        "-j",
        "MARK",
        "--set-mark",
        "5",
    ]
    one.lab.node.run(raw, check=True)
    count = ["iptables", "-t", "filter", "-A", "INPUT", "-p", "tcp", "--dport", "80", "-m", "mark"]
    one.lab.node.run([*count, "--mark", "0x2000005", "-j", "ACCEPT"], check=True)
    with Proxy(one, V4) as proxy:
        client = a.connect(b.address4, 80)
        proxy.accept()
        client.close()
    shown = one.lab.node.run(["iptables", "-nvxL", "INPUT"], check=True).stdout
    packets = int(shown.splitlines()[2].split()[0])
    assert packets >= 2, shown
