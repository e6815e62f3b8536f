"""The parser beside scapy's, on packets of which some bytes have changed.

What both can read they must read alike. Scapy reads more (it does not compare lengths), and routing
headers in its own way: it takes segments where the header's length leaves none, so there are none.
"""

import random

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.sctp import SCTP
from scapy.packet import Packet as Layer

from conntrack.address import format_address
from conntrack.packet import Packet, PacketError, parse

PACKETS = 800  # for each seed
ROUTING = 43
ODD_BYTES = (0, 1, 4, 5, 6, 17, 44, 60, 0x45, 0x46, 0x60, 0xFF)
OPTIONS = (
    [],
    [("MSS", 1460), ("WScale", 7)],
    [("SAckOK", b"")],
    [("NOP", None), ("NOP", None), ("Timestamp", (1, 2))],
)


def sound(chance: random.Random) -> bytes:
    """A packet as a host may send it."""
    version = chance.choice((4, 6))
    ends = {"sport": chance.randrange(1, 65536), "dport": chance.randrange(1, 65536)}
    echo = {"id": chance.randrange(65536)}
    numbers = {"seq": chance.getrandbits(32), "ack": chance.getrandbits(32)}
    transport = chance.choice((
        TCP(**ends, **numbers, flags=chance.randrange(256), options=chance.choice(OPTIONS)),
        UDP(**ends),
        SCTP(**ends, tag=chance.getrandbits(32)),
        ICMP(type=8, **echo) if version == 4 else ICMPv6EchoRequest(**echo),
    ))  # fmt: skip
    if version == 4:
        options = chance.choice(([], [], [b"\x07\x07\x04\0\0\0\0"]))
        head: Layer = IP(src="10.0.0.1", dst="10.0.0.2", options=options)
    else:
        head = IPv6(src="fd00::1", dst="fd00::2")
        for _ in range(chance.randrange(4)):
            head /= chance.choice((IPv6ExtHdrHopByHop, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment))()
    return bytes(head / transport / bytes(chance.randrange(30)))


def changed(chance: random.Random, data: bytes) -> bytes:
    """The packet with some bytes changed, cut or padded; no routing header."""
    made = bytearray(data)
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        made[chance.randrange(min(len(made), 80))] = chance.choice(
            (*ODD_BYTES, chance.randrange(256))
        )
    if chance.random() < 0.2:
        del made[chance.randrange(1, len(made)) :]
    if chance.random() < 0.1:
        made += bytes(chance.randrange(1, 9))
    return bytes(byte if byte != ROUTING else 0 for byte in made)


def as_scapy_reads(data: bytes, protocol: int) -> tuple[object, ...]:
    """Addresses, length and hop limit; then what the transport header says."""
    read = IP(data) if data[0] >> 4 == 4 else IPv6(data)
    head: tuple[object, ...] = (
        (read.src, read.dst, read.len, read.ttl)
        if read.version == 4
        else (read.src, read.dst, read.plen + 40, read.hlim)
    )
    kinds = {6: TCP, 17: UDP, 132: SCTP, 1: ICMP}
    layer = read.getlayer(kinds[protocol]) if protocol in kinds else None
    match layer:
        case TCP():
            numbers = layer.seq, layer.ack, int(layer.flags) & 0xFF, layer.window
            return *head, layer.sport, layer.dport, *numbers
        case UDP():
            return *head, layer.sport, layer.dport, layer.len - 8
        case SCTP():
            return *head, layer.sport, layer.dport, layer.tag
        case ICMP():
            return *head, layer.type, layer.code
    return head if protocol not in kinds else (*head, "no such layer")


def as_we_read(packet: Packet) -> tuple[object, ...]:
    """The same of ours."""
    ends = format_address(packet.source), format_address(packet.destination)
    head = *ends, packet.length, packet.hop_limit
    ports = packet.source_port, packet.destination_port
    match packet.protocol:
        case 6:
            numbers = packet.sequence, packet.acknowledgment, packet.tcp_flags, packet.window
            return *head, *ports, *numbers
        case 17:
            return *head, *ports, packet.payload_bytes
        case 132:
            return *head, *ports, packet.sequence
        case 1:
            return *head, packet.icmp_type, packet.icmp_code
    return head


@pytest.mark.parametrize("seed", range(3))
def test_changed_packets_are_read_as_scapy_reads_them(seed: int) -> None:
    chance = random.Random(20261128 + seed)
    read_count = 0
    for _ in range(PACKETS):
        whole = sound(chance)
        parse(whole)
        data = changed(chance, whole)
        try:
            packet = parse(data)
        except PacketError:
            continue
        read_count += 1
        assert as_we_read(packet) == as_scapy_reads(data, packet.protocol), data.hex()
    assert read_count > PACKETS // 2
