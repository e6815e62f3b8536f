"""SCTP as Linux 6.18 tracks it: the same answers, from observation.

Of the tags it asks less than STRICT: INIT may set new ones at any time, HEARTBEAT may show an
unknown one once and wait for its HEARTBEAT ACK, which then makes it the association's, and what
opens out of the blue (HEARTBEAT ACK, SHUTDOWN ACK) is tracked. Every rule was confirmed packet by
packet on Linux 6.18.44, except that here an INVALID packet changes nothing.
"""

from collections.abc import Sequence
from typing import Final

from conntrack.entry import Entry, Judgement, Update, invalid, passes
from conntrack.flow import Direction
from conntrack.packet import Packet
from conntrack.profile import Profile
from conntrack.sctp_chunks import REFLECTED, Chunk, ChunkError, read_chunks
from conntrack.sctp_states import IV, LINUX_SCTP_TABLE, SctpChunk, SctpState

# Places in the memory tuple: the tags that packets of each direction carry, whether each side has
# sent INIT, and the direction of a HEARTBEAT with an unknown tag (or _NOBODY).
_INIT_SENT: Final = 2
_DOUBTED: Final = 4
_NOBODY: Final = -1
_NOTHING: Final = (0, 0, 0, 0, _NOBODY)

_ALONE: Final = frozenset((SctpChunk.INIT, SctpChunk.INIT_ACK, SctpChunk.SHUTDOWN_COMPLETE))
_FIRST: Final = frozenset((SctpChunk.COOKIE_ECHO, SctpChunk.COOKIE_ACK))
_NEVER_FIRST: Final = frozenset(
    (SctpChunk.ABORT, SctpChunk.SHUTDOWN_COMPLETE, SctpChunk.COOKIE_ACK)
)
# Chunks of which one excuses the packet from carrying the known tag; each has a rule of its own.
_EXCUSED: Final = frozenset(
    (
        SctpChunk.INIT,
        SctpChunk.COOKIE_ECHO,
        SctpChunk.ABORT,
        SctpChunk.SHUTDOWN_ACK,
        SctpChunk.SHUTDOWN_COMPLETE,
        SctpChunk.HEARTBEAT,
        SctpChunk.HEARTBEAT_ACK,
    )
)


def _read(packet: Packet) -> list[Chunk]:
    chunks = list(read_chunks(packet))
    if not chunks:
        raise ChunkError("packet without chunks")
    alone = chunks[0].kind in _ALONE
    for chunk in chunks[1:]:
        alone = alone or chunk.kind in _ALONE
        if alone or chunk.kind in _FIRST:
            raise ChunkError("chunk that must be first or alone is bundled")
    return chunks


def first(packet: Packet, profile: Profile) -> Judgement:
    """Judge a packet that belongs to no association."""
    try:
        chunks = _read(packet)
    except ChunkError as error:
        return invalid(str(error))
    memory = [*_NOTHING]
    state = int(SctpState.NONE)
    for chunk in chunks:
        state = LINUX_SCTP_TABLE[0][chunk.kind][SctpState.NONE]
        if state == IV or chunk.kind in _NEVER_FIRST:
            return invalid("no association begins so")
        if chunk.kind == SctpChunk.INIT:
            if packet.sequence != 0:
                return invalid("INIT carries a verification tag")
            memory[1] = chunk.tag
        elif chunk.kind in (SctpChunk.HEARTBEAT, SctpChunk.HEARTBEAT_ACK):
            memory[0] = packet.sequence
        else:
            memory[1] = packet.sequence
    return _apply(
        chunks, packet, Direction.ORIGINAL, profile, state=state, memory=memory, begins=True
    )


def follow(entry: Entry, packet: Packet, direction: int, profile: Profile) -> Judgement:
    """Judge a packet of a known association."""
    try:
        chunks = _read(packet)
    except ChunkError as error:
        return invalid(str(error))
    memory = [*(entry.memory or (packet.sequence, packet.sequence, *_NOTHING[2:]))]
    return _apply(chunks, packet, direction, profile, state=entry.state, memory=memory)


def _apply(
    chunks: Sequence[Chunk],
    packet: Packet,
    direction: int,
    profile: Profile,
    *,
    state: int,
    memory: list[int],
    begins: bool = False,
) -> Judgement:
    """Compare the tag, then move along the table chunk by chunk."""
    tag = packet.sequence
    if tag != memory[direction] and not any(chunk.kind in _EXCUSED for chunk in chunks):
        return invalid("wrong verification tag")
    has_data = any(chunk.is_data for chunk in chunks)
    doubted = assured = False
    for chunk in chunks:
        fault, doubts = _tag_fault(chunk, tag, direction, memory)
        if fault or (doubts and (has_data or doubted)):
            return invalid(fault or "wrong verification tag")
        if doubts:
            doubted = True
            continue
        before = state
        state = LINUX_SCTP_TABLE[direction][chunk.kind][state]
        if state == IV:
            return invalid("this chunk has no place in this state")
        fault = _announce(chunk, direction, memory, begins=begins)
        if fault:
            return invalid(fault)
        assured = assured or (state == SctpState.ESTABLISHED != before)
    kept = tuple(memory)
    if doubted:
        return passes(
            "HEARTBEAT of another path", Update(state, -1, assured, True, None, kept, False)
        )
    return Update(state, profile.timeouts.sctp[state], assured, True, None, kept, False)


def _tag_fault(chunk: Chunk, tag: int, direction: int, memory: list[int]) -> tuple[str, bool]:
    """The special rules of single chunks (RFC 9260 section 8.5.1).

    Returns:
        (why the packet is INVALID, empty if it is not; whether the chunk is to be passed over).
    """
    own, other = memory[direction], memory[1 - direction]
    fault = ("wrong verification tag", False)
    match chunk.kind:
        case SctpChunk.INIT:
            return fault if tag else ("", False)
        case SctpChunk.ABORT | SctpChunk.SHUTDOWN_COMPLETE:
            return ("", False) if tag == (other if chunk.flags & REFLECTED else own) else fault
        case SctpChunk.COOKIE_ACK:
            memory[_INIT_SENT] = memory[_INIT_SENT + 1] = 0  # what was begun has ended
        case SctpChunk.COOKIE_ECHO:
            return ("", False) if tag == own else fault
        case SctpChunk.HEARTBEAT:
            if own == 0:
                memory[direction] = tag
            elif own != tag:
                memory[_DOUBTED] = direction
                return "", True
            else:
                memory[_DOUBTED] = _NOBODY
        case SctpChunk.HEARTBEAT_ACK:
            if own == 0:
                memory[direction] = tag
            elif own != tag:
                if memory[_DOUBTED] != 1 - direction:
                    return fault
                memory[direction], memory[1 - direction] = tag, 0
                memory[_DOUBTED] = _NOBODY
            else:
                memory[_DOUBTED] = _NOBODY
        case _:
            pass
    return "", False


def _announce(chunk: Chunk, direction: int, memory: list[int], *, begins: bool) -> str:
    """Note the tag that INIT and INIT ACK announce; why it cannot be, or empty."""
    if chunk.kind not in (SctpChunk.INIT, SctpChunk.INIT_ACK):
        return ""
    if chunk.tag < 0:
        return "INIT announces no tag"
    own, other = _INIT_SENT + direction, _INIT_SENT + 1 - direction
    if chunk.kind == SctpChunk.INIT:
        if begins or memory[1 - direction] != chunk.tag:  # not a repeated one
            if memory[own] and memory[other]:
                memory[other] = 0
            memory[own] = 1
    else:
        known = memory[1 - direction]
        if not memory[other] and known and known != chunk.tag:
            return "answers no INIT"
        if memory[own] and memory[other] and known != chunk.tag:
            return "announces another tag than its INIT"
    memory[1 - direction] = chunk.tag
    return ""
