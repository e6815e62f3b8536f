"""What is recorded is read again by our own reader and by scapy's, comments and all."""

import io

from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.utils import PcapNgReader

from firewall.replay import recording
from firewall.replay.capture import read_frames

TIME_NS = 1_795_440_000_123_456_789
FIRST = bytes(IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=1, dport=2) / b"odd")
SECOND = bytes(IPv6(src="fd00::1", dst="fd00::2") / UDP(sport=3, dport=4))


def recorded(comment="POLICY_DENIED: no rule"):
    return b"".join(
        (
            recording.head("bartizan 1", "bartizan", 256),
            recording.packet(TIME_NS, FIRST, 1500, comment),
            recording.packet(TIME_NS + 1, SECOND, len(SECOND), "second", lost_count=7),
            recording.tail(TIME_NS + 2, 2, 7),
        )
    )


def test_our_reader_finds_every_packet_and_its_nanoseconds():
    frames = list(read_frames(io.BytesIO(recorded()), "x"))
    assert [frame.data for frame in frames] == [FIRST, SECOND]
    assert [frame.time_ns for frame in frames] == [TIME_NS, TIME_NS + 1]
    assert [frame.length for frame in frames] == [1500, len(SECOND)]
    assert {frame.link_type for frame in frames} == {recording.LINKTYPE_RAW}
    assert {frame.interface for frame in frames} == {"bartizan"}


def test_scapy_finds_packets_of_both_families_and_their_comments():
    first, second = PcapNgReader(io.BytesIO(recorded()))
    assert (first[UDP].sport, second[UDP].sport) == (1, 3)
    assert (first[IP].src, second[IPv6].src) == ("10.0.0.1", "fd00::1")
    assert first.comment == b"POLICY_DENIED: no rule"
    assert second.comment == b"second"


def test_a_file_without_its_tail_is_whole():
    tail = recording.tail(TIME_NS + 2, 2, 7)
    assert len(list(read_frames(io.BytesIO(recorded()[: -len(tail)]), "x"))) == 2


def test_a_comment_is_cut_between_characters():
    (first, _) = PcapNgReader(io.BytesIO(recorded("é" * 3000 + "!")))
    assert first.comment.decode() == "é" * 2048
