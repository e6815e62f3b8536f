"""What the queue promises of itself, as far as it can be had without a queue."""

import struct

from firewall.datapath.nfqueue import _flags_message, _Turn, _verdict_head


class Wire:
    """A socket that has these messages."""

    def __init__(self, *messages: bytes) -> None:
        self.messages = list(messages)

    def recv(self, size: int) -> bytes:
        if not self.messages:
            raise BlockingIOError
        return self.messages.pop(0)


def message(kind: int, body: bytes = b"") -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def read(turn: _Turn) -> list[bytes]:
    found = []
    try:
        while True:
            found.append(turn.recv(4096))
    except BlockingIOError:
        return found


def test_a_turn_ends_after_its_number_of_messages():
    turn = _Turn(Wire(*[message(0x300)] * 10))
    turn.left = 4
    assert len(read(turn)) == 4
    turn.left = 100
    assert len(read(turn)) == 6


def test_refused_verdicts_are_counted_and_not_passed_on():
    turn = _Turn(Wire(message(0x300), message(2), message(2), message(0x300)))
    turn.left = 10
    assert len(read(turn)) == 2
    assert turn.refused_count == 2


def test_a_flood_of_errors_ends_the_turn_too():
    wire = Wire(*[message(2)] * 50)
    turn = _Turn(wire)
    turn.left = 10
    assert read(turn) == []
    assert len(wire.messages) == 40


def test_packets_that_came_during_the_configuration_are_handled_first():
    turn = _Turn(Wire(message(0x300, b"late")))
    turn.early.append(message(0x300, b"early"))
    turn.left = 10
    assert [found[16:] for found in read(turn)] == [b"early", b"late"]


def test_the_flags_message_is_what_the_kernel_reads():
    """struct nlmsghdr, struct nfgenmsg with the queue in network order, two big-endian u32."""
    data = _flags_message(258, 4)
    length, kind, flags, _, _ = struct.unpack_from("=IHHII", data)
    assert (length, kind, flags) == (len(data), 0x302, 5)
    assert data[16:20] == b"\0\0\1\2"
    assert data[24:28] == data[32:36] == b"\0\0\0\4"


def test_a_verdict_message_is_what_the_kernel_reads():
    """struct nlmsghdr, struct nfgenmsg, NFQA_VERDICT_HDR with verdict and packet number."""
    data = _verdict_head(0x303, 7, 12) + struct.pack("!II", 1, 99)
    length, kind, flags, _, _ = struct.unpack_from("=IHHII", data)
    assert (length, kind, flags) == (len(data), 0x303, 1)
    assert data[16:20] == b"\0\0\0\7"
    assert struct.unpack_from("=HH", data, 20) == (12, 2)
