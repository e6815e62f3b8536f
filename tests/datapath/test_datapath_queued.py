"""Messages of the queue, as the kernel writes and reads them."""

import struct
from itertools import permutations

import pytest

from firewall.datapath.netlink import error_code
from firewall.datapath.queued import (
    Verdicts,
    flags_message,
    is_error,
    read_packet,
)

PACKET_HDR, MARK, TIMESTAMP, INDEV, OUTDEV, PHYSINDEV = 1, 3, 4, 5, 6, 7
HWADDR, PAYLOAD, CAP_LEN, SKB_INFO = 9, 10, 13, 14

IP = bytes(range(37))  # no multiple of four: attributes are padded, the packet is not
INTERFACE = (INDEV, struct.pack("!I", 5))
SENDER = (HWADDR, struct.pack("!HH6sH", 6, 0, b"\2\0\0\0\0\1", 0))
CHECKSUM = (SKB_INFO, struct.pack("!I", 1))
PACKET = (PAYLOAD, IP)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def told(*attributes: tuple[int, bytes], number: int = 0x01020304, hook: int = 3) -> bytes:
    head = (PACKET_HDR, struct.pack("!IHB", number, 0x800, hook))
    body = struct.pack("!BBH", 2, 0, 7) + b"".join(attribute(*one) for one in (head, *attributes))
    return struct.pack("=IHHII", 16 + len(body), 0x300, 0, 0, 0) + body


@pytest.mark.parametrize("between", [(), (CHECKSUM,)], ids=["plain", "with checksum state"])
def test_the_usual_layouts(between):
    message = told(INTERFACE, SENDER, *between, PACKET)
    assert read_packet(message) == (0x01020304, 3, 5, 0, 0, IP)


def test_any_layout_says_the_same():
    extra = [
        (MARK, struct.pack("!I", 0xFF000001)),
        (PHYSINDEV, struct.pack("!I", 9)),
        (TIMESTAMP, bytes(16)),
        INTERFACE,
        SENDER,
    ]
    for order in permutations(extra):
        assert read_packet(told(*order, PACKET)) == (0x01020304, 3, 5, 9, 0xFF000001, IP)


@pytest.mark.parametrize("kind", [MARK, TIMESTAMP, OUTDEV, CAP_LEN, 77])
def test_a_layout_that_differs_in_one_attribute_is_not_taken_for_a_usual_one(kind):
    value = struct.pack("!I", 0x01000000)
    mark = 0x01000000 if kind == MARK else 0
    for order in permutations([INTERFACE, SENDER, (kind, value)]):
        assert read_packet(told(*order, PACKET)) == (0x01020304, 3, 5, 0, mark, IP)


def test_what_the_node_sends_has_no_interface():
    assert read_packet(told(PACKET)) == (0x01020304, 3, 0, 0, 0, IP)


def test_a_packet_without_payload_is_empty():
    assert read_packet(told(INTERFACE, SENDER))[-1] == b""


@pytest.mark.parametrize("attributes", [(INTERFACE, SENDER, CHECKSUM, PACKET), (PACKET,)])
def test_a_message_that_was_cut_has_a_shorter_packet(attributes):
    whole = told(*attributes)
    for size in range(len(whole)):
        if size < 32:
            continue
        *_, payload = read_packet(whole[:size])
        assert IP.startswith(payload) and (len(payload) < len(IP) or size >= len(whole) - 3)


def test_attributes_of_no_length_end_the_walk():
    message = told((MARK, bytes(4)), PACKET)
    endless = message[:32] + bytes(len(message) - 32)
    assert read_packet(endless)[-1] == b""


def test_errors_are_told_from_packets():
    error = struct.pack("=IHHIIi", 36, 2, 0, 0, 0, -2) + bytes(16)
    assert is_error(error) and error_code(error) == -2
    assert not is_error(told(PACKET))


def test_the_flags_message_is_what_the_kernel_reads():
    """Two big-endian u32 behind the queue in network order."""
    data = flags_message(258, 4)
    length, kind, flags, _, _ = struct.unpack_from("=IHHII", data)
    assert (length, kind, flags) == (len(data), 0x302, 5)
    assert data[16:20] == b"\0\0\1\2"
    assert data[24:28] == data[32:36] == b"\0\0\0\4"


@pytest.mark.parametrize(
    ("message", "kind", "verdict"),
    [
        (Verdicts(7).accept_up_to(99), 0x303, 1),
        (Verdicts(7).drop(99), 0x301, 0),
        (Verdicts(7).repeat(99, 0x12345678), 0x301, 4),
    ],
)
def test_a_verdict_message_is_what_the_kernel_reads(message, kind, verdict):
    """NFQA_VERDICT_HDR with verdict and packet number; NFQA_MARK."""
    assert struct.unpack_from("=IHHII", message)[:3] == (len(message), kind, 1)
    assert message[16:20] == b"\0\0\0\7"
    assert struct.unpack_from("=HH", message, 20) == (12, 2)
    assert struct.unpack_from("!II", message, 24) == (verdict, 99)
    assert message[32:] in {b"", attribute(MARK, b"\x12\x34\x56\x78")}
