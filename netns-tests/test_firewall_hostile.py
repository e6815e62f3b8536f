"""Packets that nobody should send: each is dropped with a reason, and the worker lives on."""

import random
import socket
import struct

import pytest
from evidence import workers
from rules import peers, policy
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw, fuzz
from traffic import (
    FAMILIES,
    V4,
    carries,
    delivered,
    echo,
    eventually,
    ip,
    tcp,
    token,
    udp,
)

FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=["ipv4", "ipv6"])

FUZZ_COUNT = 400
SEED = 20261123
"""Fixed, so that a failure can be repeated."""


@pytest.fixture(scope="module")
def running(module_lab, module_bartizan):
    made = module_lab(a="app=a", b="app=b", c="app=c")
    made.firewall = module_bartizan(made)
    return made


@pytest.fixture
def three(running):
    """a may reach everything of b, c nothing."""
    running.firewall.clear()
    running.firewall.apply(policy("app=b", ingress=[peers("app=a")]))
    return running


def _queued(lab) -> int:
    """Packets that the kernel has queued to userspace so far, over all queues.

    Source: nfnetlink_queue.c, seq_show: the last but one column is the id of the newest packet.
    """
    text = lab.node.run(["cat", "/proc/net/netfilter/nfnetlink_queue"]).stdout
    return sum(int(line.split()[7]) for line in text.splitlines())


def _decided(firewall) -> int:
    """Flow records made so far, with those that were counted as lost."""
    flows = firewall.get("/v1/status")["flows"]
    return flows["seen"] + flows["lost"]


def _survives(three, pids) -> None:
    for family in FAMILIES:
        payload = token()
        a, b = three.host("a"), three.host("b")
        delivered(a, b, udp(a, b, 53, payload, family=family), payload)
    assert workers(three.firewall) == pids
    assert "Traceback" not in three.firewall.log()


def _cut(packet, length: int, family: int) -> bytes:
    """The first `length` bytes, with a header that claims no more, so that the kernel takes it."""
    data = bytearray(bytes(packet)[:length])
    if family == V4:
        struct.pack_into("!H", data, 2, length)
        struct.pack_into("!H", data, 10, 0)
        # RFC 791: the one's complement of the one's complement sum of the header.
        total = sum(struct.unpack("!10H", data[:20]))
        total = (total & 0xFFFF) + (total >> 16)
        struct.pack_into("!H", data, 10, ~(total + (total >> 16)) & 0xFFFF)
    else:
        struct.pack_into("!H", data, 4, length - 40)
    return bytes(data)


@FAMILY
@pytest.mark.parametrize("protocol", ["tcp", "udp", "echo"])
def test_a_packet_cut_anywhere_in_its_header_is_dropped_and_counted(three, family, protocol):
    """From the end of the IP header to the last byte of the upper one; whole, it passes."""
    a, b = three.host("a"), three.host("b")
    whole = {
        "tcp": lambda: tcp(a, b, 80, family=family, options=[("MSS", 1460), ("WScale", 7)]),
        "udp": lambda: udp(a, b, 53, b"", family=family),
        "echo": lambda: echo(a, b, b"", family=family),
    }[protocol]()
    size, start = len(bytes(whole)), 20 if family == V4 else 40
    pids, queued, decided = workers(three.firewall), _queued(three), _decided(three.firewall)
    with b.capture() as at_b:
        for length in range(start, size):
            a.send(_cut(whole, length, family))
        a.send(bytes(whole))
        at_b.expect(lambda data: len(data) == size and data[start:] == bytes(whole)[start:])
        cut = [data for data in at_b.so_far() if len(data) < size and _ours(data, a)]
    assert not cut
    came = _queued(three) - queued
    assert came >= size - start
    eventually(lambda: _decided(three.firewall) - decided >= size - start, "all are counted")
    reasons = {
        record.get("drop_reason_desc")
        for record in three.firewall.flows()
        if record["verdict"] == "DROPPED"
    }
    assert reasons
    assert reasons <= {"CT_TRUNCATED_OR_INVALID_HEADER", "INVALID_PACKET_DROPPED"}
    _survives(three, pids)


def _ours(data: bytes, host) -> bool:
    """Whether the packet claims to come from the host."""
    if data[0] >> 4 == 4:
        return data[12:16] == socket.inet_aton(host.address4)
    return data[8:24] == socket.inet_pton(socket.AF_INET6, host.address6)


@FAMILY
def test_fuzzed_fields_are_dropped_with_a_reason_and_the_worker_lives_on(three, family):
    """scapy randomises every field of IP, TCP, UDP and ICMP from a peer that may nothing."""
    b, c = three.host("b"), three.host("c")
    random.seed(SEED)
    pids, queued, decided = workers(three.firewall), _queued(three), _decided(three.firewall)
    mark = token()
    upper = [TCP, UDP, ICMP] if family == V4 else [TCP, UDP]
    with b.capture() as at_b:
        for number in range(FUZZ_COUNT):
            body = fuzz(upper[number % len(upper)]()) / Raw(mark)
            if family == V4:
                header = ip(c, b, family, id=number, tos=random.randrange(256), ttl=64)
                header.flags = random.choice([0, 2])
            else:
                header = ip(c, b, family, tc=random.randrange(256), fl=random.randrange(1 << 20))
            c.send(bytes(header / body))
        eventually(lambda: _queued(three) - queued >= FUZZ_COUNT, "all were queued")
        eventually(lambda: _decided(three.firewall) - decided >= FUZZ_COUNT, "all are counted")
        assert not [data for data in at_b.so_far() if mark in data]
    for record in three.firewall.flows(last=4000):
        assert record["verdict"] != "DROPPED" or record["drop_reason_desc"]
    _survives(three, pids)


def test_fuzzed_ip_headers_do_not_end_a_worker(three):
    """Whatever of it the kernel lets through to the queue."""
    b, c = three.host("b"), three.host("c")
    random.seed(SEED)
    pids = workers(three.firewall)
    mark = token()
    with b.capture() as at_b:
        for layer, source, destination in (
            (IP, c.address4, b.address4),
            (IPv6, c.address6, b.address6),
        ):
            for _ in range(FUZZ_COUNT // 2):
                header = fuzz(layer(src=source, dst=destination))
                # scapy draws anew at every look: fix the packet once.
                c.send(bytes(header / Raw(mark)))
        payload = token()
        a = three.host("a")
        a.send(bytes(udp(a, b, 53, payload)))
        at_b.expect(carries(payload))
        assert not [data for data in at_b.so_far() if mark in data]
    _survives(three, pids)


@pytest.mark.parametrize("protocol", [0, 2, 41, 47, 50, 99, 132, 255])
def test_an_upper_protocol_that_policy_cannot_name_needs_a_rule_for_everything(three, protocol):
    """a may everything of b by L3, so such a packet is decided, not lost; c's never arrives."""
    b, c = three.host("b"), three.host("c")
    pids = workers(three.firewall)
    mark = token()
    packet = ip(c, b, V4, proto=protocol) / Raw(mark)
    decided = _decided(three.firewall)
    with b.capture() as at_b:
        c.send(bytes(packet))
        eventually(lambda: _decided(three.firewall) > decided, "it is counted")
        assert not [data for data in at_b.so_far() if mark in data]
    _survives(three, pids)


@FAMILY
def test_fragments_are_judged_as_the_whole_that_they_make(three, family):
    """a's fragmented datagram arrives; c's does not, however it is cut."""
    from scapy.layers.inet import fragment
    from scapy.layers.inet6 import IPv6ExtHdrFragment, fragment6

    a, b, c = (three.host(name) for name in "abc")
    with b.capture() as at_b:
        payloads = {}
        for sender in (c, a):
            payloads[sender.name] = token()
            datagram = udp(sender, b, 53, payloads[sender.name] * 120, family=family)
            if family == V4:
                pieces = fragment(datagram, fragsize=400)
            else:
                layered = datagram.copy()
                body = layered.payload
                layered.remove_payload()
                pieces = fragment6(layered / IPv6ExtHdrFragment(id=77) / body, 400)
            assert len(pieces) > 2
            sender.send(*map(bytes, pieces))
        at_b.expect(carries(payloads["a"]))
        assert not [data for data in at_b.so_far() if payloads["c"] in data]
