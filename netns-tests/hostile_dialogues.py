"""Conversations whose packets change on the way, and ICMP errors that quote all kinds of things.

What `dialogues` says of them holds here, too. IP headers stay right: the kernel drops what has a
wrong one before its tracker sees it.
"""

import random
import struct

from dialogues import (
    GRE,
    ICMP,
    ICMPV6,
    SCTP,
    TCP,
    UDP,
    IcmpDialogue,
    Path,
    PlainDialogue,
    SctpDialogue,
    UdpDialogue,
)
from kernel_tracker import Shot
from tcp_dialogue import TcpDialogue

_CHECKSUM = {ICMP: (2, 2), TCP: (16, 2), UDP: (6, 2), ICMPV6: (2, 2), SCTP: (8, 4)}
_ODD_BYTES = (0, 1, 2, 4, 5, 6, 11, 12, 0x45, 0x50, 0x7F, 0x80, 0xF0, 0xFF)


class MutantDialogue:
    """Any conversation, some of whose packets are cut or changed behind their IP header."""

    KINDS = (TcpDialogue, UdpDialogue, IcmpDialogue, PlainDialogue, SctpDialogue)

    def __init__(self, chance: random.Random, path: Path, liar: float) -> None:
        self._inner = chance.choice(self.KINDS)(chance, path, 0.1)
        self._path = path
        self.name = self._inner.name
        self._chance = chance
        self._liar = liar

    def next(self) -> Shot:
        """The next packet."""
        chance = self._chance
        shot = self._inner.next()
        protocol, body = _transport(shot.packet)
        if chance.random() > self._liar or protocol not in (*_CHECKSUM, GRE):
            return shot
        changed = bytearray(body)
        first = 0 if protocol in (ICMP, ICMPV6, GRE) else 4  # other ports are another flow
        for _ in range(chance.randrange(3) if len(changed) > first else 0):
            # Linux tells tunnels apart by GRE's call identifier, byte 6; we do not.
            at = chance.randrange(first, min(len(changed), 6 if protocol == GRE else 48))
            at += at == 8 and protocol in (ICMP, ICMPV6)  # the version of what an error quotes
            if at == len(changed):
                continue
            changed[at] = chance.choice((*_ODD_BYTES, chance.randrange(256)))
        if chance.random() < 0.3:
            del changed[chance.randrange(4, max(len(changed), 5)) :]
        if chance.random() < 0.1:
            changed += bytes(chance.randrange(1, 9))
        at, size = _CHECKSUM.get(protocol, (0, 0))
        changed[at : at + size] = bytes(len(changed[at : at + size]))
        if len(changed) < at + size:
            return Shot(_bare(self._path, shot.reply, protocol, bytes(changed)), shot.reply)
        return Shot(self._path.packet(shot.reply, protocol, bytes(changed)), shot.reply)


class QuoteDialogue:
    """A flow of any protocol, and errors that quote it, or nearly."""

    KINDS = (TcpDialogue, UdpDialogue, IcmpDialogue, PlainDialogue, SctpDialogue)

    def __init__(self, chance: random.Random, path: Path, liar: float) -> None:
        self._inner = chance.choice(self.KINDS)(chance, path, 0.0)
        self._path = path
        self.name = self._inner.name
        self._chance = chance
        self._liar = liar
        self._said: list[Shot] = []

    def next(self) -> Shot:
        """The next packet."""
        chance = self._chance
        if not self._said or chance.random() > self._liar:
            self._said.append(self._inner.next())
            return self._said[-1]
        told = chance.choice(self._said)
        reply = not told.reply if chance.random() < 0.9 else told.reply
        quoted = self._distorted(told.packet)[:1200]
        version = self._path.version
        kinds = (3, 3, 3, 11, 12, 4, 5, 6, 13) if version == 4 else (1, 1, 2, 3, 4, 5, 100, 127)
        kind, code = chance.choice(kinds), chance.choice((0, 0, 1, 3, 4, 13, 16))
        body = struct.pack("!BBHI", kind, code, 0, chance.choice((0, 1280, 68, 0x00110000)))
        path = self._path
        if chance.random() < 0.1:  # to somebody else
            stranger = path.client[:-1] + bytes((path.client[-1] ^ 0x40,))
            path = path._replace(client=stranger)
        protocol = ICMP if version == 4 else ICMPV6
        return Shot(path.packet(reply, protocol, body + quoted), reply)

    def _distorted(self, packet: bytes) -> bytes:
        """A packet as a router may quote it, or a liar."""
        chance, version = self._chance, self._path.version
        size = 20 if version == 4 else 40
        head, rest = bytearray(packet[:size]), packet[size:]
        least = 0
        draw = chance.random()
        if draw < 0.15:
            if version == 4:  # options in the quoted header
                words = chance.randrange(1, 11)
                head[0] = 0x45 + words
                rest = b"\x01" * (4 * words) + rest
            else:
                kinds = [chance.choice((0, 43, 60, 51)) for _ in range(chance.randrange(1, 4))]
                chain = b""
                for kind, following in zip(kinds, (*kinds[1:], head[6]), strict=True):
                    chain += bytes((following, 4 if kind == 51 else 0)) + bytes(
                        22 if kind == 51 else 6
                    )
                head[6] = kinds[0]
                rest = chain + rest
                least = size + len(chain)  # Linux does not mind if a header of the chain is cut
        elif draw < 0.25:  # a fragment
            offset = chance.choice((0, 0, 1, 185))
            if version == 4:
                head[6:8] = struct.pack("!H", 0x2000 | offset)
            else:
                rest = struct.pack("!BBHI", head[6], 0, offset << 3 | 1, 7) + rest
                head[6] = 44
                least = size + 8
        elif draw < 0.35:
            at = chance.randrange(1, len(head))  # Linux does not look at the quoted version
            head[at] = chance.choice((*_ODD_BYTES, chance.randrange(256)))
        elif draw < 0.45:
            changed = bytearray(rest)
            changed[chance.randrange(min(len(changed), 8))] ^= chance.choice((1, 0x80, 0xFF))
            rest = bytes(changed)
        quoted = bytes(head) + rest
        draw = chance.random()
        if draw < 0.3:
            return quoted[: max(least, size) + 8]
        if draw < 0.5:
            return quoted[: chance.randrange(least, len(quoted) + 1)]
        if draw < 0.6:
            return quoted + bytes(chance.randrange(1, 64))
        return quoted


def _transport(packet: bytes) -> tuple[int, bytes]:
    """Protocol and transport part of a packet; an extension header counts as the transport."""
    if packet[0] >> 4 == 4:
        return packet[9], packet[20:]
    return packet[6], packet[40:]


def _bare(path: Path, reply: bool, protocol: int, body: bytes) -> bytes:
    """A packet whose body ends before its checksum."""
    shell = path.packet(reply, 253, body)
    at = 9 if path.version == 4 else 6  # `numbered` mends the header's checksum
    return shell[:at] + bytes((protocol,)) + shell[at + 1 :]
