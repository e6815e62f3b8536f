"""What a wire does with its socket, and what it tells its protocol."""

import asyncio
import errno

import pytest

from l7proxy.poller import BUFFER_BYTES, READ, WRITE
from l7proxy.wire import Wire

FULL = BlockingIOError(errno.EAGAIN, "full")
RESET = ConnectionResetError(errno.ECONNRESET, "reset")


class Socket:
    """Answers `recv_into` and `send` as scripted: bytes or counts, or errors to raise."""

    def __init__(self, *, received=(), taken=()):
        self.received, self.taken = list(received), list(taken)
        self.sent, self.ended, self.closed = b"", False, False

    def fileno(self):
        return 7

    def recv_into(self, buffer):
        data = _next(self.received, FULL)[: len(buffer)]
        buffer[: len(data)] = data
        return len(data)

    def send(self, data):
        count = min(_next(self.taken, len(data)), len(data))
        self.sent += bytes(data[:count])
        return count

    def shutdown(self, how):
        self.ended = True

    def close(self):
        self.closed = True


def _next(script, otherwise):
    found = script.pop(0) if script else otherwise
    if isinstance(found, Exception):
        raise found
    return found


class Poller:
    """Remembers what is watched, and calls what was put off when told to."""

    def __init__(self):
        self.events, self.put_off = 0, []
        self.buffer = memoryview(bytearray(BUFFER_BYTES))

    def watch(self, descriptor, events, who):
        self.events = events

    def forget(self, descriptor):
        self.events = 0

    closed = forget

    def later(self, call):
        self.put_off.append(call)

    def go_on(self):
        while self.put_off:
            self.put_off.pop(0)()


class Inner(asyncio.Protocol):
    """Writes down what it is told."""

    def __init__(self, *, stays=True):
        self.told, self.stays = [], stays

    def data_received(self, data):
        self.told.append(data)

    def eof_received(self):
        self.told.append("end")
        return self.stays

    def connection_lost(self, exc):
        self.told.append(("lost", exc))

    def pause_writing(self):
        self.told.append("pause")

    def resume_writing(self):
        self.told.append("resume")


class Connection:
    """A wire between a scripted socket and a protocol."""

    def __init__(self, *, stays=True, **script):
        self.socket, self.poller, self.inner = Socket(**script), Poller(), Inner(stays=stays)
        self.wire = Wire(self.poller, self.socket, self.inner)

    @property
    def told(self):
        self.poller.go_on()
        return self.inner.told


def test_bytes_are_passed_on_and_a_fin_leaves_it_open():
    connection = Connection(received=[b"hello", b""])
    assert connection.poller.events == READ
    connection.wire.ready(READ)
    connection.wire.ready(READ)
    assert connection.told == [b"hello", "end"]
    assert not connection.socket.closed
    assert connection.poller.events == 0  # epoll would say so again and again


def test_a_protocol_that_wants_no_half_is_closed_with_the_fin():
    connection = Connection(received=[b""], stays=False)
    connection.wire.ready(READ)
    assert connection.told == ["end", ("lost", None)]
    assert connection.socket.closed


def test_an_event_without_anything_behind_it_is_nothing():
    connection = Connection()
    connection.wire.ready(READ | WRITE)
    assert connection.told == []
    assert not connection.wire.is_closing()


def test_what_was_passed_on_stays_when_more_is_read():
    connection = Connection(received=[bytes(1 << 20), b"next"])
    connection.wire.ready(READ)
    connection.wire.ready(READ)
    assert connection.told == [bytes(BUFFER_BYTES), b"next"]


def test_what_the_kernel_does_not_take_waits_and_goes_out_in_order():
    connection = Connection(taken=[3, FULL, 4])
    connection.wire.write(b"abcdef")
    connection.wire.write(b"ghi")
    assert connection.socket.sent == b"abc"
    assert connection.poller.events == READ | WRITE
    for _ in range(3):
        connection.wire.ready(WRITE)
    assert connection.socket.sent == b"abcdefghi"
    assert connection.poller.events == READ


def test_the_protocol_pauses_above_the_limit_and_goes_on_well_below_it():
    connection = Connection(taken=[FULL, 60, 40])
    connection.wire.set_write_buffer_limits(high=100)
    connection.wire.write(bytes(101))
    assert connection.told == ["pause"]
    connection.wire.ready(WRITE)
    assert connection.told == ["pause"]
    connection.wire.ready(WRITE)
    assert connection.told == ["pause", "resume"]


def test_a_fin_follows_what_waits():
    connection = Connection(taken=[FULL])
    connection.wire.write(b"last words")
    connection.wire.write_eof()
    assert not connection.socket.ended
    connection.wire.ready(WRITE)
    assert connection.socket.sent == b"last words"
    assert connection.socket.ended
    assert not connection.socket.closed


def test_close_waits_for_what_was_written_and_reads_no_more():
    connection = Connection(taken=[FULL], received=[b"late"])
    connection.wire.write(b"last words")
    connection.wire.close()
    assert connection.wire.is_closing()
    assert connection.poller.events == WRITE
    connection.wire.ready(READ)
    assert not connection.socket.closed
    connection.wire.ready(WRITE)
    assert connection.socket.closed
    assert connection.told == [("lost", None)]


def test_abort_forgets_what_waits_and_is_told_once_and_later():
    connection = Connection(taken=[FULL])
    connection.wire.write(b"last words")
    connection.wire.abort()
    connection.wire.abort()
    assert connection.socket.closed
    assert connection.inner.told == []  # not from within what the protocol does
    assert connection.told == [("lost", None)]
    connection.wire.write(b"more")
    assert connection.socket.sent == b""


def test_a_reset_is_a_loss():
    connection = Connection(received=[RESET])
    connection.wire.ready(READ)
    assert connection.told == [("lost", RESET)]


@pytest.mark.parametrize("waits", [False, True])
def test_an_early_answer_is_heard_although_its_sender_takes_nothing_more(waits):
    """RFC 9110 7.5: a server may answer and close before it has read the request."""
    connection = Connection(taken=[FULL, RESET] if waits else [RESET], received=[b"413", b""])
    connection.wire.write(b"body")
    if waits:
        connection.wire.ready(WRITE)
    connection.wire.write(b"more body")
    assert connection.told == []
    connection.wire.ready(READ)
    assert connection.told == [b"413"]
    connection.wire.ready(READ)
    assert connection.told == [b"413", ("lost", RESET)]  # no FIN: the answer may be cut


def test_nobody_waits_for_an_answer_that_is_not_read():
    connection = Connection(taken=[RESET])
    connection.wire.pause_reading()
    connection.wire.write(b"body")
    assert connection.told == [("lost", RESET)]


def test_nothing_is_read_while_paused():
    connection = Connection(received=[b"a"])
    connection.wire.pause_reading()
    assert connection.poller.events == 0
    connection.wire.ready(READ)
    assert connection.told == []
    connection.wire.resume_reading()
    connection.wire.ready(READ)
    assert connection.told == [b"a"]


def test_an_error_of_ours_ends_the_connection():
    connection = Connection()
    connection.wire.fail(ValueError("ours"))
    assert connection.socket.closed
    assert connection.told == [("lost", None)]


def test_another_protocol_can_take_over():
    connection, other = Connection(received=[b"for the other"]), Inner()
    connection.wire.set_protocol(other)
    connection.wire.ready(READ)
    assert other.told == [b"for the other"]
    assert connection.told == []
