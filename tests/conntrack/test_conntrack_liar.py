"""A liar beside the path, who knows both ends and guesses numbers, changes nothing (STRICT).

Every conversation is followed twice, alone and with the liar's segments in between: what is said of
the conversation's own segments must be the same, and so must be what is left of the flow.

A SYN needs no number. Of several that nobody has answered the latest counts (vector
tcp-two-syns-synack-for-first), so a forged one delays the handshake until the client repeats its
own; once the flow is over any SYN may use its port again. Then the liar sends none.
"""

import random
import struct

import pytest

from conntrack.packet import Packet, parse
from conntrack.tracker import STRICT, CtState, Tracker

CLIENT, SERVER = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
LIES = (SYN, SYN | ACK, ACK, ACK | PSH, FIN | ACK, RST, RST | ACK, 0, FIN | SYN)
CONVERSATIONS = 60  # for each seed


def segment(  # noqa: PLR0917 -- the fields of a segment, in its order
    reply: bool, flags: int, sequence: int, ack: int, window: int, options: bytes, data_bytes: int
) -> Packet:
    ends, ports = (SERVER + CLIENT, (80, 4000)) if reply else (CLIENT + SERVER, (4000, 80))
    offset = (20 + len(options)) // 4 << 4
    numbers = (sequence % 2**32, ack % 2**32)
    body = struct.pack("!HHIIBBHHH", *ports, *numbers, offset, flags, window, 0, 0)
    body += options + bytes(data_bytes)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, 6, 0)
    return parse(head + ends + body)


class Conversation:
    """A connection from SYN to last ACK, as its ends would have it."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._next = [chance.getrandbits(32), chance.getrandbits(32)]
        scale = chance.choice((None, 0, 7))
        self._options = b"" if scale is None else bytes((3, 3, scale, 1))
        self._window = chance.choice((1000, 65535))
        self.window_bytes = self._window << (scale or 0)

    def segments(self) -> list[Packet]:
        chance, first = self._chance, self._chance.random() < 0.5
        said = [self._say(False, SYN), self._say(True, SYN | ACK), self._say(False, ACK)]
        for _ in range(chance.randrange(8)):
            reply = chance.random() < 0.5
            said.append(self._say(reply, ACK | PSH, chance.choice((1, 100, 900))))
            said.append(self._say(not reply, ACK))
        said += [self._say(first, FIN | ACK), self._say(not first, ACK)]
        if chance.random() < 0.5:
            said += [self._say(not first, ACK | PSH, 100), self._say(first, ACK)]
        return [*said, self._say(not first, FIN | ACK), self._say(first, ACK)]

    def _say(self, reply: bool, flags: int, data_bytes: int = 0) -> Packet:
        opening = flags & SYN
        sequence, ack = self._next[reply], self._next[not reply] if flags & ACK else 0
        self._next[reply] += data_bytes + bool(flags & (SYN | FIN))
        options = self._options if opening else b""
        return segment(reply, flags, sequence, ack, self._window, options, data_bytes)


def lie(chance: random.Random) -> Packet:
    """A segment of either end, with numbers that are not its."""
    numbers = chance.getrandbits(32), chance.choice((0, chance.getrandbits(32)))
    options = chance.choice((b"", bytes((3, 3, 14, 1))))
    window, data_bytes = chance.choice((0, 1, 65535)), chance.choice((0, 0, 1, 1400))
    flags = chance.choice(LIES)
    return segment(chance.random() < 0.5, flags, *numbers, window, options, data_bytes)


class Follower:
    """A tracker that confirms what it lets pass; nobody lets the server open flows."""

    def __init__(self) -> None:
        self._tracker = Tracker(STRICT)

    def hears(self, packet: Packet, now: float) -> CtState:
        tracked = self._tracker.track(packet, now)
        if tracked.entry is not None or packet.source == CLIENT:
            self._tracker.confirm(tracked, now)
        return tracked.ctstate

    def waits_for_syn(self) -> bool:
        """Whether a SYN of the client means something."""
        return any(
            entry.state_name in ("SYN_SENT", "TIME_WAIT") for entry in self._tracker.entries()
        )

    def left(self) -> list[tuple[str, bool, bool, float]]:
        """What can be said of the flow."""
        return [
            (entry.state_name, entry.seen_reply, entry.assured, entry.expires_at)
            for entry in self._tracker.entries()
        ]


@pytest.mark.parametrize("seed", range(5))
def test_a_liar_who_guesses_numbers_changes_nothing(seed: int) -> None:
    chance = random.Random(20261128 + seed)
    for _ in range(CONVERSATIONS):
        alone, attacked = Follower(), Follower()
        now = 0.0
        for said in Conversation(chance).segments():
            now += chance.choice((0.01, 0.1))
            assert attacked.hears(said, now) == alone.hears(said, now)
            assert attacked.left() == alone.left()
            for _ in range(chance.randrange(4)):
                told = lie(chance)
                if told.tcp_flags != SYN or told.source == SERVER or not alone.waits_for_syn():
                    attacked.hears(told, now)
            assert attacked.left() == alone.left()


def near_lie(chance: random.Random, said: dict[bytes, Packet], window_bytes: int) -> Packet:
    """Data of either end that its receiver may take, or that begins some windows from there."""
    source = chance.choice((CLIENT, SERVER))
    own, other = said[source], said[SERVER if source == CLIENT else CLIENT]
    sequence = own.sequence + chance.randrange(-window_bytes, 4 * window_bytes)
    ack = other.sequence + other.payload_bytes - chance.choice((0, 1, 100))
    data_bytes = chance.choice((0, 1, 1400))
    return segment(source == SERVER, ACK | PSH, sequence, ack, 1000, b"", data_bytes)


@pytest.mark.parametrize("seed", range(5))
def test_a_liar_whose_numbers_are_near_has_no_segment_of_the_ends_refused(seed: int) -> None:
    """Data that a receiver may take moves the windows; it must not move them away from the ends."""
    chance = random.Random(20261129 + seed)
    for _ in range(CONVERSATIONS):
        follower, conversation = Follower(), Conversation(chance)
        window_bytes = conversation.window_bytes
        said: dict[bytes, Packet] = {}
        for number, packet in enumerate(conversation.segments()):
            now = number / 100
            assert follower.hears(packet, now) is not CtState.INVALID
            said[packet.source] = packet
            if number > 1 and not packet.tcp_flags & FIN:
                for _ in range(chance.randrange(4)):
                    follower.hears(near_lie(chance, said, window_bytes), now)
