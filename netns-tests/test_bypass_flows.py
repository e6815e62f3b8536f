"""Established flows that the kernel carries: what still comes to the worker, and what cannot pass.

Evidence is the counter of our NFQUEUE rules, what both ends received, and the worker's words.
"""

import contextlib
import json
import os
import signal
import time

import datapath_rig
import pytest
from datapath_rig import Rule
from evidence import count_link_messages, queued, stopped
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
    udp,
)

from firewall.datapath.marks import Marks
from firewall.datapath.offload import AGAIN_COUNT
from firewall.policy.verdict import DropReason

rig = datapath_rig.rig
pytestmark = pytest.mark.needs(
    "nfqueue", "nfqueue6", "tproxy", "socket", "connmark", "ipset", "set", "ipv6"
)

TCP, UDP = 6, 17
ENOUGH = 12
"""Exchanges after which a flow is the kernel's: see AFTER_COUNT in firewall/datapath/offload.py."""


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
    count_link_messages(one.lab.node)
    one.start()
    one.publish(Rule("a", "b"))
    return one


@pytest.mark.parametrize("family", FAMILIES)
def test_data_of_an_established_connection_does_not_reach_the_queue(bypassing, family):
    with opened(bypassing, family) as (client, server):
        before = queued(bypassing.lab.node, family)
        for _ in range(100):
            assert exchange(client, server, b"x" * 10_000)
        assert queued(bypassing.lab.node, family) == before
    eventually(lambda: queued(bypassing.lab.node, family) > before, "the FIN is queued")
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
        before = queued(bypassing.lab.node, family)
        for _ in range(100):
            ask()
        assert queued(bypassing.lab.node, family) == before


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


def numbers(client, server, capture) -> inet.TCP:
    """The header of the client's latest segment, as it came to the server."""
    payload = token()
    assert exchange(client, server, payload)
    return parsed(capture.expect(carries(payload), DEADLINE_S))[inet.TCP]


BEYOND = 1 << 28
"""Added to a sequence number: beyond any window, but not half the space away."""


@pytest.mark.parametrize("flags", ["S", "SA", "R", "FA"])
def test_segments_that_open_or_end_a_connection_are_judged(bypassing, flags):
    """A blind segment of the flow's own ends, beyond its window: queued, without effect."""
    a, b = bypassing.lab.host("a"), bypassing.lab.host("b")
    with opened(bypassing) as (client, server), b.capture() as capture:
        real = numbers(client, server, capture)
        before, dropped = queued(bypassing.lab.node), bypassing.drop_count()
        where = {"source_port": real.sport, "flags": flags}
        blind = tcp(a, b, 80, **where, seq=(real.seq + BEYOND) % 2**32, ack=real.ack)
        a.send(bytes(blind))
        eventually(lambda: queued(bypassing.lab.node) > before, "it is queued")
        if flags != "S":  # the host answers a SYN with a challenge (RFC 5961 section 4)
            eventually(lambda: bypassing.drop_count() > dropped, "it is dropped")
        for _ in range(100):
            assert exchange(client, server, token())
        # A SYN takes the connmark away; the host's answer, queued too, brings it back.
        assert queued(bypassing.lab.node) - before == (2 if flags == "S" else 1)


def test_data_beyond_the_window_is_not_carried(bypassing):
    """What the kernel calls INVALID has no connmark; the worker trusts the kernel's numbers."""
    a, b = bypassing.lab.host("a"), bypassing.lab.host("b")
    with opened(bypassing) as (client, server), b.capture() as capture:
        real = numbers(client, server, capture)
        payload, last = token(), token()
        where = {"source_port": real.sport, "flags": "PA", "payload": payload}
        wild = tcp(a, b, 80, **where, seq=(real.seq + BEYOND) % 2**32, ack=real.ack)
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
        before = queued(one.lab.node)
        c.send(bytes(lie))
        one.dropped(DropReason.INVALID_SOURCE_IP)
        assert exchange(client, server, last)
        assert queued(one.lab.node) == before + 1
        capture.expect(carries(last), DEADLINE_S)
        assert not any(payload in data for data in capture.packets)


# --- generations ------------------------------------------------------------------------------


def test_a_generation_that_wraps_around_revives_no_old_permission(bypassing):
    """A flow that is silent while the numbers go once around: its mark has gone meanwhile."""
    around = Marks().number_count
    with opened(bypassing) as (client, server):
        bypassing.publish()  # nothing is allowed any more; the kernel carries the flow still
        assert exchange(client, server, token())
        (mark,) = marks(bypassing)
        first = bypassing.generation + 1
        bypassing.kernel(
            "from dataclasses import replace",
            f"for number in range({first}, {first + around - 1}):",
            "    kernel.set_generation(replace(config, generation=number))",
        )
        assert marks(bypassing) == [mark]
        bypassing.generation += around
        bypassing.set_generation()
        rules = bypassing.lab.node.run(["iptables-save", "-t", "mangle"]).stdout
        assert f"-m connmark ! --mark {mark:#x}/0xff000000 -j RETURN" in rules  # the same number
        assert marks(bypassing) == []
        server.settimeout(1.0)
        assert not exchange(client, server, token())
        bypassing.dropped(DropReason.POLICY_DENIED)


def test_a_mark_of_another_generation_is_not_saved(bypassing):
    """A worker of an older snapshot cannot give the kernel anything."""
    bypassing.generation += 1
    bypassing.set_generation()
    a, b = bypassing.lab.host("a"), bypassing.lab.host("b")
    with Echo(b, 80) as server, a.connect(b.address4, 80) as client:
        accepted = server.accept()
        for _ in range(3 * ENOUGH):
            assert exchange(client, accepted, token())
        assert marks(bypassing) == []
        bypassing.publish(Rule("a", "b"))
        for _ in range(AGAIN_COUNT):
            assert exchange(client, accepted, token())
        eventually(lambda: marks(bypassing) == [0x0C000000], "the kernel carries it")


def test_our_own_changes_lose_no_packet_that_waits(bypassing):
    """A worker that stands still, and meanwhile every kind of update that we make."""
    a, b = bypassing.lab.host("a"), bypassing.lab.host("b")
    with b.capture() as capture, stopped(bypassing.processes[0].pid):
        payloads = [token() for _ in range(40)]
        for payload in payloads:
            a.send(bytes(udp(a, b, 53, payload)))
        for _ in range(2):
            bypassing.generation += 1
            bypassing.set_generation()
            bypassing.update_sets()
            bypassing.kernel("kernel.install(config)")
        (depth,) = json.loads(bypassing.kernel("print([q.depth for q in kernel.read_queues()])"))
        assert depth >= len(payloads)
        os.kill(bypassing.processes[0].pid, signal.SIGCONT)
        for payload in payloads:
            capture.expect(carries(payload), DEADLINE_S)
    assert bypassing.metric("verdict_refused_count_total") == 0


def test_losses_by_others_changes_are_counted(bypassing):
    """Deleting any base chain of nft makes the kernel drop what waits; the verdicts fail."""
    a, b = bypassing.lab.host("a"), bypassing.lab.host("b")
    nft = "add table ip other; add chain ip other c { type filter hook forward priority 5; }"
    bypassing.lab.node.run(["nft", nft], check=True)
    before = queued(bypassing.lab.node)
    with stopped(bypassing.processes[0].pid):
        for _ in range(10):
            a.send(bytes(udp(a, b, 53, token())))
        eventually(lambda: queued(bypassing.lab.node) == before + 10, "ten packets wait")
        bypassing.lab.node.run(["nft", "delete table ip other"], check=True)
    eventually(lambda: bypassing.metric("verdict_refused_count_total") > 0, "it is counted")


# --- who lives how long -----------------------------------------------------------------------


def flags(rig) -> dict[str, list[str]]:
    """The flags of the flows that the workers know, by destination."""
    return {str(row["destination"]): row["flags"] for row in rig.ask("conntrack")}


def test_a_carried_flow_lives_as_long_as_the_kernels_entry(bypassing):
    """Not shorter, though nothing of it is seen here; not longer, though nobody says its end."""
    node, a, b = bypassing.lab.node, bypassing.lab.host("a"), bypassing.lab.host("b")
    path = "/proc/sys/net/netfilter/nf_conntrack_udp_timeout"
    node.run(["sh", "-c", f"echo 4 > {path}; echo 4 > {path}_stream"], check=True)
    where = f"{b.address4}:53"
    with a.datagram() as client, b.datagram(53) as server:
        server.settimeout(DEADLINE_S)
        for _ in range(ENOUGH):
            client.sendto(b"question", (b.address4, 53))
            server.sendto(b"answer", server.recvfrom(100)[1])
        fell_silent = 0.0

        def goes_on() -> None:
            """Send what the kernel alone sees."""
            nonlocal fell_silent
            fell_silent = time.monotonic()
            client.sendto(b"more", (b.address4, 53))
            assert server.recv(100) == b"more"

        def carried() -> bool:
            goes_on()
            return "OFFLOAD" in flags(bypassing).get(where, [])

        eventually(carried, "the kernel carries it")
        until = time.monotonic() + 6.0
        while time.monotonic() < until:
            goes_on()
        eventually(carried, "it lives")  # one that had ended needs answers to be carried again
    eventually(lambda: where not in flags(bypassing), "it has ended", every_s=0.2)
    assert time.monotonic() - fell_silent > 3.0


def test_a_flow_whose_kernel_entry_is_deleted_goes_on(bypassing):
    """`conntrack -F` by an operator breaks nothing: the worker knows the flow."""
    with opened(bypassing) as (client, server):
        bypassing.lab.node.run(["conntrack", "-F"], check=True)
        assert marks(bypassing) == []
        for _ in range(2 * AGAIN_COUNT):
            assert exchange(client, server, token())
        eventually(lambda: marks(bypassing), "it is carried again")


def test_a_new_worker_knows_which_flows_are_carried(bypassing):
    """kill -9, and data goes on while nobody listens to the queue."""
    with opened(bypassing) as (client, server):
        bypassing.stop(signal.SIGKILL)
        for _ in range(20):
            assert exchange(client, server, token())
        bypassing.start()
        where = ":".join(map(str, server.getsockname()))
        eventually(lambda: "OFFLOAD" in flags(bypassing).get(where, []), "it knows")
        for _ in range(20):
            assert exchange(client, server, token())
    eventually(
        lambda: "OFFLOAD" not in flags(bypassing).get(where, []), "its end is noticed", every_s=0.2
    )
