"""The TLS layer between a transport and a protocol, without a socket."""

import asyncio
import ssl
from contextlib import suppress

import pytest

from firewall.policy.snapshot import TlsContextRow
from l7proxy.certificates import Certificates
from l7proxy.secure import SecureTransport
from policytest.authority import Authority

NAME = "a.example"


class Raw:
    """What the layer needs of a socket's transport; keeps what was sent."""

    def __init__(self):
        self.sent = b""
        self.paused = self.closed = self.aborted = self.ended = False

    def set_protocol(self, protocol):
        self.protocol = protocol

    def write(self, data):
        assert not self.is_closing()
        self.sent += data

    def write_eof(self):
        self.ended = True

    def close(self):
        self.closed = True

    def abort(self):
        self.aborted = True

    def is_closing(self):
        return self.closed or self.aborted

    def pause_reading(self):
        self.paused = True

    def resume_reading(self):
        self.paused = False


class Inner(asyncio.Protocol):
    """Who gets the decrypted bytes; writes down what it is told."""

    def __init__(self):
        self.told = []

    def data_received(self, data):
        self.told.append(data)

    def eof_received(self):
        self.told.append("end")

    def connection_lost(self, exc):
        self.told.append("lost")


class Session:
    """A client, the layer, and what lies between them."""

    def __init__(self, folder, *, cut=1 << 20, protocols=("h2",)):
        authority = Authority()
        authority.secret(folder / "ns" / "web", NAME, ca=True)
        row = TlsContextRow("ns", "web")
        certificates = Certificates(folder)
        self.raw, self.inner, self.cut = Raw(), Inner(), cut
        self.chosen, self.failures = [], []
        self.layer = SecureTransport(
            self.raw,
            self.inner,
            certificates.towards_clients(row, http=True),
            server_side=True,
            ready=self.chosen.append,
            failed=self.failures.append,
        )
        self.reading, self.writing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = certificates.towards_servers(row, protocols)
        self.client = context.wrap_bio(self.reading, self.writing, server_hostname=NAME)

    def deliver(self):
        """Carry what each has written to the other, the client's in pieces."""
        data = self.writing.read()
        for start in range(0, len(data), self.cut):
            self.layer.data_received(data[start : start + self.cut])
        sent, self.raw.sent = self.raw.sent, b""
        self.reading.write(sent)

    def connect(self):
        for _ in range(4):
            with suppress(ssl.SSLWantReadError):
                self.client.do_handshake()
            self.deliver()
        assert (self.chosen, self.failures) == (["h2"], [])
        return self

    def say(self, data):
        self.client.write(data)
        self.deliver()


def play(test):
    """Run a test inside a loop; it is given the folder and may await."""

    def run(tmp_path):
        asyncio.run(test(tmp_path))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
def test_bytes_pass_both_ways_however_they_are_cut(tmp_path, cut):
    async def main():
        session = Session(tmp_path, cut=cut).connect()
        session.say(b"x" * 40_000)
        assert b"".join(session.inner.told) == b"x" * 40_000
        session.layer.write(b"y" * 40_000)
        session.deliver()
        answer = b""
        while len(answer) < 40_000:
            answer += session.client.read(65536)
        assert answer == b"y" * 40_000

    asyncio.run(main())


@play
async def test_close_notify_is_an_end_and_what_came_before_it_is_kept(folder):
    session = Session(folder).connect()
    session.client.write(b"last")
    with suppress(ssl.SSLError):
        session.client.unwrap()
    session.deliver()
    assert session.inner.told == [b"last", "end"]
    session.layer.write(b"answer")  # the other half is open
    session.layer.write_eof()
    session.deliver()
    assert session.client.read(100) == b"answer"
    assert session.raw.ended


@play
async def test_a_fin_without_close_notify_is_a_loss(folder):
    """RFC 8446 6.1: a truncation must not look complete."""
    session = Session(folder).connect()
    session.say(b"part")
    session.layer.eof_received()
    assert session.raw.aborted
    session.layer.connection_lost(None)
    assert session.inner.told == [b"part", "lost"]


@play
async def test_nothing_is_passed_on_while_paused_and_all_of_it_afterwards(folder):
    session = Session(folder).connect()
    session.layer.pause_reading()
    session.say(b"held")
    assert session.raw.paused
    assert session.inner.told == []
    session.layer.eof_received()  # cut, and not yet known to whom it matters
    assert not session.raw.aborted
    session.layer.resume_reading()
    await asyncio.sleep(0)
    assert session.inner.told == [b"held"]
    assert session.raw.aborted


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x02\x01\x00", b"\0"]
)
def test_a_failed_handshake_is_told_once(tmp_path, garbage):
    async def main():
        session = Session(tmp_path)
        session.layer.data_received(garbage)
        session.layer.eof_received()
        session.layer.connection_lost(None)
        assert len(session.failures) == 1
        assert session.inner.told == ["lost"]

    asyncio.run(main())


@play
async def test_garbage_inside_tls_ends_the_connection(folder):
    session = Session(folder).connect()
    session.layer.data_received(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert session.raw.aborted
    session.layer.write(b"nothing more")
    session.layer.data_received(b"x")
    assert session.inner.told == []


@play
async def test_closing_says_so_and_nothing_is_heard_afterwards(folder):
    session = Session(folder).connect()
    session.layer.close()
    assert session.raw.closed
    session.reading.write(session.raw.sent)
    assert session.client.read(1) == b""  # close_notify, not a cut
    session.layer.data_received(b"anything")
    assert session.inner.told == []
