"""Hostile DNS through a live proxy behind TPROXY, over UDP and TCP, from both ends.

Cases come from `dns_mutants`, whose reader must find at the server one question for a name that
policy allows, and nothing else. What the proxy teaches the agent, played here, must stand in a
right answer to that very question; and a client gets what a server said, under its own id, or a
refusal.

FUZZ_SECONDS is how long (10 unless set), FUZZ_SEED the first seed (random unless set).
"""

import asyncio
import os
import random
import time
from collections import Counter, defaultdict
from contextlib import suppress

import dns.message
import dns.rrset
import pytest
from dns_mutants import addresses, allowed, question, questions, reply
from dns_realm import view
from http_mutants import cut
from l7proxy_live import Live

from conntrack.address import format_address
from firewall.control.agent_channel import AgentChannel
from firewall.control.messages import Learnt, Settled

pytestmark = [pytest.mark.needs("tproxy", "socket"), pytest.mark.timeout(0)]

PORT = 53
PLAYER_COUNT = 48
DEADLINE_S = 30.0
WAIT_S = 0.2
"""For an answer over UDP that may not come."""
ENOUGH = 50
PATIENCE_S = 120.0
TRUTH = b"\xc6\x33\x64\x4d"
LIMITS = ("dns_timeout_s=3", "dns_idle_timeout_s=5", "dns_pending_count_per_source=2000")


class Field:
    """Clients, the server behind the proxy, and its agent."""

    def __init__(self, lab, folder) -> None:
        world = lab(a="app=a", b="app=b")
        self.client, self.server = world.hosts["a"], world.hosts["b"]
        options = [word for limit in LIMITS for word in ("--set", limit)]
        source = view(client=self.client.address4).snapshot
        self.live = Live(world.node, folder, *options, source=source)
        for protocol in ("udp", "tcp"):
            self.live.redirect(self.server.address4, PORT, protocol)
        self.dice = random.Random()
        self.honest = False
        self.found: list[str] = []
        self.taught: set[bytes] = set()
        self.counts: Counter[str] = Counter()
        self.said: set[bytes] = set()
        self.leads: dict[tuple[bytes, ...], set[bytes]] = defaultdict(set)

    # --- the agent --------------------------------------------------------------------------------

    async def learn(self, agent: AgentChannel) -> None:
        async for message in agent:
            if isinstance(message, Learnt):
                self.counts["learnt"] += 1
                self.taught.update(message.addresses)
                name = tuple(message.name.encode().split(b"."))[:-1]
                extra = set(message.addresses) - self.leads[name]
                if extra or not allowed(name):
                    told = sorted(map(format_address, extra))
                    self.found.append(f"learnt {told} for {message.name}")
                await agent.send(Settled(message.token, enforced=True))

    # --- the server -------------------------------------------------------------------------------

    def serve(self, asked: bytes) -> bytes:
        """Judge what the server was asked; return what it says."""
        self.counts["asked"] += 1
        names = questions(asked)
        if len(names) != 1 or not all(map(allowed, names)):
            self.found.append(f"asked for {names}: {asked!r}")
        said = honest(asked) if self.honest else reply(asked, self.dice)
        self.said.add(said[2:])
        if said[:2] == asked[:2] and questions(said) == names:
            self.leads[names[0]] |= addresses(said, names[0])
        return said

    def datagram(self, sock) -> None:
        with suppress(OSError):
            asked, peer = sock.recvfrom(65535)
            sock.sendto(self.serve(asked), peer)

    async def stream(self, reader, writer) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while size := int.from_bytes(await reader.readexactly(2), "big"):
                said = framed(self.serve(await reader.readexactly(size)))
                if self.dice.random() < 0.05:  # a server that leaves within an answer
                    writer.write(said[: self.dice.randrange(len(said))])
                    break
                for piece in cut(said, self.dice):
                    writer.write(piece)
                    await writer.drain()
        writer.close()

    # --- clients ----------------------------------------------------------------------------------

    async def play(self, seed: int) -> None:
        dice = random.Random(seed)
        asked = [question(dice) for _ in range(dice.choice((1, 1, 2, 4)))]
        if dice.random() < 0.6:
            await self.play_datagrams(asked)
        else:
            sent = b"".join(map(framed, asked))
            if dice.random() < 0.2:
                at = dice.randrange(len(sent))
                sent = sent[:at] + dice.choice((b"", b"\0", b"\0\0")) + sent[at + 1 :]
            await self.play_stream(cut(sent, dice), "fin" if dice.random() < 0.9 else "close")

    async def play_datagrams(self, asked: list[bytes]) -> None:
        loop = asyncio.get_running_loop()
        with self.client.datagram() as sock:
            sock.setblocking(False)
            sock.connect((self.server.address4, PORT))
            for one in asked:
                sock.send(one)
            for _ in asked:
                try:
                    async with asyncio.timeout(WAIT_S):
                        self.judge(await loop.sock_recv(sock, 65535))
                except TimeoutError:
                    return

    async def play_stream(self, pieces: list[bytes], ending: str) -> None:
        with suppress(OSError):
            sock = self.client.open_socket(2, 1)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, (self.server.address4, PORT))
            reader, writer = await asyncio.open_connection(sock=sock)
            try:
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                if ending == "close":
                    return
                writer.write_eof()
                async with asyncio.timeout(DEADLINE_S):
                    while size := await reader.readexactly(2):
                        self.judge(await reader.readexactly(int.from_bytes(size, "big")))
            except asyncio.IncompleteReadError:
                return
            except TimeoutError:
                self.found.append(f"the connection never ends: {pieces}")
            finally:
                writer.close()

    def judge(self, said: bytes) -> None:
        """What a client got."""
        self.counts["answered"] += 1
        records = said[6:12] in (bytes(6), b"\0\0\0\0\0\1")  # none but OPT
        refusal = said[2] >> 7 and said[3] & 15 in (2, 5) and records
        if not refusal and said[2:] not in self.said:
            self.found.append(f"the client got what no server said: {said!r}")

    @property
    def tested(self) -> bool:
        """Whether enough was asked, learnt and answered: much more is usual within a second."""
        return min(self.counts[name] for name in ("asked", "learnt", "answered")) >= ENOUGH

    # --- all of it --------------------------------------------------------------------------------

    async def fight(self, seconds: float) -> int:
        """Play cases for so long; how many."""
        first = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(1 << 48))
        until = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", seconds))
        seeds = iter(range(first, first + (1 << 48)))
        loop = asyncio.get_running_loop()
        agent = AgentChannel(self.live.socket_path)
        await agent.connect(DEADLINE_S)
        learning = asyncio.create_task(self.learn(agent))
        sock = self.server.datagram(PORT)
        sock.setblocking(False)
        loop.add_reader(sock, self.datagram, sock)
        listener = await asyncio.start_server(self.stream, sock=self.server.listen(PORT))

        def goes_on() -> bool:
            """A machine that others keep busy needs longer to put something to the test."""
            over_s = time.monotonic() - until
            wanted = over_s < 0 or (over_s < PATIENCE_S and not self.tested)
            return wanted and not self.found

        async def player() -> None:
            while goes_on():
                await self.play(next(seeds))

        await asyncio.gather(*(player() for _ in range(PLAYER_COUNT)))
        self.honest = True
        async with asyncio.timeout(DEADLINE_S):
            while TRUTH not in self.taught:  # it still serves
                await self.play_datagrams([dns.message.make_query("api.example", "A").to_wire()])
        learning.cancel()
        agent.close()
        loop.remove_reader(sock)
        sock.close()
        listener.close()
        count = next(seeds) - first
        print(f"{count} cases from FUZZ_SEED={first}: {dict(self.counts)}")
        return count


def honest(asked: bytes) -> bytes:
    made = dns.message.make_response(dns.message.from_wire(asked))
    name = made.question[0].name
    made.answer.append(dns.rrset.from_text(name, 60, "IN", "A", format_address(TRUTH)))
    return made.to_wire()


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(2, "big") + message


def test_nobody_is_asked_taught_or_told_what_is_not_right(lab, tmp_path):
    field = Field(lab, tmp_path)
    with field.live:
        count = asyncio.run(field.fight(10))
        assert not field.found, f"{field.found[:3]}, {count} cases after the first seed"
        assert field.live.running, field.live.log()
        assert "internal error" not in field.live.log()
    assert field.tested, f"hardly anything was put to the test: {field.counts}"
