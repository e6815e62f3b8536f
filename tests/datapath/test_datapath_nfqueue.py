"""What the queue promises of itself, as far as it can be had without a queue."""

import struct

import pytest

from firewall.datapath.nfqueue import _decided, _flags_message, _Turn


class Wire:
    """A socket that has these messages."""

    def __init__(self, *messages: bytes) -> None:
        self.messages = list(messages)

    def recv(self, size: int) -> bytes:
        if not self.messages:
            raise BlockingIOError
        return self.messages.pop(0)


class Packet:
    """Remembers its verdicts; refuses a second one, as the library does."""

    def __init__(self) -> None:
        self.verdicts: list[str] = []

    def accept(self) -> None:
        self._give("accept")

    def drop(self) -> None:
        self._give("drop")

    def _give(self, verdict: str) -> None:
        if self.verdicts:
            raise RuntimeError("Verdict already given for this packet")
        self.verdicts.append(verdict)


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


def test_a_callback_that_fails_before_its_verdict_drops():
    packet = Packet()

    def fail(_packet):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _decided(fail)(packet)
    assert packet.verdicts == ["drop"]


def test_a_callback_that_fails_after_its_verdict_does_not_change_it():
    packet = Packet()

    def fail(given):
        given.accept()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _decided(fail)(packet)
    assert packet.verdicts == ["accept"]


def test_the_flags_message_is_what_the_kernel_reads():
    """struct nlmsghdr, struct nfgenmsg with the queue in network order, two big-endian u32."""
    data = _flags_message(258, 4)
    length, kind, flags, _, _ = struct.unpack_from("=IHHII", data)
    assert (length, kind, flags) == (len(data), 0x302, 5)
    assert data[16:20] == b"\0\0\1\2"
    assert data[24:28] == data[32:36] == b"\0\0\0\4"
