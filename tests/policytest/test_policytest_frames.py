"""The packets that are sent are what they should be, to our parser and to scapy."""

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.sctp import SCTP, SCTPChunkInit

from conntrack.address import parse_address
from conntrack.checksum import transport_is_intact
from conntrack.packet import parse, policy_port
from policytest.frames import packet
from policytest.packets import BATCH_COUNT, _batches
from policytest.world import Probe

ENDS = {4: ("10.0.1.1", "203.0.113.7"), 6: ("fd00::1", "2001:db8::7")}


def probe(version, protocol, port):
    source, destination = map(parse_address, ENDS[version])
    return Probe(source, destination, protocol, port)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("protocol", "port"), [(6, 80), (17, 53), (132, 9), ("icmp", 8)])
@pytest.mark.parametrize("source_port", [1, 10_000, 65_535])
def test_a_packet_is_intact_and_says_what_the_probe_says(version, protocol, port, source_port):
    if protocol == "icmp":
        protocol, port = (1, 8) if version == 4 else (58, 128)
    data = packet(probe(version, protocol, port), source_port)
    parsed = parse(data)
    assert transport_is_intact(data, protocol)
    assert (parsed.protocol, policy_port(parsed)) == (protocol, port)
    assert (parsed.source, parsed.destination) == tuple(map(parse_address, ENDS[version]))
    if protocol in (1, 58):
        assert parsed.icmp_id == source_port
    else:
        assert parsed.source_port == source_port


def test_scapy_reads_them_as_opening_packets():
    assert IP(packet(probe(4, 6, 80), 10_000))[TCP].flags == "S"
    assert IP(packet(probe(4, 17, 53), 10_000))[UDP].dport == 53
    assert IPv6(packet(probe(6, 132, 9), 10_000))[SCTP].haslayer(SCTPChunkInit)
    assert IP(packet(probe(4, 1, 8), 7))[ICMP].id == 7
    assert IPv6(packet(probe(6, 58, 128), 7))[ICMPv6EchoRequest].id == 7


def test_no_two_queries_that_look_alike_are_on_their_way_at_once():
    """The record of an ICMP message has no id, so one batch has one of a kind."""
    ping, syn = probe(4, 1, 8), probe(4, 6, 80)
    batches = list(_batches([(0, ping), (1, syn), (2, ping), (3, syn)]))
    assert batches == [[(0, ping), (1, syn), (3, syn)], [(2, ping)]]
    many = [(at, syn) for at in range(2 * BATCH_COUNT + 1)]
    assert [len(batch) for batch in _batches(many)] == [BATCH_COUNT, BATCH_COUNT, 1]
