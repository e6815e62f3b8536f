"""Anything may arrive: the worker decides it and lives on.

The kernel refuses some of these packets before they reach the queue (a bad IPv4 header checksum,
for one), so checksums are made right after each mutation.
"""

import random
import struct

import datapath_rig
import pytest
from datapath_rig import Rule
from evidence import waiting_count
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Raw, fuzz
from scapy.utils import checksum
from traffic import delivered, eventually, token, udp

rig = datapath_rig.rig
pytestmark = pytest.mark.needs("nfqueue", "nfqueue6", "ipset", "set", "ipv6")

SEED = 20261123


def right_checksum(packet: bytes) -> bytes:
    """Repair the IPv4 header's checksum, so that the kernel lets the rest through."""
    if len(packet) < 20 or packet[0] >> 4 != 4:
        return packet
    size = max(20, min((packet[0] & 15) * 4, len(packet)))
    head = packet[:10] + b"\0\0" + packet[12:size]
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + packet[size:]


def right_length(packet: bytes) -> bytes:
    """State the length that the packet has."""
    if packet[0] >> 4 == 4:
        return packet[:2] + struct.pack("!H", len(packet)) + packet[4:]
    return packet[:4] + struct.pack("!H", len(packet) - 40) + packet[6:]


def samples(a, b) -> list[bytes]:
    """One packet of each kind that the parser knows."""
    four, six = IP(src=a.address4, dst=b.address4), IPv6(src=a.address6, dst=b.address6)
    options = [("MSS", 1460), ("NOP", None), ("WScale", 7), ("SAckOK", b""), ("Timestamp", (1, 0))]
    inner4, inner6 = bytes(four / UDP(sport=1, dport=2)), bytes(six / TCP(sport=1, dport=2))
    packets = [
        four / TCP(sport=1025, dport=80, flags="S", options=options),
        four / UDP(sport=1025, dport=53) / Raw(b"x" * 40),
        four / ICMP(type=8, id=7) / Raw(b"ping"),
        four / ICMP(type=3, code=4) / Raw(inner4),
        four / SCTP(sport=1025, dport=80) / SCTPChunkInit(),
        IP(src=a.address4, dst=b.address4, options=b"\x07\x07\x04\x00\x00\x00\x00\x00")
        / TCP(sport=1, dport=2),
        six / TCP(sport=1025, dport=80, flags="S", options=options),
        six / UDP(sport=1025, dport=53) / Raw(b"x" * 40),
        six / ICMPv6EchoRequest(id=7, data=b"ping"),
        six / ICMPv6DestUnreach() / Raw(inner6),
        six / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / TCP(sport=1, dport=2),
        six / IPv6ExtHdrRouting(type=0, addresses=[b.address6]) / UDP(sport=1, dport=2),
        six / IPv6ExtHdrFragment(offset=0, m=0, id=9) / UDP(sport=1, dport=2),
    ]
    return [bytes(packet) for packet in packets]


@pytest.mark.parametrize("profile", ["strict", "linux"])
def test_no_packet_can_end_the_worker(rig, profile):
    one = rig(options=("--profile", profile))
    one.start()
    one.publish(Rule("a", "b"))
    a, b = one.lab.host("a"), one.lab.host("b")
    chance = random.Random(SEED)
    sent = 0
    for sample in samples(a, b):
        variants = [
            right_length(sample[:cut])
            for cut in range(20, len(sample))
            if cut >= 40 or sample[0] >> 4 == 4
        ]
        variants += [sample[:cut] for cut in range(40, len(sample))]
        for at in range(len(sample)):
            for value in {0, 255, sample[at] ^ 0x80, sample[at] ^ 1, chance.randrange(256)}:
                variants.append(sample[:at] + bytes((value,)) + sample[at + 1 :])
        for _ in range(40):
            mutated = bytearray(sample)
            for _ in range(chance.randrange(1, 6)):
                mutated[chance.randrange(len(mutated))] = chance.randrange(256)
            variants.append(bytes(mutated))
        for variant in variants:
            a.send(right_checksum(variant), ethertype=0x0800 if sample[0] >> 4 == 4 else 0x86DD)
            sent += 1
        # Wait here and there, or the link's buffers would throw most of it away.
        payload = token()
        delivered(a, b, udp(a, b, 53, payload), payload)
    for layer in (TCP, UDP, ICMP, SCTP):
        for _ in range(100):
            packet = bytes(IP(src=a.address4, dst=b.address4) / fuzz(layer()))
            a.send(packet)
            sent += 1
    payload = token()
    delivered(a, b, udp(a, b, 53, payload), payload)
    (status,) = one.ask("status")
    assert status["internal_count"] == 0, one.log()
    judged = one.metric("forward_count_total") + one.metric("drop_count_total")
    assert judged > sent // 4, f"only {judged} of {sent} packets came as far as the queue"
    eventually(lambda: waiting_count(one.lab.node) == 0, "no packet waits without a verdict")
