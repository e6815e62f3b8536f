"""Capture files: every format and link type gives the same packets, and damage is named."""

import io
import struct

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw
from scapy.utils import PcapNgWriter, PcapWriter

from firewall.replay.capture import CaptureError, Frame, read_frames
from firewall.replay.link import open_frame

TIME_NS = 1_700_000_000_123_456_000
INNER = bytes(IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=1, dport=2) / Raw(b"payload"))


def frames(data: bytes) -> list[Frame]:
    return list(read_frames(io.BytesIO(data), "x.pcap"))


def pcap(*packets: bytes, link=1, order="<", magic=0xA1B2C3D4, fraction=123456, wire=0) -> bytes:
    head = struct.pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, 262144, link)
    return head + b"".join(
        struct.pack(f"{order}IIII", 1_700_000_000, fraction, len(p), len(p) + wire) + p
        for p in packets
    )


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    body += bytes(-len(body) % 4)
    total = struct.pack(f"{order}I", len(body) + 12)
    return struct.pack(f"{order}I", kind) + total + body + total


def option(code: int, value: bytes, order: str = "<") -> bytes:
    return struct.pack(f"{order}HH", code, len(value)) + value + bytes(-len(value) % 4)


def section(order: str = "<") -> bytes:
    return block(0x0A0D0D0A, struct.pack(f"{order}IHHq", 0x1A2B3C4D, 1, 0, -1), order)


def interface(link: int = 1, *options: bytes, order: str = "<", snapshot: int = 0) -> bytes:
    return block(1, struct.pack(f"{order}HHI", link, 0, snapshot) + b"".join(options), order)


def enhanced(packet: bytes, ticks: int, order: str = "<", number: int = 0) -> bytes:
    head = (number, ticks >> 32, ticks & 0xFFFFFFFF, len(packet), len(packet))
    return block(6, struct.pack(f"{order}IIIII", *head) + packet, order)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("magic", "fraction"), [(0xA1B2C3D4, 123456), (0xA1B23C4D, 123456000)])
def test_pcap_of_either_byte_order_and_resolution(order, magic, fraction):
    (one,) = frames(pcap(INNER, link=101, order=order, magic=magic, fraction=fraction))
    assert (one.number, one.offset, one.time_ns) == (1, 24, TIME_NS)
    assert open_frame(one) == (INNER, 0, "")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("resolution", "ticks"),
    [
        (b"", TIME_NS // 1000),
        (b"\x09", TIME_NS),
        (b"\x03", TIME_NS // 1_000_000),
        (b"\xa0", (TIME_NS << 32) // 1_000_000_000),
    ],
)
def test_pcapng_of_either_byte_order_and_any_resolution(order, resolution, ticks):
    """Resolutions are powers of 10, or of 2 with the top bit."""
    options = [option(9, resolution, order)] if resolution else []
    name = option(2, b"veth0", order)
    data = section(order) + interface(101, name, *options, option(0, b"", order), order=order)
    (one,) = frames(data + block(5, b"statistics--", order) + enhanced(INNER, ticks, order))
    coarsest = 1_000_000 if resolution == b"\x03" else 1000
    assert abs(one.time_ns - TIME_NS) < coarsest
    assert one.interface == "veth0"
    assert open_frame(one).packet == INNER


def test_sections_may_differ_in_byte_order_and_number_their_interfaces_anew():
    second = section(">") + interface(228, order=">") + enhanced(INNER, 7, ">")
    found = frames(section() + interface(1) + enhanced(bytes(14) + INNER, 5) + second)
    assert [(one.number, one.link_type, one.time_ns) for one in found] == [
        (1, 1, 5000),
        (2, 228, 7000),
    ]


def test_simple_packets_end_at_the_interface_limit_and_take_the_time_before():
    simple = block(3, struct.pack("<I", len(INNER)) + INNER[:24])
    found = frames(section() + interface(101, snapshot=24) + enhanced(b"", 9) + simple)
    assert (found[1].data, found[1].length, found[1].time_ns) == (INNER[:24], len(INNER), 9000)


def test_time_offset_of_an_interface_is_added():
    data = section() + interface(101, option(14, struct.pack("<q", 100))) + enhanced(INNER, 1)
    assert frames(data)[0].time_ns == 100_000_001_000


@pytest.mark.parametrize("writer", [PcapWriter, PcapNgWriter])
def test_what_scapy_writes_is_read(tmp_path, writer):
    path = tmp_path / "capture"
    packet = Ether() / IP(INNER)
    packet.time = TIME_NS / 1e9
    with writer(str(path)) as sink:
        sink.write(packet)
        sink.write(packet)
    found = frames(path.read_bytes())
    assert [open_frame(one).packet for one in found] == [INNER, INNER]
    assert abs(found[0].time_ns - TIME_NS) < 2000


@pytest.mark.parametrize(
    ("link", "head"),
    [
        (1, bytes(12) + b"\x08\x00"),
        (1, bytes(12) + b"\x81\x00\x00\x05\x08\x00"),
        (1, bytes(12) + b"\x88\xa8\x00\x07\x81\x00\x00\x05\x08\x00"),
        (12, b""),
        (101, b""),
        (228, b""),
        (0, struct.pack("<I", 2)),
        (0, struct.pack(">I", 2)),
        (108, struct.pack(">I", 2)),
        (113, bytes(14) + b"\x08\x00"),
        (113, bytes(14) + b"\x81\x00\x00\x05\x08\x00"),
        (276, b"\x08\x00" + bytes(18)),
    ],
)
def test_every_link_header_comes_off(link, head):
    (one,) = frames(pcap(head + INNER, link=link))
    assert open_frame(one).packet == INNER


@pytest.mark.parametrize(
    ("link", "data", "why"),
    [
        (1, bytes(Ether() / ARP()), "not IP: ARP"),
        (1, bytes(Ether() / Dot1Q() / ARP()), "not IP: ARP"),
        (1, bytes(12) + b"\x00\x26" + bytes(38), "not IP: 802.2 LLC"),
        (1, bytes(12) + b"\x12\x34", "not IP: EtherType 0x1234"),
        (1, bytes(13), "the link header is cut"),
        (1, bytes(12) + b"\x81\x00\x00", "the VLAN tag is cut"),
        (0, struct.pack("<I", 7) + INNER, "not IP"),
        (147, INNER, "link type 147 is not known"),
    ],
)
def test_a_frame_without_ip_says_what_it_is(link, data, why):
    (one,) = frames(pcap(data, link=link))
    assert open_frame(one).missing == why


def whole() -> bytes:
    return pcap(INNER, INNER, link=101)


@pytest.mark.parametrize(
    ("data", "offset", "number", "why"),
    [
        (b"", 0, 1, "the file ends where the header should begin"),
        (b"\x1f\x8b\x08\x00", 0, 1, "neither pcap nor pcapng: begins with 1f8b0800 gzip"),
        (whole()[:20], 0, 1, "cut: the file header has 16 of 20 bytes"),
        (whole()[:-1], 24 + 16 + len(INNER), 2, "cut: the packet has"),
        (whole()[:30], 24, 1, "cut: a record header has 6 of 16 bytes"),
        (
            pcap(INNER, link=101) + struct.pack("<IIII", 0, 0, 1 << 30, 1),
            75,
            2,
            "damaged: a packet",
        ),
        (section() + enhanced(INNER, 1), 28, 1, "damaged: interface 0 has not been described"),
        (section() + interface()[:-4] + b"\0\0\0\0", 28, 1, "damaged: a block of 20 bytes says 0"),
        (section() + struct.pack("<II", 6, 8), 28, 1, "damaged: a block of 8 bytes"),
        (section() + interface(1, b"\x02\0\xff\0"), 28, 1, "damaged: an option of 255 bytes"),
        (section()[:8] + b"abcd" + section()[12:], 0, 1, "damaged: the byte-order magic"),
    ],
)
def test_damage_is_named_with_file_offset_and_packet(data, offset, number, why):
    with pytest.raises(CaptureError) as caught:
        frames(data)
    text = str(caught.value)
    assert text.startswith(f"x.pcap: offset {offset}: packet {number}: {why}")
    assert (caught.value.offset, caught.value.number) == (offset, number)


def test_frames_before_the_damage_are_given():
    found = []
    with pytest.raises(CaptureError):
        found.extend(read_frames(io.BytesIO(whole()[:-1]), "x"))
    assert [one.number for one in found] == [1]


def test_any_bytes_end_in_frames_or_one_error():
    """Every single damaged byte of both formats: never another exception."""
    samples = [whole(), section() + interface(101, option(2, b"veth0")) + enhanced(INNER, 1)]
    for sample in samples:
        for at in range(len(sample)):
            for value in (0, 0xFF, sample[at] ^ 1):
                damaged = sample[:at] + bytes((value,)) + sample[at + 1 :]
                try:
                    for one in frames(damaged):
                        open_frame(one)
                except CaptureError as error:
                    assert error.offset <= len(damaged)
