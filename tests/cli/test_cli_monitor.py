"""`bartizan monitor`: packets of a stream, printed or written as a capture, losses counted."""

import pytest
from click.testing import CliRunner
from flow_samples import AT_NS, flow, packet
from scapy.layers.inet import IP, UDP
from scapy.utils import PcapNgReader

from firewall.cli import main
from firewall.cli.client import Client
from firewall.flows.captured import Captured, to_line

DATAGRAM = bytes(IP(src="10.0.0.30", dst="10.0.0.147") / UDP(sport=1, dport=53) / b"question")
STREAM = [
    Captured(),
    Captured(AT_NS, DATAGRAM, 1500, flow(packet())),
    Captured(AT_NS + 1, DATAGRAM, len(DATAGRAM), flow(packet()), lost_count=4),
    Captured(lost_count=2),
]


@pytest.fixture
def asked(monkeypatch):
    """What the command asks the agent for; the answer is STREAM."""
    queries = []

    def lines(self, *segments, query=None, until=None):
        queries.append((*segments, query))
        return map(to_line, STREAM)

    monkeypatch.setattr(Client, "lines", lines)
    return queries


def _monitor(*arguments):
    return CliRunner().invoke(main, ["monitor", *arguments])


def test_packets_are_printed_with_their_flow_and_losses_between(asked):
    answer = _monitor("--drops", "--not", "--protocol", "tcp")
    first, lost, second, more_lost, count = answer.output.splitlines()
    assert "default/xwing:54842 (ID:22654) -> default/deathstar:80" in first
    assert first.endswith(DATAGRAM.hex())
    assert second.endswith(DATAGRAM.hex())
    assert (lost, more_lost) == ("4 packets lost", "2 packets lost")
    assert count == "2 packets, 6 lost"
    assert asked == [("packets", {"not-protocol": ["tcp"], "drops": "1"})]


def test_a_capture_keeps_what_was_seen_of_each_packet_and_how_long_it_was(asked, tmp_path):
    file = tmp_path / "x.pcapng"
    assert _monitor("--pcap", str(file)).exit_code == 0
    with PcapNgReader(str(file)) as packets:
        first, second = packets
    assert bytes(first) == bytes(second) == DATAGRAM
    assert (first.wirelen, second.wirelen) == (1500, len(DATAGRAM))
    assert first.comment.startswith(b"DENIED: POLICY_DENIED")


def test_it_ends_after_as_many_packets_as_are_asked_for(asked):
    assert _monitor("--count", "1").output.endswith("\n1 packets, 0 lost\n")


def test_a_file_that_cannot_be_written_is_said(asked, tmp_path):
    answer = _monitor("--pcap", str(tmp_path / "nowhere" / "x.pcapng"))
    assert answer.exit_code == 2
    assert "No such file or directory" in answer.output


def test_a_filter_that_cannot_be_is_said_before_the_agent_is_asked(asked):
    assert _monitor("--verdict", "PERHAPS").exit_code == 2
    assert asked == []
