"""A random TCP conversation, with a liar in between; see `dialogues`."""

import random
import struct

from dialogues import TCP, Path, icmp_error
from kernel_tracker import Shot

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
_MODULUS = 1 << 32
_EDGES = (0, 0, 0, 1, -1, 2, -2, 10, -10, 1460, -1460, 30000, 65535, -65535, -66001, 66001, 1 << 20)
_FLAGS = (SYN, SYN | ACK, ACK, ACK, ACK | PSH, FIN | ACK, FIN | ACK, RST, RST | ACK)


class Side:
    """What one side of a TCP conversation has said."""

    def __init__(self, chance: random.Random) -> None:
        near_the_end = _MODULUS - chance.randrange(1, 5000)
        self.initial = chance.choice((chance.randrange(_MODULUS), near_the_end, 0))
        self.next = (self.initial + 1) % _MODULUS
        self.window = chance.choice((1, 1000, 29200, 65535))
        self.options = b""
        if chance.random() < 0.5:
            self.options += bytes((3, 3, chance.choice((0, 1, 7, 14, 15)), 1))
        if chance.random() < 0.5:
            self.options += b"\x04\x02\x01\x01"
        self.has_opened = self.has_ended = False


class TcpDialogue:
    """One TCP conversation of a client port."""

    def __init__(self, chance: random.Random, path: Path, liar: float) -> None:
        self._path = path
        self._port = chance.randrange(1024, 65536)
        self.name = path.name(TCP, self._port)
        self._chance = chance
        self._liar = liar
        self._sides = (Side(chance), Side(chance))
        self._turn = 0

    def next(self) -> Shot:
        """The next packet."""
        chance = self._chance
        if chance.random() < 0.02:
            reply = chance.random() < 0.5
            quoted = self._segment(not reply, ACK, self._sides[not reply].next, 0, 0, b"", 0)
            return icmp_error(chance, self._path, reply, quoted)
        reply, flags, sequence, ack, length = self._natural()
        options = b""
        own, other = self._sides[reply], self._sides[not reply]
        window = chance.choice((own.window, own.window, own.window, 0))
        if flags & SYN:
            options, window = own.options, own.window
        lies = chance.random() < self._liar
        if lies:
            reply, flags, sequence, ack, length = self._lie(reply, flags, sequence, ack, length)
            own, other = self._sides[reply], self._sides[not reply]
            if chance.random() < 0.2:
                window = chance.choice((0, 1, 512, 65535))
            if chance.random() < 0.2:
                options = self._lying_options(other.next)
        self._note(reply, flags, sequence, length)
        packet = self._segment(reply, flags, sequence, ack, window, options, length)
        return Shot(packet, reply)

    def _natural(self) -> tuple[bool, int, int, int, int]:
        """What a well-behaved end would send now."""
        chance, (client, server) = self._chance, self._sides
        if not client.has_opened:
            return False, SYN, client.initial, 0, 0
        if not server.has_opened:
            return True, SYN | ACK, server.initial, client.next, 0
        self._turn += 1
        if self._turn == 1:
            return False, ACK, client.next, server.next, 0
        reply = chance.random() < 0.5
        own, other = self._sides[reply], self._sides[not reply]
        if own.has_ended:
            if client.has_ended and server.has_ended and chance.random() < 0.2:
                self._sides = (Side(chance), Side(chance))  # the port is used again
                self._turn = 0
                return self._natural()
            return reply, ACK, own.next, other.next, 0
        kind = chance.random()
        if kind < 0.2:
            return reply, FIN | ACK, own.next, other.next, 0
        if kind < 0.6:
            return reply, ACK | PSH, own.next, other.next, chance.choice((1, 100, 1400))
        return reply, ACK, own.next, other.next, 0

    def _lie(
        self, reply: bool, flags: int, sequence: int, ack: int, length: int
    ) -> tuple[bool, int, int, int, int]:
        """Change one or two things of a segment."""
        chance = self._chance
        for _ in range(chance.choice((1, 1, 2))):
            match chance.randrange(6):
                case 0:
                    flags = chance.choice(_FLAGS)
                case 1:
                    sequence += chance.choice(_EDGES)
                case 2:
                    ack += chance.choice(_EDGES)
                case 3:
                    reply = not reply
                    own, other = self._sides[reply], self._sides[not reply]
                    sequence, ack = own.next, other.next
                case 4:
                    own = self._sides[reply]
                    base = chance.choice((own.initial, own.next, chance.randrange(_MODULUS)))
                    sequence = base + chance.choice(_EDGES)
                case _:
                    length = chance.choice((0, 1, 1400))
                    if chance.random() < 0.1:
                        flags = chance.randrange(256)
        if not flags & ACK and chance.random() < 0.7:
            ack = 0
        return reply, flags, sequence % _MODULUS, ack % _MODULUS, length

    def _lying_options(self, expected: int) -> bytes:
        """Selective acknowledgments around `expected`, or a list whose lengths do not fit."""
        chance = self._chance
        if chance.random() < 0.3:
            lists = (
                b"\x03\x03",
                b"\x05\x00\x01\x01",
                b"\x03\xff\x07\x00",
                b"\x02\x04\x05\xb4",
                b"\x00",
            )
            return (chance.choice(lists) + bytes(4))[:4]
        count = chance.randrange(1, 4)
        edges = [(expected + chance.choice(_EDGES)) % _MODULUS for _ in range(2 * count)]
        return struct.pack(f"!BBBB{2 * count}I", 1, 1, 5, 2 + 8 * count, *edges)

    def _note(self, reply: bool, flags: int, sequence: int, length: int) -> None:
        """Remember what has been said, as far as it continues the conversation."""
        own = self._sides[reply]
        end = (sequence + length + bool(flags & SYN) + bool(flags & FIN)) % _MODULUS
        if flags & SYN:
            own.has_opened = True
        if flags & RST:
            return
        if 0 < (end - own.next) % _MODULUS <= 1 << 17:
            own.next = end
        if flags & FIN and end == own.next:
            own.has_ended = True

    def _segment(  # noqa: PLR0917 -- the fields of a segment, in its order
        self, reply: bool, flags: int, sequence: int, ack: int, window: int, options: bytes,
        length: int,
    ) -> bytes:  # fmt: skip
        ports = (80, self._port) if reply else (self._port, 80)
        offset = (20 + len(options)) // 4 << 4
        head = struct.pack("!HHIIBBHHH", *ports, sequence, ack, offset, flags, window, 0, 0)
        return self._path.packet(reply, TCP, head + options + b"x" * length)
