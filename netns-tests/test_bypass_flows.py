"""Established flows that the kernel carries: what still comes to the worker, and what cannot pass.

Evidence is the queue's own counter (packets that the kernel handed over), what both ends received,
and the worker's words.
"""

import contextlib

import datapath_rig
import pytest
from datapath_rig import Rule
from scapy.layers import inet
from traffic import (
    DEADLINE_S,
    FAMILIES,
    V4,
    Echo,
    carries,
    eventually,
    exchange,
    parsed,
    tcp,
    token,
)

from firewall.policy.verdict import DropReason

rig = datapath_rig.rig
pytestmark = pytest.mark.needs(
    "nfqueue", "nfqueue6", "tproxy", "socket", "connmark", "ipset", "set", "ipv6"
)

TCP, UDP = 6, 17
ENOUGH = 12
"""Exchanges after which a flow is the kernel's: see AFTER_COUNT in firewall/datapath/offload.py."""


def queued(rig) -> int:
    """Packets that the kernel has put into our queues."""
    return int(rig.kernel("print(sum(q.packet_count for q in kernel.read_queues()))"))


def marks(rig) -> list[int]:
    """The connmarks of the namespace that are not 0."""
    lines = rig.lab.node.run(["conntrack", "-L"], check=True).stdout.splitlines()
    lines += rig.lab.node.run(["conntrack", "-L", "-f", "ipv6"], check=True).stdout.splitlines()
    words = [word for line in lines for word in line.split() if word.startswith("mark=")]
    return [int(word[5:]) for word in words if word != "mark=0"]


@contextlib.contextmanager
def opened(rig, family=V4, **where):
    """A connection a -> b:80 that the kernel carries: client, server."""
    a, b = rig.lab.host("a"), rig.lab.host("b")
    with Echo(b, 80, family) as server, a.connect(b.address(family), 80, **where) as client:
        accepted = server.accept()
        for _ in range(ENOUGH):
            assert exchange(client, accepted, token())
        eventually(lambda: marks(rig), "the flow is marked")
        yield client, accepted


@pytest.fixture
def bypassing(rig):
    one = rig(bypass=True)
    one.start()
    one.publish(Rule("a", "b"))
    return one


@pytest.mark.parametrize("family", FAMILIES)
def test_data_of_an_established_connection_does_not_reach_the_queue(bypassing, family):
    with opened(bypassing, family) as (client, server):
        before = queued(bypassing)
        for _ in range(100):
            assert exchange(client, server, b"x" * 10_000)
        assert queued(bypassing) == before
    eventually(lambda: queued(bypassing) > before, "the FIN is queued")
    assert bypassing.drop_count() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_answered_datagrams_do_not_reach_the_queue(bypassing, family):
    a, b = bypassing.lab.host("a"), bypassing.lab.host("b")
    with a.datagram(family=family) as client, b.datagram(53, family=family) as server:
        client.settimeout(DEADLINE_S)
        server.settimeout(DEADLINE_S)

        def ask() -> None:
            client.sendto(b"question", (b.address(family), 53))
            _, peer = server.recvfrom(100)
            server.sendto(b"answer", peer)
            assert client.recv(100) == b"answer"

        for _ in range(ENOUGH):
            ask()
        eventually(lambda: marks(bypassing), "the flow is marked")
        before = queued(bypassing)
        for _ in range(100):
            ask()
        assert queued(bypassing) == before


def test_every_bit_outside_our_mask_stays_the_users(bypassing):
    """A user's rule marks the connection; ours adds its bits and takes them away again."""
    node = bypassing.lab.node
    rule = ["iptables", "-t", "mangle", "-A", "FORWARD", "-j", "CONNMARK"]
    node.run([*rule, "--set-xmark", "0x1234/0xffff"], check=True)
    with opened(bypassing) as (client, server):
        eventually(lambda: marks(bypassing) == [0x04001234], "both marks are there")
        bypassing.revoke(Rule("a", "b"))
        assert exchange(client, server, token())
        eventually(lambda: marks(bypassing) == [0x0C001234], "the next generation")
        bypassing.kernel("kernel.remove(config)")
        assert marks(bypassing) == [0x1234]


@pytest.mark.parametrize("flags", ["S", "SA", "R", "FA"])
def test_segments_that_open_or_end_a_connection_are_judged(bypassing, flags):
    """A blind segment of the flow's own ends, far from its window: queued, without effect."""
    a, b = bypassing.lab.host("a"), bypassing.lab.host("b")
    with opened(bypassing) as (client, server):
        before, dropped = queued(bypassing), bypassing.drop_count()
        port = client.getsockname()[1]
        blind = tcp(a, b, 80, source_port=port, flags=flags, seq=0x70000000, ack=0x70000000)
        a.send(bytes(blind))
        eventually(lambda: queued(bypassing) > before, "it is queued")
        if flags != "S":  # the host answers a SYN with a challenge (RFC 5961 section 4)
            eventually(lambda: bypassing.drop_count() > dropped, "it is dropped")
        for _ in range(100):
            assert exchange(client, server, token())


def test_data_outside_the_window_is_not_carried(bypassing):
    """What the kernel calls INVALID has no connmark; the worker trusts the kernel's numbers."""
    a, b = bypassing.lab.host("a"), bypassing.lab.host("b")
    with opened(bypassing) as (client, server), b.capture() as capture:
        payload, last = token(), token()
        port = client.getsockname()[1]
        wild = tcp(
            a, b, 80, source_port=port, flags="PA", seq=0x70000000, ack=0x70000000, payload=payload
        )
        a.send(bytes(wild))
        bypassing.dropped(DropReason.INVALID_PACKET_DROPPED, "the kernel has seen")
        assert exchange(client, server, last)
        capture.expect(carries(last), DEADLINE_S)
        assert not any(payload in data for data in capture.packets)


def test_a_known_tuple_from_another_interface_is_spoofed(rig):
    """The flow's own numbers do not help: its source lives elsewhere."""
    one = rig(hosts={"a": "app=a", "b": "app=b", "c": "app=c"}, bypass=True)
    one.start()
    one.publish(Rule("a", "b"))
    a, b, c = (one.lab.host(name) for name in "abc")
    with opened(one) as (client, server), b.capture() as capture:
        payload, first, last = token(), token(), token()
        assert exchange(client, server, first)
        header = parsed(capture.expect(carries(first), DEADLINE_S))[inet.TCP]
        lie = tcp(
            a, b, 80, source_port=header.sport, flags="PA", seq=header.seq, ack=header.ack,
            payload=payload,
        )  # fmt: skip
        before = queued(one)
        c.send(bytes(lie))
        one.dropped(DropReason.INVALID_SOURCE_IP)
        assert queued(one) == before + 1
        assert exchange(client, server, last)
        capture.expect(carries(last), DEADLINE_S)
        assert not any(payload in data for data in capture.packets)
