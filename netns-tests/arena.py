"""Hostile clients and the servers behind a live proxy, many at a time, driven by one loop.

A connection of the server belongs to the case of its client's address; addresses rest before they
are used again, so that a connection that comes late is not another case's. Each case ends with the
client's FIN, so the proxy must come to an end as well: a case that does not is a finding too.

FUZZ_SECONDS is how long to go on (unless set, what the test says), FUZZ_SEED the first seed (random
unless set); a finding names its seed, and is made smaller before it is shown.
"""

import os
import random
import selectors
import socket
import struct
import time
from collections import deque
from contextlib import suppress

import pytest
from http_mutants import Case, shrunk
from l7proxy_live import Live

from conntrack.address import parse_address

BUSY_COUNT = 16
SLOT_COUNT = 240
DEADLINE_S = 30.0
"""For one case on a busy machine; it takes some milliseconds."""


class Server:
    """The server's end of one connection. To be subclassed."""

    def __init__(self, sock, slot: "Slot") -> None:
        self.sock = sock
        self.slot = slot
        self.closed = False

    def take(self, data: bytes) -> None:
        """Take what the proxy sent."""
        raise NotImplementedError


class Slot:
    """A client address, and the case that it plays. To be subclassed."""

    server_type: type[Server]

    def __init__(self, address: str) -> None:
        self.address = address
        self.seen_count = 0
        self.begin(0, Case([]))
        self.sock = None

    def begin(self, seed: int, played: Case) -> None:
        self.seed = seed
        self.case = played
        self.pieces = list(played.pieces)
        self.answers = list(played.answers)
        self.received = b""
        self.servers: list[Server] = []
        self.judged_count = 0
        self.client_ended = False
        self.deadline = time.monotonic() + DEADLINE_S

    @property
    def over(self) -> bool:
        return self.client_ended and all(server.closed for server in self.servers)

    def faults(self) -> list[str]:
        """What is wrong with the case now that it is over, or late."""
        return [] if self.over else ["the connection never ends"]


class Arena:
    """Clients, proxy and server.

    Args:
        lab: makes the hosts.
        folder: for the proxy's files.
        slot_type: plays and judges a case.
        port: of the server.
        source: makes the snapshot from the packed addresses of clients and servers.
    """

    def __init__(self, lab, folder, slot_type, port, source) -> None:
        self.port = port
        world = lab(a="app=a", b="app=b")
        self.client, self.server, self.node = world.hosts["a"], world.hosts["b"], world.node
        addresses = [f"10.77.0.{number}" for number in range(1, SLOT_COUNT + 1)]
        for address in addresses:
            self.client.run(["ip", "addr", "add", f"{address}/32", "dev", "eth0"], check=True)
        self.node.run(["ip", "route", "add", "10.77.0.0/24", "dev", "to-a"], check=True)
        made = source(
            clients=tuple(map(parse_address, addresses)),
            servers=(parse_address(self.server.address4),),
        )
        self.live = Live(self.node, folder, source=made)
        self.live.redirect(self.server.address4, port)
        self.slots = {address: slot_type(address) for address in addresses}
        self.selector = selectors.DefaultSelector()
        self.listener = self.server.listen(port, backlog=512)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ, None)

    def close(self) -> None:
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()
        self.selector.close()

    def begin(self, slot: Slot, seed: int, played: Case) -> None:
        slot.begin(seed, played)
        sock = self.client.open_socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind((slot.address, 0))
        sock.setblocking(False)
        sock.connect_ex((self.server.address4, self.port))
        slot.sock = sock
        self.selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, slot)

    def turn(self) -> None:
        for key, events in self.selector.select(0.2):
            if key.data is None:
                self._accept()
            elif isinstance(key.data, Slot):
                self._client(key.data, events)
            else:
                self._server(key.data)

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            while True:
                sock, peer = self.listener.accept()
                slot = self.slots[peer[0]]
                server = slot.server_type(sock, slot)
                slot.servers.append(server)
                sock.settimeout(2)
                self.selector.register(sock, selectors.EVENT_READ, server)

    def _client(self, slot: Slot, events: int) -> None:
        sock = slot.sock
        try:
            if events & selectors.EVENT_WRITE:
                if slot.pieces:
                    piece = slot.pieces[0]
                    sent = sock.send(piece)
                    slot.pieces[0:1] = [piece[sent:]] if sent < len(piece) else []
                if not slot.pieces:
                    self._leave(slot)
            if events & selectors.EVENT_READ and not slot.client_ended:
                data = sock.recv(65536)
                slot.received += data
                if not data:
                    self._end(slot)
        except BlockingIOError:
            return
        except OSError:  # the end, by FIN or RST
            self._end(slot)

    def _leave(self, slot: Slot) -> None:
        """Send nothing more."""
        if slot.case.ending == "fin":
            slot.sock.shutdown(socket.SHUT_WR)
            self.selector.modify(slot.sock, selectors.EVENT_READ, slot)
            return
        if slot.case.ending == "reset":
            slot.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._end(slot)

    def _end(self, slot: Slot) -> None:
        self.selector.unregister(slot.sock)
        slot.sock.close()
        slot.client_ended = True

    def _server(self, server: Server) -> None:
        try:
            data = server.sock.recv(65536)
            if data:
                server.take(data)
                return
        except OSError:
            pass
        self.selector.unregister(server.sock)
        server.sock.close()
        server.closed = True

    def play(self, slot: Slot, seed: int, played: Case) -> list[str]:
        """One case alone, from begin to end."""
        self.begin(slot, seed, played)
        while not slot.over and time.monotonic() < slot.deadline:
            self.turn()
        return self.finish(slot)

    def finish(self, slot: Slot) -> list[str]:
        """What was wrong with a case; nothing of it is left."""
        found = slot.faults()
        slot.judged_count = len(slot.servers)
        if not slot.client_ended:
            self.selector.unregister(slot.sock)
            slot.sock.close()
        for server in slot.servers:
            if not server.closed:
                self._drop(server)
        return found

    def late_faults(self, slot: Slot) -> list[str]:
        """What was wrong with connections to the server that came after a case had been judged."""
        if len(slot.servers) == slot.judged_count:
            return []
        slot.client_ended = True
        for server in slot.servers[slot.judged_count :]:
            if not server.closed:
                self._drop(server)
        return slot.faults()

    def _drop(self, server: Server) -> None:
        self.selector.unregister(server.sock)
        server.sock.close()
        server.closed = True


def fight(arena: Arena, case, seconds: float) -> float:
    """Play the cases of one seed after the other; how many of them there were.

    Fails with the smallest case that shows what is wrong. Afterwards nothing may be broken.
    """
    first = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(1 << 48))
    until = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", seconds))
    seed = first
    idle = deque(arena.slots.values())
    busy: list[Slot] = []
    while busy or time.monotonic() < until:
        while len(busy) < BUSY_COUNT and time.monotonic() < until:
            slot = idle.popleft()
            if late := arena.late_faults(slot):
                pytest.fail(f"FUZZ_SEED={slot.seed}, after its end: {late[:3]}\n{slot.case}")
            arena.begin(slot, seed, case(seed))
            busy.append(slot)
            seed += 1
        arena.turn()
        for slot in [one for one in busy if one.over or time.monotonic() > one.deadline]:
            busy.remove(slot)
            idle.append(slot)
            played, at = slot.case, slot.seed
            if faults := arena.finish(slot):
                explain(arena, slot, at, played, faults)
    assert arena.live.running, arena.live.log()
    assert "internal error" not in arena.live.log()
    seen_count = sum(slot.seen_count for slot in arena.slots.values())
    print(f"{seed - first} cases from FUZZ_SEED={first}, {seen_count} reached the server")
    return seen_count / (seed - first)


def explain(arena, slot, seed, played, faults) -> None:
    """Fail with the smallest case that shows it."""
    alone = arena.play(slot, seed, played)
    small = shrunk(played, lambda one: bool(arena.play(slot, seed, one))) if alone else played
    log = arena.live.log()[-2000:]
    pytest.fail(f"FUZZ_SEED={seed}: {faults[:3]}\nalone: {alone[:3]}\n{small}\n{log}")
