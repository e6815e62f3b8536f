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

Every operation takes constant time. Sources are kept in one bucket per number of entries; a
source moves by one bucket at a time, so the largest bucket is known without a search.
"""

from collections import OrderedDict, deque
from enum import IntEnum

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

_KEPT, _UNASSURED = int(Rank.KEPT), int(Rank.UNASSURED)


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
_SLACK_COUNT = 1000  # entries that have left may wait in the queue, besides as many as are there
_SEARCH_COUNT = 5000  # at most so many of them are skipped for one victim: 0.4 ms (measured)


class Crowd:
    """Entries of one rank, by source and age.

    A source with one entry is the entry itself; only sources with more have a line of their own.
    Lines are OrderedDicts: the first of a plain dict is searched for behind all that were deleted.
    Single entries wait in one queue, oldest first; who leaves early stays in it until it is met.
    """

    __slots__ = ("_by_count", "_count", "_largest", "_queue", "_sources")

    def __init__(self) -> None:
        self._sources: list[dict[bytes, Entry | OrderedDict[bytes, Entry]]] = [
            {} for _ in range(_SHARD_COUNT)
        ]
        self._queue: deque[Entry] = deque()
        self._count = 0
        self._by_count: dict[int, OrderedDict[bytes, None]] = {}
        self._largest = 0

    def add(self, entry: Entry) -> None:
        """Put an entry behind all others of its source."""
        source = source_of(entry.key)
        sources = self._sources[hash(source) & _SHARD_MASK]
        own = sources.get(source)
        self._count += 1
        if own is None:
            sources[source] = entry
            self._largest = self._largest or 1
            self._queue.append(entry)
            self._tidy()
            return
        if isinstance(own, Entry):
            own = sources[source] = OrderedDict(((own.key, own),))
        own[entry.key] = entry
        self._move(source, len(own) - 1, len(own))

    def discard(self, entry: Entry) -> None:
        """Take out an entry that was added."""
        source = source_of(entry.key)
        sources = self._sources[hash(source) & _SHARD_MASK]
        own = sources[source]
        self._count -= 1
        if isinstance(own, Entry):
            del sources[source]
        else:
            del own[entry.key]
            if len(own) == 1:
                (single,) = own.values()
                sources[source] = single
                self._queue.append(single)
            self._move(source, len(own) + 1, len(own))
        self._tidy()

    def oldest_of(self, source: bytes) -> Entry | None:
        """The oldest entry of one source."""
        own = self._sources[hash(source) & _SHARD_MASK].get(source)
        return next(iter(own.values())) if isinstance(own, OrderedDict) else own

    def victim(self) -> Entry | None:
        """The oldest entry of the source that has the most."""
        if self._count == 0:
            return None
        if self._largest > 1:
            return self.oldest_of(next(iter(self._by_count[self._largest])))
        for _ in range(_SEARCH_COUNT):
            if not self._queue:
                break
            if self._is_single(self._queue[0]):
                return self._queue[0]
            self._queue.popleft()
        return None

    def _is_single(self, entry: Entry) -> bool:
        """Whether an entry of the queue is still here, and still its source's only one."""
        source = source_of(entry.key)
        return self._sources[hash(source) & _SHARD_MASK].get(source) is entry

    def _tidy(self) -> None:
        """Keep the queue in proportion; called once per change, two steps a call."""
        queue = self._queue
        for _ in range(2):
            if not queue:
                return
            if not self._is_single(queue[0]):
                queue.popleft()
            elif len(queue) > 2 * self._count + _SLACK_COUNT:
                queue.rotate(-1)  # alive, but others behind it are not: it must not hold them
            else:
                return

    def _move(self, source: bytes, before: int, behind: int) -> None:
        """Move a source from one bucket to the next higher or lower; one entry has no bucket."""
        buckets = self._by_count
        bucket = buckets.get(before)
        if bucket is not None and len(bucket) == 1 and behind > 1 and behind not in buckets:
            buckets[behind] = buckets.pop(before)  # nobody else is in it: it moves as a whole
        else:
            if bucket is not None:
                del bucket[source]
                if not bucket:
                    del buckets[before]
            if behind > 1:
                buckets.setdefault(behind, OrderedDict())[source] = None
        if behind > self._largest:
            self._largest = behind
        elif before == self._largest and before not in self._by_count:
            self._largest = behind  # it was alone at the top, and is now one below


class Limits:
    """Decides who leaves for a new flow.

    Args:
        limit_count: entries in the whole table.
        source_limit_count: entries of one source; None: only the whole table is limited.
    """

    __slots__ = ("_crowds", "_per_source", "limit_count", "source_limit_count")

    def __init__(self, limit_count: int, source_limit_count: int | None) -> None:
        if limit_count < 1 or (source_limit_count is not None and source_limit_count < 1):
            raise ValueError("a limit of entries is at least 1")
        self.limit_count = limit_count
        self.source_limit_count = source_limit_count
        self._crowds = (Crowd(), Crowd(), Crowd())
        self._per_source: dict[bytes, int] = {}

    def inserted(self, entry: Entry) -> None:
        """Note a new entry."""
        if self.source_limit_count is not None:
            source = source_of(entry.key)
            self._per_source[source] = self._per_source.get(source, 0) + 1
        self.ranked(entry)

    def ranked(self, entry: Entry) -> None:
        """Note that an entry's state or assurance may have changed its rank."""
        rank = rank_of(entry)
        if rank != entry.rank:
            if entry.rank >= 0:
                self._crowds[entry.rank].discard(entry)
            entry.rank = rank
            if rank >= 0:
                self._crowds[rank].add(entry)

    def removed(self, entry: Entry) -> None:
        """Note that an entry has left the table."""
        if entry.rank >= 0:
            self._crowds[entry.rank].discard(entry)
            entry.rank = Rank.KEPT
        if self.source_limit_count is None:
            return
        source = source_of(entry.key)
        count = self._per_source[source] - 1
        if count:
            self._per_source[source] = count
        else:
            del self._per_source[source]

    def is_crowding(self, key: bytes) -> bool:
        """Whether the source of this flow has as many entries as one source may have."""
        limit = self.source_limit_count
        return limit is not None and self._per_source.get(source_of(key), 0) >= limit

    def own_victim(self, key: bytes) -> Entry | None:
        """Which of its own entries a source that is crowding loses for a new one."""
        source = source_of(key)
        for crowd in self._crowds:
            entry = crowd.oldest_of(source)
            if entry is not None:
                return entry
        return None

    def victim(self) -> Entry | None:
        """Who leaves when the table is full; None: everybody is assured."""
        for crowd in self._crowds:
            entry = crowd.victim()
            if entry is not None:
                return entry
        return None
