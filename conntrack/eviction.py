"""Who must leave when the table is full: the source that crowds it, oldest entry first.

A flood must cost the flooder. Entries that may be evicted stand in three ranks, and the first rank
that has any gives the victim:

    DEAD        both FINs or a reset were seen: nothing more is expected
    UNASSURED   nobody has proved to take part (half-open, single datagrams)
    HALF_CLOSED one side has ended

Everything else is assured and never leaves for a newcomer. Within a rank the victim is the oldest
entry of the source that has the most: who opens a thousand flows loses his own, and who opens one
is touched only when everybody has no more than that. An IPv6 source is its /64, because one host
owns all of it (RFC 6177).

Every operation takes constant time, and none ever grows a large dictionary. A source with one entry
is the entry itself, in a chain of all such entries; of one that has had more, each rank has a line.
Lines of equal length stand in one bucket; a line moves by one bucket at a time, so the longest are
known without a search.
"""

from enum import IntEnum
from typing import cast

from conntrack.chain import Chain
from conntrack.entry import Entry
from conntrack.flow import SCTP, TCP
from conntrack.sctp_states import SctpState
from conntrack.tcp_states import TcpState


class Rank(IntEnum):
    """Order in which entries leave; KEPT never leaves."""

    KEPT = -1
    DEAD = 0
    UNASSURED = 1
    HALF_CLOSED = 2


_DEAD_TCP: set[IntEnum] = {TcpState.LAST_ACK, TcpState.TIME_WAIT, TcpState.CLOSE}
_HALF_CLOSED_TCP: set[IntEnum] = {TcpState.FIN_WAIT, TcpState.CLOSE_WAIT}
_DEAD_SCTP: set[IntEnum] = {SctpState.CLOSED, SctpState.SHUTDOWN_ACK_SENT}
_HALF_CLOSED_SCTP: set[IntEnum] = {SctpState.SHUTDOWN_SENT, SctpState.SHUTDOWN_RECD}

_KEPT, _DEAD, _UNASSURED = int(Rank.KEPT), int(Rank.DEAD), int(Rank.UNASSURED)


def _ranks(states: type[IntEnum], dead: set[IntEnum], half_closed: set[IntEnum]) -> tuple[int, ...]:
    """Rank of an assured flow in each state, by the state's number."""
    return tuple(
        int(Rank.DEAD if s in dead else Rank.HALF_CLOSED if s in half_closed else Rank.KEPT)
        for s in states
    )


_TCP_RANKS = _ranks(TcpState, _DEAD_TCP, _HALF_CLOSED_TCP)
_SCTP_RANKS = _ranks(SctpState, _DEAD_SCTP, _HALF_CLOSED_SCTP)


def rank_of(entry: Entry) -> int:
    """The rank in which an entry stands by its state."""
    if not entry.assured:
        return _UNASSURED
    if entry.protocol == TCP:
        return _TCP_RANKS[entry.state]
    return _SCTP_RANKS[entry.state] if entry.protocol == SCTP else _KEPT


def source_of(key: bytes) -> bytes:
    """Who is charged for a flow: its IPv4 source, or the /64 of its IPv6 source."""
    return key[:4] if len(key) < 32 else key[:8]


_SHARD_COUNT = 256  # as in `conntrack.table`: no dictionary grows large enough to pause
_SHARD_MASK = _SHARD_COUNT - 1
_RANK_COUNT = 3  # of those that may leave


class Source(Chain):
    """Who has had several entries at once; itself the line of its unassured ones.

    Attributes:
        total: entries now, of every rank.
        dead: line of that rank; None: empty.
        half_closed: line of that rank; None: empty.
    """

    __slots__ = ("dead", "half_closed", "total")

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.dead: Chain | None = None
        self.half_closed: Chain | None = None

    def line(self, rank: int) -> Chain:
        """The line of a rank."""
        if rank == _UNASSURED:
            return self
        if rank == _DEAD:
            if self.dead is None:
                self.dead = Chain()
            return self.dead
        if self.half_closed is None:
            self.half_closed = Chain()
        return self.half_closed

    def first(self) -> Entry | None:
        """The entry that may leave first."""
        for line in (self.dead, self, self.half_closed):
            if line is not None and line.oldest is not None:
                return cast("Entry", line.oldest)
        return None


class Limits:
    """Decides who leaves for a new flow.

    Args:
        limit_count: entries in the whole table.
        source_limit_count: entries of one source; None: only the whole table is limited.
    """

    __slots__ = (
        "_buckets",
        "_longest",
        "_singles",
        "_sources",
        "limit_count",
        "source_limit_count",
    )

    def __init__(self, limit_count: int, source_limit_count: int | None) -> None:
        if limit_count < 1 or (source_limit_count is not None and source_limit_count < 1):
            raise ValueError("a limit of entries is at least 1")
        self.limit_count = limit_count
        self.source_limit_count = source_limit_count
        self._sources: list[dict[bytes, Entry | Source]] = [{} for _ in range(_SHARD_COUNT)]
        # Per rank: entries that are all of their source; lines by length; length of the longest.
        self._singles = [Chain() for _ in range(_RANK_COUNT)]
        self._buckets: list[dict[int, Chain]] = [{} for _ in range(_RANK_COUNT)]
        self._longest = [0] * _RANK_COUNT

    def inserted(self, entry: Entry) -> None:
        """Note a new entry."""
        rank = entry.rank = rank_of(entry)
        source = source_of(entry.key)
        sources = self._sources[hash(source) & _SHARD_MASK]
        owner = sources.get(source)
        if owner is None:
            sources[source] = entry
            if rank >= 0:
                self._singles[rank].append(entry)
            return
        if isinstance(owner, Entry):
            single = owner
            owner = sources[source] = Source()
            owner.total = 1
            if single.rank >= 0:
                self._singles[single.rank].take(single)
                self._line_up(owner, single)
        owner.total += 1
        if rank >= 0:
            self._line_up(owner, entry)

    def ranked(self, entry: Entry) -> None:
        """Note that an entry's state or assurance may have changed its rank."""
        rank = rank_of(entry)
        before = entry.rank
        if rank == before:
            return
        source = source_of(entry.key)
        owner = self._sources[hash(source) & _SHARD_MASK][source]
        if before >= 0:
            self._leave(owner, entry)
        entry.rank = rank
        if rank < 0:
            return
        if isinstance(owner, Source):
            self._line_up(owner, entry)
        else:
            self._singles[rank].append(entry)

    def removed(self, entry: Entry) -> None:
        """Note that an entry has left the table."""
        source = source_of(entry.key)
        sources = self._sources[hash(source) & _SHARD_MASK]
        owner = sources[source]
        if entry.rank >= 0:
            self._leave(owner, entry)
            entry.rank = _KEPT
        if isinstance(owner, Source):
            owner.total -= 1
            if owner.total:
                return
        del sources[source]

    def is_crowding(self, key: bytes) -> bool:
        """Whether the source of this flow has as many entries as one source may have."""
        limit = self.source_limit_count
        if limit is None:
            return False
        owner = self._owner(key)
        if isinstance(owner, Source):
            return owner.total >= limit
        return owner is not None and limit == 1

    def own_victim(self, key: bytes) -> Entry | None:
        """Which of its own entries a source that is crowding loses for a new one."""
        owner = self._owner(key)
        if isinstance(owner, Source):
            return owner.first()
        return owner if owner is not None and owner.rank >= 0 else None

    def victim(self) -> Entry | None:
        """Who leaves when the table is full; None: everybody is assured."""
        for rank in range(_RANK_COUNT):
            single = cast("Entry | None", self._singles[rank].oldest)
            longest = self._longest[rank]
            if not longest:
                if single is not None:
                    return single
                continue
            line = cast("Chain", self._buckets[rank][longest].oldest)
            entry = cast("Entry", line.oldest)
            if longest > 1 or single is None or entry.created_at <= single.created_at:
                return entry
            return single
        return None

    def _owner(self, key: bytes) -> Entry | Source | None:
        source = source_of(key)
        return self._sources[hash(source) & _SHARD_MASK].get(source)

    def _line_up(self, owner: Source, entry: Entry) -> None:
        """Put an entry behind all others of its source and rank."""
        rank = entry.rank
        line = owner.line(rank)
        line.append(entry)
        self._move(rank, line, line.count - 1)

    def _leave(self, owner: Entry | Source, entry: Entry) -> None:
        """Take an entry out of the line or chain of its rank."""
        rank = entry.rank
        if not isinstance(owner, Source):
            self._singles[rank].take(entry)
            return
        line = owner.line(rank)
        line.take(entry)
        self._move(rank, line, line.count + 1)

    def _move(self, rank: int, line: Chain, before: int) -> None:
        """Move a line, `before` entries long until now, to the bucket of its length."""
        buckets = self._buckets[rank]
        behind = line.count
        bucket = buckets.get(before)
        if bucket is not None and bucket.count == 1 and behind and behind not in buckets:
            buckets[behind] = buckets.pop(before)  # nobody else is in it: it moves as a whole
        else:
            if bucket is not None:
                bucket.take(line)
                if not bucket.count:
                    del buckets[before]
            if behind:
                bucket = buckets.get(behind)
                if bucket is None:
                    bucket = buckets[behind] = Chain()
                bucket.append(line)
        longest = self._longest[rank]
        if behind > longest or (before == longest and before not in buckets):
            self._longest[rank] = behind  # the longest, or it was alone and is now one shorter
