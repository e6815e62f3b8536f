"""SCTP as RFC 9260 asks it: who does not know the verification tag moves no association.

Each side tells the other in INIT or INIT ACK which tag its packets must carry (section 8.5). A box
that has seen both knows both, so a packet with a wrong tag is INVALID: it is the protection that
sequence numbers give TCP. INIT itself carries tag 0; ABORT and SHUTDOWN COMPLETE may reflect the
receiver's own tag when they have the T bit (section 8.5.1).

An INIT needs no tag, so anybody can send one; alone it must change nothing that lives. One in a
living association makes a candidate: the tags of an end that has restarted (section 5.2.2). They
become the association's when both ends have used them and COOKIE ACK has come back; a packet of the
same end with an old tag shows before that it has not restarted, and the INIT was forged.

A server's INIT is the first packet of an association of its own, and policy is asked, unless this
one has been answered already.
"""

from typing import Final

from conntrack.entry import REOPENS, Entry, Judgement, Update, invalid
from conntrack.flow import Direction
from conntrack.packet import Packet
from conntrack.profile import Profile
from conntrack.sctp_chunks import REFLECTED, Chunk, ChunkError, sound_chunks
from conntrack.sctp_states import IV, STRICT_SCTP_TABLE, SctpChunk, SctpState

_ORIGINAL, _REPLY = int(Direction.ORIGINAL), int(Direction.REPLY)
_NO_TIMER: Final = -1.0
_BEFORE_ANSWER: Final = (  # what may come before INIT ACK: per direction
    frozenset((SctpChunk.INIT,)),
    frozenset((SctpChunk.INIT_ACK, SctpChunk.ABORT)),
)


def first(packet: Packet, profile: Profile) -> Judgement:
    """Judge a packet that belongs to no association."""
    try:
        chunks = sound_chunks(packet)
    except ChunkError as error:
        return invalid(str(error))
    opener = chunks[0]
    state = STRICT_SCTP_TABLE[_ORIGINAL][opener.kind][SctpState.NONE]
    if state == IV:
        return invalid("an association begins with INIT")
    if packet.source_port == 0 or packet.destination_port == 0:
        return invalid("port 0 is reserved")
    if opener.kind == SctpChunk.INIT:
        if packet.sequence != 0:
            return invalid("INIT carries a verification tag")  # section 8.5.1 A
        tags = (0, opener.tag)
    else:
        tags = (packet.sequence, 0)
    return Update(state, profile.timeouts.sctp[state], False, False, None, tags, False)


class _Tags:
    """The tags of one association while a packet of it is judged.

    Attributes:
        known: what packets of each direction must carry; 0: not known.
        fresh: the candidate of an end that has restarted; None if there is none.
    """

    __slots__ = ("fresh", "known")

    def __init__(self, memory: tuple[int, ...] | None) -> None:
        remembered = memory or (0, 0)
        self.known = [remembered[0], remembered[1]]
        self.fresh: list[int] | None = [*remembered[2:]] or None

    def memory(self) -> tuple[int, ...]:
        """As the entry keeps it."""
        return tuple(self.known) if self.fresh is None else (*self.known, *self.fresh)

    def fit(self, chunk: Chunk, tag: int, direction: int) -> bool:
        """RFC 9260 section 8.5 and its exceptions in 8.5.1; an unknown tag fits anything."""
        if chunk.kind == SctpChunk.INIT:
            return tag == 0
        if chunk.kind in (SctpChunk.ABORT, SctpChunk.SHUTDOWN_COMPLETE) and chunk.flags & REFLECTED:
            return self.known[1 - direction] in (0, tag)
        return self.known[direction] in (0, tag) or self.is_fresh(tag, direction)

    def is_fresh(self, tag: int, direction: int) -> bool:
        """Whether a packet carries the candidate's tag."""
        return self.fresh is not None and tag != 0 and self.fresh[direction] == tag

    def note(self, chunk: Chunk, tag: int, direction: int, state: int) -> None:
        """Learn from a chunk that fits."""
        if chunk.kind == SctpChunk.INIT:
            if state == SctpState.CLOSED:
                self.known = [0, 0]
                self.known[1 - direction] = chunk.tag
            elif direction == _ORIGINAL:
                self.fresh = [0, chunk.tag]
            return
        if self.is_fresh(tag, direction):
            assert self.fresh is not None
            if chunk.kind == SctpChunk.INIT_ACK:
                self.fresh[1 - direction] = chunk.tag
            elif chunk.kind == SctpChunk.COOKIE_ACK and self.fresh[_ORIGINAL]:
                self.known, self.fresh = self.fresh, None
            return
        if direction == _ORIGINAL:
            self.fresh = None  # it has not restarted
        if chunk.kind == SctpChunk.INIT_ACK and state <= SctpState.COOKIE_WAIT:
            self.known[1 - direction] = chunk.tag
        self.known[direction] = self.known[direction] or tag


def follow(entry: Entry, packet: Packet, direction: int, profile: Profile) -> Judgement:
    """Judge a packet of a known association."""
    try:
        chunks = sound_chunks(packet)
    except ChunkError as error:
        return invalid(str(error))
    state = entry.state
    tags = _Tags(entry.memory)
    tag = packet.sequence
    for chunk in chunks:
        kind = chunk.kind
        if kind == SctpChunk.INIT and state == SctpState.CLOSED and tag == 0:
            if entry.seen_reply or direction == _REPLY:
                return REOPENS
        elif state == SctpState.CLOSED and not (
            entry.seen_reply or kind in _BEFORE_ANSWER[direction]
        ):
            return invalid("the association is not open")
        elif state == SctpState.CLOSED and entry.seen_reply and kind == SctpChunk.INIT_ACK:
            return invalid("the association is over")
        if not tags.fit(chunk, tag, direction):
            return invalid("wrong verification tag")
        restarted = tags.is_fresh(tag, direction)
        following = STRICT_SCTP_TABLE[direction][kind][state]
        if following == IV:
            return invalid("this chunk has no place in this state")
        tags.note(chunk, tag, direction, state)
        if not restarted:
            state = following
        elif tags.fresh is None:
            state = SctpState.ESTABLISHED
    timeout_s = profile.timeouts.sctp[state]
    if state == entry.state and state < SctpState.ESTABLISHED:
        timeout_s = _NO_TIMER  # a half-open association is not kept alive by repetition
    assured = state == SctpState.ESTABLISHED and (entry.seen_reply or direction == _REPLY)
    refused = chunks[0].kind == SctpChunk.ABORT and not entry.seen_reply
    return Update(state, timeout_s, assured, True, None, tags.memory(), refused)
