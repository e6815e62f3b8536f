"""Hostile clients and servers around a live proxy behind TPROXY, and an observer at the server.

Cases come from `http_mutants`; what the server receives is read by `http_observer`, which must not
see a request that the policy does not allow, under any reading, and by `http_sent`, for which
nothing may come that the client did not ask for. `arena` drives them.
"""

import socket
from functools import partial

import pytest
from arena import Arena, Server, Slot, fight
from http_answers import stream_faults
from http_mutants import RULES, Case, case
from http_observer import PREFACE, Observer, answer_faults
from http_sent import asked, unasked
from l7proxy_live import snapshot

pytestmark = [pytest.mark.needs("tproxy", "socket"), pytest.mark.timeout(0)]

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


class HttpServer(Server):
    """Answers each request with what the case says, then with the plain answer."""

    def __init__(self, sock, slot: Slot) -> None:
        super().__init__(sock, slot)
        self.observer = Observer()
        self.greeted = False

    def take(self, data: bytes) -> None:
        self.observer.raw += data
        if self.observer.is_h2 and not self.greeted:
            self.greeted = True
            self.sock.sendall(SETTINGS)
        for seen in self.observer.complete():
            self.slot.seen_count += 1
            if self.observer.is_h2:
                self.sock.sendall(b"\x00\x00\x01\x01\x05%b\x88" % seen.number.to_bytes(4, "big"))
            elif self.slot.answers and seen.method != b"HEAD":
                self.sock.sendall(self.observer.answer(seen, self.slot.answers.pop(0)))
                if self.observer.switched_at is None:
                    self.sock.shutdown(socket.SHUT_WR)
                return
            else:
                self.sock.sendall(PLAIN)


class HttpSlot(Slot):
    server_type = HttpServer

    def faults(self) -> list[str]:
        observers = [server.observer for server in self.servers]
        found = [fault for observer in observers for fault in observer.faults()]
        found += unasked(self.case.sent, observers)
        if self.case.sent.startswith(PREFACE):
            found += stream_faults(self.received)
        else:  # one for each request, and one more for what is none
            methods = [*(one.method for one in asked(self.case.sent)), b"GET"]
            switched = any(one.switched_at for one in observers)
            found += answer_faults(self.received, methods, switched=switched)
        return found + super().faults()


@pytest.fixture
def arena(lab, tmp_path):
    made = Arena(lab, tmp_path, HttpSlot, 80, partial(snapshot, rules=RULES))
    with made.live:
        yield made
        made.close()


def test_the_server_never_sees_what_the_policy_denies(arena):
    # Or nothing was put to the test; 20 % are usual.
    assert fight(arena, case, 30) > 0.05
    slot = arena.slots["10.77.0.1"]
    assert arena.play(slot, 0, Case([b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"])) == []
    assert slot.received == PLAIN
