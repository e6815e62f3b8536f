"""Random conversations between a client and a server, some of them with a liar in between.

A `Dialogue` makes one IPv4 packet after another: most continue what was said before, so that every
state of a flow is reached, and the others are wrong in a way that matters: another flag, a number
at or just behind an edge, an option. Everything comes from the given `random.Random`.
"""

import random
import socket
import struct

from kernel_tracker import CLIENT, SERVER, Shot
from packet_script import checksum

FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
_MODULUS = 1 << 32
_EDGES = (0, 0, 0, 1, -1, 2, -2, 10, -10, 1460, -1460, 30000, 65535, -65535, -66001, 66001, 1 << 20)
_FLAGS = (SYN, SYN | ACK, ACK, ACK, ACK | PSH, FIN | ACK, FIN | ACK, RST, RST | ACK)


def ipv4(reply: bool, protocol: int, payload: bytes, hop_limit: int = 64) -> bytes:
    """A packet from one side to the other."""
    ends = (SERVER, CLIENT) if reply else (CLIENT, SERVER)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, hop_limit, protocol, 0)
    head += socket.inet_aton(ends[0]) + socket.inet_aton(ends[1])
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def with_checksum(reply: bool, protocol: int, payload: bytes, at: int) -> bytes:
    """The transport's bytes with their checksum at `at`; it is the same both ways."""
    addresses = socket.inet_aton(CLIENT) + socket.inet_aton(SERVER)
    pseudo = addresses + struct.pack("!HH", protocol, len(payload))
    total = checksum((b"" if protocol == 1 else pseudo) + payload)
    return payload[:at] + struct.pack("!H", total) + payload[at + 2 :]


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

    protocol = "tcp"

    def __init__(self, chance: random.Random, port: int, liar: float) -> None:
        self.port = port
        self._chance = chance
        self._liar = liar
        self._sides = (Side(chance), Side(chance))
        self._turn = 0

    def next(self) -> Shot:
        """The next packet."""
        chance = self._chance
        if chance.random() < 0.02:
            reply = chance.random() < 0.5
            return Shot(self._error(reply), reply)
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
            if chance.random() < 0.1:
                left, right = ((other.next + chance.choice(_EDGES)) % _MODULUS for _ in range(2))
                options = struct.pack("!BBBBII", 1, 1, 5, 10, left, right)
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
        ports = (80, self.port) if reply else (self.port, 80)
        offset = (20 + len(options)) // 4 << 4
        head = struct.pack("!HHIIBBHHH", *ports, sequence, ack, offset, flags, window, 0, 0)
        return ipv4(reply, 6, with_checksum(reply, 6, head + options + b"x" * length, 16))

    def _error(self, reply: bool) -> bytes:
        """An ICMP error from one side about a segment of the other."""
        quoted = self._segment(not reply, ACK, self._sides[not reply].next, 0, 0, b"", 0)
        return icmp_error(self._chance, reply, quoted)


def icmp_error(chance: random.Random, reply: bool, quoted: bytes) -> bytes:
    """An ICMP error, sometimes cut or about a packet of its own direction."""
    kind = chance.choice(((3, 1), (3, 3), (3, 4), (11, 0), (12, 0), (4, 0)))
    if chance.random() < 0.2:
        quoted = quoted[: chance.choice((20, 24, 27))]
    if chance.random() < 0.1:
        quoted = quoted[:12] + quoted[16:20] + quoted[12:16] + quoted[20:]
    body = bytes((*kind, 0, 0)) + struct.pack("!I", 1400 if kind == (3, 4) else 0) + quoted
    return ipv4(reply, 1, with_checksum(reply, 1, body, 2))


class UdpDialogue:
    """Datagrams of one client port, either way, and errors about them."""

    protocol = "udp"

    def __init__(self, chance: random.Random, port: int, liar: float) -> None:
        self.port = port
        self._chance = chance
        self._liar = liar

    def next(self) -> Shot:
        """The next packet."""
        chance = self._chance
        reply = chance.random() < 0.4
        if chance.random() < self._liar / 2:
            quoted = self._datagram(not reply)
            return Shot(icmp_error(chance, reply, quoted), reply)
        return Shot(self._datagram(reply), reply)

    def _datagram(self, reply: bool) -> bytes:
        ports = (53, self.port) if reply else (self.port, 53)
        payload = b"x" * self._chance.randrange(3)
        datagram = struct.pack("!HHHH", *ports, 8 + len(payload), 0) + payload
        return ipv4(reply, 17, with_checksum(reply, 17, datagram, 6))


class IcmpDialogue:
    """Queries and answers of one identifier; not all that come were asked for."""

    protocol = "icmp"

    def __init__(self, chance: random.Random, port: int, liar: float) -> None:
        self.port = port
        self._chance = chance
        self._liar = liar
        self._pair = chance.choice(((8, 0), (8, 0), (13, 14), (15, 16), (17, 18)))

    def next(self) -> Shot:
        """The next packet."""
        chance = self._chance
        reply = chance.random() < 0.5
        kind = self._pair[reply]
        code = 0
        if chance.random() < self._liar:
            kind = chance.choice((*self._pair, 0, 8, 9, 10, 14, 19, 40))
            code = chance.choice((0, 0, 1))
        message = struct.pack("!BBHHH", kind, code, 0, self.port, 1) + b"x" * 8
        return Shot(ipv4(reply, 1, with_checksum(reply, 1, message, 2)), reply)
