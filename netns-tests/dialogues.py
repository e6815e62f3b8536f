"""Random conversations between a client and a server, some of them with a liar in between.

A dialogue makes one packet after another: most continue what was said before, so that every state
of a flow is reached, and the others are wrong in a way that matters: another flag, a number at or
just behind an edge, an option, a tag. Everything comes from the given `random.Random`. The TCP
dialogue is in `tcp_dialogue`.
"""

import random
import struct
from typing import NamedTuple, Protocol

from kernel_tracker import SERVER, SERVER6, FlowName, Shot
from packet_script import checksum

from conntrack.address import format_address, parse_address
from conntrack.checksum import crc32c

ICMP, TCP, UDP, GRE, ICMPV6, SCTP = 1, 6, 17, 47, 58, 132
OTHERS = (50, 51, 99, 253)
_CHECKSUM_AT = {ICMP: 2, TCP: 16, UDP: 6, ICMPV6: 2}


class Path(NamedTuple):
    """A client and the server, of one family; packed addresses."""

    client: bytes
    server: bytes

    @property
    def version(self) -> int:
        """4 or 6."""
        return 4 if len(self.client) == 4 else 6

    def name(self, protocol: int, number: int = 0) -> FlowName:
        """What the flow of a protocol and client port on this path is called."""
        return FlowName(protocol, format_address(self.client), number)

    def packet(self, reply: bool, protocol: int, body: bytes, extensions: bytes = b"") -> bytes:
        """A packet from one side to the other; the checksum of a known transport is filled in.

        Args:
            reply: from the server.
            protocol: of the body.
            body: from the transport header on, with zero where the checksum belongs.
            extensions: IPv6 extension headers, the last of which names the protocol; the first
                one's kind stands before them as one byte.
        """
        source, destination = (self.server, self.client) if reply else (self.client, self.server)
        body = _with_checksum(source + destination, protocol, body)
        if self.version == 4:
            head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, protocol, 0)
            head += source + destination
            return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body
        following, chain = (extensions[0], extensions[1:]) if extensions else (protocol, b"")
        length = len(chain) + len(body)
        head = struct.pack("!IHBB", 6 << 28, length, following, 64)
        return head + source + destination + chain + body


def _with_checksum(addresses: bytes, protocol: int, body: bytes) -> bytes:
    if protocol == SCTP:
        return body[:8] + crc32c(body).to_bytes(4, "little") + body[12:]
    at = _CHECKSUM_AT.get(protocol)
    if at is None:
        return body
    pseudo = addresses + struct.pack("!IHH", len(body), 0, protocol)
    total = checksum((b"" if protocol == ICMP else pseudo) + body)
    return body[:at] + struct.pack("!H", total or 0xFFFF) + body[at + 2 :]


def path(index: int, version: int) -> Path:
    """The path of the dialogue with this number: a client of its own."""
    if version == 4:
        high, low = divmod(index, 250)
        return Path(bytes((10, 201, 16 + high, 1 + low)), parse_address(SERVER))
    return Path(parse_address(f"fd00:201:1::{index + 16:x}"), parse_address(SERVER6))


class Dialogue(Protocol):
    """A conversation; `name` is the flow that its packets belong to."""

    name: FlowName

    def next(self) -> Shot:
        """The next packet."""


def icmp_error(chance: random.Random, path: Path, reply: bool, quoted: bytes) -> Shot:
    """An ICMP error, sometimes cut or about a packet of its own direction."""
    if chance.random() < 0.1:
        quoted = _turned(quoted)
    if path.version == 4:
        kind = chance.choice(((3, 1), (3, 3), (3, 4), (11, 0), (12, 0), (4, 0), (5, 1)))
        if chance.random() < 0.2:
            quoted = quoted[: chance.choice((20, 24, 27))]
        body = bytes((*kind, 0, 0)) + struct.pack("!I", 1400 if kind == (3, 4) else 0) + quoted
        return Shot(path.packet(reply, ICMP, body), reply)
    kind = chance.choice(((1, 0), (1, 4), (2, 0), (3, 0), (4, 1), (100, 0), (127, 0)))
    if chance.random() < 0.2:
        quoted = quoted[: chance.choice((40, 44, 47))]
    body = bytes((*kind, 0, 0)) + struct.pack("!I", 1400 if kind[0] == 2 else 0) + quoted
    return Shot(path.packet(reply, ICMPV6, body), reply)


def _turned(packet: bytes) -> bytes:
    at, size = (12, 4) if packet[0] >> 4 == 4 else (8, 16)
    middle = packet[at + size : at + 2 * size] + packet[at : at + size]
    return packet[:at] + middle + packet[at + 2 * size :]


class UdpDialogue:
    """Datagrams of one client port, either way, and errors about them."""

    def __init__(self, chance: random.Random, path: Path, liar: float) -> None:
        self._path = path
        self._port = chance.randrange(1024, 65536)
        self.name = path.name(UDP, self._port)
        self._chance = chance
        self._liar = liar

    def next(self) -> Shot:
        """The next packet."""
        chance = self._chance
        reply = chance.random() < 0.4
        if chance.random() < self._liar / 2:
            return icmp_error(chance, self._path, reply, self._datagram(not reply))
        return Shot(self._datagram(reply), reply)

    def _datagram(self, reply: bool) -> bytes:
        ports = (53, self._port) if reply else (self._port, 53)
        payload = b"x" * self._chance.randrange(3)
        length = 8 + len(payload)
        if self._chance.random() < self._liar / 4:
            length += self._chance.choice((-8, -1, 1, 8))
        datagram = struct.pack("!HHHH", *ports, max(length, 0), 0) + payload
        return self._path.packet(reply, UDP, datagram, self._extensions())

    def _extensions(self) -> bytes:
        """Now and then, some extension headers in any order (IPv6)."""
        chance = self._chance
        if self._path.version == 4 or chance.random() > self._liar:
            return b""
        kinds = [chance.choice((60, 43, 51, 60)) for _ in range(chance.randrange(1, 5))]
        if chance.random() < 0.3:
            kinds.insert(0, 0)  # hop-by-hop options: anywhere else no router takes them
        chain = b""
        for kind, following in zip(kinds, (*kinds[1:], UDP), strict=True):
            if kind == 51:
                chain += bytes((following, 4)) + bytes(22)
            elif kind == 43:
                chain += bytes((following, 0, chance.choice((0, 2, 4)))) + bytes(5)
            else:
                chain += bytes((following, 0, 1, 4)) + bytes(4)
        return bytes((kinds[0],)) + chain


class IcmpDialogue:
    """Queries and answers of one identifier; not all that come were asked for."""

    def __init__(self, chance: random.Random, path: Path, liar: float) -> None:
        self._path = path
        self._protocol = ICMP if path.version == 4 else ICMPV6
        self._identifier = chance.randrange(65536)
        self.name = path.name(self._protocol, self._identifier)
        self._chance = chance
        self._liar = liar
        pairs = ((8, 0), (8, 0), (13, 14), (15, 16), (17, 18))
        self._pair = chance.choice(pairs if path.version == 4 else ((128, 129), (139, 140)))

    def next(self) -> Shot:
        """The next packet."""
        chance = self._chance
        reply = chance.random() < 0.5
        kind = self._pair[reply]
        code = 0
        if chance.random() < self._liar:
            lies = (0, 8, 9, 10, 14, 19, 40) if self._protocol == ICMP else (138, 141, 144, 200)
            kind = chance.choice((*self._pair, *lies))
            code = chance.choice((0, 0, 1))
        if chance.random() < self._liar / 4:
            query = self._message(self._pair[0], 0)
            return icmp_error(chance, self._path, True, self._path.packet(False, *query))
        return Shot(self._path.packet(reply, *self._message(kind, code)), reply)

    def _message(self, kind: int, code: int) -> tuple[int, bytes]:
        message = struct.pack("!BBHHH", kind, code, 0, self._identifier, 1) + b"x" * 8
        return self._protocol, message


class PlainDialogue:
    """A protocol without ports: GRE, tunnels, or a number that nobody knows."""

    def __init__(self, chance: random.Random, path: Path, liar: float) -> None:
        self._path = path
        self._protocol = chance.choice((GRE, GRE, *OTHERS))
        if path.version == 6 and self._protocol == 51:
            self._protocol = 50  # over IPv6 an authentication header is an extension header
        self.name = path.name(self._protocol)
        self._chance = chance
        self._liar = liar

    def next(self) -> Shot:
        """The next packet."""
        chance = self._chance
        reply = chance.random() < 0.4
        if chance.random() < self._liar / 2:
            return icmp_error(chance, self._path, reply, self._packet(not reply))
        return Shot(self._packet(reply), reply)

    def _packet(self, reply: bool) -> bytes:
        body = b"\0\0\x08\0" + bytes(20)
        if self._protocol == GRE and self._chance.random() < self._liar:
            flags = self._chance.choice((0x2000, 0x3001, 0x0001, 0x0002, 0x0007, 0x2081))
            kind = self._chance.choice((0x0800, 0x880B))
            body = struct.pack("!HH", flags, kind) + bytes(self._chance.choice((0, 4, 12)))
        return self._path.packet(reply, self._protocol, body)


class SctpDialogue:
    """One association of a client port: its life, and chunks out of place."""

    _LIFE = (
        (False, 1), (True, 2), (False, 10), (True, 11), (False, 0), (True, 3), (True, 0),
        (False, 3), (False, 4), (True, 5), (False, 7), (True, 8), (False, 14),
    )  # fmt: skip
    _KINDS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 192)

    def __init__(self, chance: random.Random, path: Path, liar: float) -> None:
        self._path = path
        self._port = chance.randrange(1024, 65536)
        self.name = path.name(SCTP, self._port)
        self._chance = chance
        self._liar = liar
        self._tags = (chance.getrandbits(32) or 1, chance.getrandbits(32) or 1)
        self._at = 0

    def next(self) -> Shot:
        """The next packet."""
        chance = self._chance
        reply, kind = self._LIFE[self._at % len(self._LIFE)]
        flags = 0
        tag = 0 if kind == 1 else self._tags[not reply]
        if chance.random() < self._liar:
            match chance.randrange(5):
                case 0:
                    kind = chance.choice(self._KINDS)
                case 1:
                    kind, reply = chance.choice(self._KINDS), chance.random() < 0.5
                    tag = 0 if kind == 1 else self._tags[not reply]
                case 2:
                    tag = chance.choice((0, self._tags[reply], chance.getrandbits(32)))
                case 3:
                    kind = chance.choice((6, 14))
                    flags = chance.choice((0, 1))
                    tag = self._tags[chance.random() < 0.5]
                case _:
                    reply = not reply
        elif kind == 10 and chance.random() < 0.3:
            self._at += 1
            chunks = self._chunk(reply, 10, 0) + self._chunk(reply, 0, 0)
            return Shot(self._packet(reply, tag, chunks), reply)
        else:
            self._at += 1
        return Shot(self._packet(reply, tag, self._chunk(reply, kind, flags)), reply)

    def _chunk(self, reply: bool, kind: int, flags: int) -> bytes:
        if kind in (1, 2):
            other = self._chance.random() < self._liar / 4
            tag = self._chance.getrandbits(32) if other else self._tags[reply]
            body = struct.pack("!IIHHI", tag, 65535, 1, 1, 7)
        elif kind in (8, 11, 14):
            body = b""
        elif kind == 7:
            body = bytes(4)
        else:
            body = bytes(12)
        return struct.pack("!BBH", kind, flags, 4 + len(body)) + body

    def _packet(self, reply: bool, tag: int, chunks: bytes) -> bytes:
        ports = (3868, self._port) if reply else (self._port, 3868)
        return self._path.packet(reply, SCTP, struct.pack("!HHII", *ports, tag, 0) + chunks)
