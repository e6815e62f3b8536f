"""Hostile ClientHellos through a live proxy behind TPROXY, and what the server is sent of them.

Cases come from `hello_mutants`, whose reader must find one complete hello at the server, and in any
hello that some server could find no name that the policy does not allow. OpenSSL reads what came as
well. `arena` drives them.
"""

import ssl
from contextlib import suppress

import hellos
import msgspec
import pytest
from arena import Arena, Server, Slot, fight
from hello_mutants import ALLOWED, ROW, begins_whole, case, faults
from http_mutants import Case
from l7proxy_live import snapshot

pytestmark = [pytest.mark.needs("tproxy", "socket"), pytest.mark.timeout(0)]

PORT = 443


class HelloServer(Server):
    """Says what the case says once a hello is whole; after an alert it hears no other."""

    def __init__(self, sock, slot: Slot) -> None:
        super().__init__(sock, slot)
        self.received = b""
        self.heard = b""
        self.answered = False

    def take(self, data: bytes) -> None:
        self.received += data
        if not self.answered or self.slot.case.answers == [] or self.slot.case.answers[0][0] == 22:
            self.heard = self.received
        if not self.answered and begins_whole(self.received):
            self.answered = True
            self.slot.seen_count += 1
            self.sock.sendall(b"".join(self.slot.case.answers))


class HelloSlot(Slot):
    server_type = HelloServer

    def faults(self) -> list[str]:
        found = super().faults()
        for server in self.servers:
            found += faults(self.case.sent, server.received, server.heard)
            for name in openssl_names(server.heard):
                if name is None or not ALLOWED.fullmatch(name.encode().lower()):
                    found.append(f"OpenSSL reads {name!r}")
        if len(self.servers) > 1:
            found.append(f"{len(self.servers)} connections to the server")
        return found


def openssl_names(data: bytes) -> list[str | None]:
    """The server names that OpenSSL takes these bytes of a client for, None = none."""
    found: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda _side, name, _context: found.append(name)
    reading = ssl.MemoryBIO()
    reading.write(data)
    with suppress(ssl.SSLError):
        context.wrap_bio(reading, ssl.MemoryBIO(), server_side=True).do_handshake()
    return found


def source(**addresses):
    """A snapshot whose server has only `ROW` for its port."""
    made = snapshot(port=PORT, **addresses)
    replace = msgspec.structs.replace
    return replace(made, l7=(ROW, *made.l7[1:]))


@pytest.fixture
def arena(lab, tmp_path):
    made = Arena(lab, tmp_path, HelloSlot, PORT, source)
    with made.live:
        yield made
        made.close()


def test_the_server_never_sees_a_name_that_the_policy_denies(arena):
    assert openssl_names(hellos.real("b.example")) == ["b.example"]  # it can see something
    # Or nothing was put to the test; 25 % are usual.
    assert fight(arena, case, 15) > 0.05
    slot = arena.slots["10.77.0.1"]
    hello = hellos.real("a.example")
    assert arena.play(slot, 0, Case([hello], [hellos.retry_request()])) == []
    assert slot.received == hellos.retry_request()
    assert [server.received for server in slot.servers] == [hello]
