"""SCTP: an association opens with INIT, and only who knows the verification tag may move it.

Each side tells the other in INIT or INIT ACK which tag its packets must carry (RFC 9260 section
8.5). A box that has seen both knows both, so a packet with a wrong tag is INVALID: it is the
protection that sequence numbers give TCP. INIT itself carries tag 0; ABORT and SHUTDOWN COMPLETE
may reflect the receiver's own tag when they have the T bit (section 8.5.1).

Chunks are read as far as the packet was copied; the chunks that move an association come first in a
packet (section 6.10), so what a short copy cuts off is data.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from conntrack.entry import REOPENS, Entry, Judgement, Update, invalid
from conntrack.flow import Direction
from conntrack.packet import Packet
from conntrack.profile import Profile
from conntrack.sctp_states import CHUNK_OF_TYPE, IV, SCTP_TABLE, SctpChunk, SctpState

_CHUNK_HEADER_BYTES: Final = 4  # type, flags, length: RFC 9260 section 3.2
_INIT_BYTES: Final = 20  # section 3.3.2: header and fixed parameters
_REFLECTED: Final = 1  # T bit: the tag is the receiver's own (section 3.3.7)
_ALONE: Final = frozenset((SctpChunk.INIT, SctpChunk.INIT_ACK, SctpChunk.SHUTDOWN_COMPLETE))


class _Chunk(NamedTuple):
    """One chunk: its meaning, its flags byte, and the tag it announces (INIT, INIT ACK; else 0)."""

    kind: SctpChunk
    flags: int
    tag: int


class ChunkError(ValueError):
    """A chunk that contradicts itself; the text is the reason for INVALID."""


def _chunks(packet: Packet) -> Iterator[_Chunk]:
    """The chunks of a packet, as far as they were copied.

    Raises:
        ChunkError: a length under the header's, or an INIT that announces no tag.
    """
    data = packet.options
    at = 0
    while at + _CHUNK_HEADER_BYTES <= len(data):
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if length < _CHUNK_HEADER_BYTES:
            raise ChunkError("chunk shorter than its header")
        if at + length > packet.payload_bytes:
            raise ChunkError("chunk longer than its packet")
        kind = CHUNK_OF_TYPE.get(data[at], SctpChunk.OTHER)
        tag = 0
        if kind in (SctpChunk.INIT, SctpChunk.INIT_ACK):
            tag = int.from_bytes(data[at + 4 : at + 8], "big")
            if length < _INIT_BYTES or tag == 0:
                raise ChunkError("INIT announces no tag")
        yield _Chunk(kind, data[at + 1], tag)
        at += (length + 3) & ~3  # chunks are padded to 4 bytes


def _read(packet: Packet) -> list[_Chunk]:
    chunks = list(_chunks(packet))
    if not chunks:
        raise ChunkError("packet without chunks")
    if len(chunks) > 1 and any(chunk.kind in _ALONE for chunk in chunks):
        raise ChunkError("chunk that must be alone is bundled")  # section 6.10
    return chunks


def first(packet: Packet, profile: Profile) -> Judgement:
    """Judge a packet that belongs to no association."""
    try:
        chunks = _read(packet)
    except ChunkError as error:
        return invalid(str(error))
    opener = chunks[0]
    state = SCTP_TABLE[0][opener.kind][SctpState.NONE]
    if state == IV:
        return invalid("an association begins with INIT")
    if opener.kind == SctpChunk.INIT:
        if packet.sequence != 0:
            return invalid("INIT carries a verification tag")  # section 8.5.1 A
        tags = (0, opener.tag)
    else:
        tags = (packet.sequence, 0)
    if profile.strict and 0 in (packet.source_port, packet.destination_port):
        return invalid("port 0 is reserved")
    return Update(state, profile.timeouts.sctp[state], False, False, None, tags, False)


def follow(entry: Entry, packet: Packet, direction: int, profile: Profile) -> Judgement:
    """Judge a packet of a known association."""
    try:
        chunks = _read(packet)
    except ChunkError as error:
        return invalid(str(error))
    state = entry.state
    remembered = entry.memory or (0, 0)
    tags = [remembered[0], remembered[1]]
    for chunk in chunks:
        if (
            chunk.kind == SctpChunk.INIT
            and direction == Direction.ORIGINAL
            and state == SctpState.CLOSED
            and entry.seen_reply
        ):
            return REOPENS
        if not _tag_fits(chunk, packet.sequence, direction, tags):
            return invalid("wrong verification tag")
        following = SCTP_TABLE[direction][chunk.kind][state]
        if following == IV:
            return invalid("this chunk has no place in this state")
        if chunk.tag and (following != state or state <= SctpState.COOKIE_WAIT):
            tags[1 - direction] = chunk.tag
        if tags[direction] == 0 and chunk.kind != SctpChunk.INIT:
            tags[direction] = packet.sequence
        state = following
    opened = entry.state == SctpState.COOKIE_ECHOED and state == SctpState.ESTABLISHED
    assured = state == SctpState.ESTABLISHED and direction == Direction.REPLY and opened
    timeout_s = profile.timeouts.sctp[state]
    if profile.strict and state == entry.state and state < SctpState.ESTABLISHED:
        timeout_s = -1.0  # a half-open association is not kept alive by repetition
    return Update(state, timeout_s, assured, True, None, (tags[0], tags[1]), False)


def _tag_fits(chunk: _Chunk, tag: int, direction: int, tags: list[int]) -> bool:
    """RFC 9260 section 8.5 and its exceptions in 8.5.1; an unknown tag fits anything."""
    if chunk.kind == SctpChunk.INIT:
        return tag == 0
    expected, reflected = tags[direction], tags[1 - direction]
    if chunk.kind in (SctpChunk.ABORT, SctpChunk.SHUTDOWN_COMPLETE) and chunk.flags & _REFLECTED:
        return reflected in (0, tag)
    return expected in (0, tag)
