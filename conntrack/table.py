"""Entries by key, in 256 dictionaries, so that no single operation ever takes long.

One dictionary of two million keys is rehashed as a whole when it grows: 40 ms during which no
packet is served. 256 dictionaries grow one at a time, in under a millisecond. Expiry walks one of
them at a time, too, and stops when its budget is used up; what is dead and not yet swept is
recognised at lookup.

A flow stands under one key, that of its original direction; who finds nothing asks for the key of
the replies, too. A second key per flow would save 0.3 us per reply and cost 86 bytes per flow. Keys
are `bytes`, whose hash is keyed with a secret per process (PEP 456), so nobody can choose tuples
that collide.
"""

from collections.abc import Iterator
from typing import Final

from conntrack.entry import Entry
from conntrack.keys import reply_key

SHARD_COUNT: Final = 256
SHARD_MASK: Final = SHARD_COUNT - 1


class Table:
    """All entries of a tracker.

    Attributes:
        shards: the dictionaries; an entry is in `shards[hash(key) & SHARD_MASK]`.
        count: number of entries.
    """

    __slots__ = ("_queue", "_swept", "count", "shards")

    def __init__(self) -> None:
        self.shards: list[dict[bytes, Entry]] = [{} for _ in range(SHARD_COUNT)]
        self.count = 0
        self._queue: list[Entry] = []
        self._swept = 0

    def get(self, key: bytes) -> Entry | None:
        """The entry under this key, in either direction, dead or alive."""
        entry = self.shards[hash(key) & SHARD_MASK].get(key)
        if entry is None:
            key = reply_key(key)
            entry = self.shards[hash(key) & SHARD_MASK].get(key)
        return entry

    def insert(self, entry: Entry) -> None:
        """Put an entry under its key; neither that nor the replies' may be taken."""
        self.shards[hash(entry.key) & SHARD_MASK][entry.key] = entry
        self.count += 1

    def remove(self, entry: Entry) -> bool:
        """Take an entry out; False if it was not in the table."""
        shard = self.shards[hash(entry.key) & SHARD_MASK]
        if shard.get(entry.key) is not entry:
            return False
        del shard[entry.key]
        entry.serial = -1
        self.count -= 1
        return True

    def sweep(self) -> Iterator[Entry]:
        """Every entry, shard by shard, beginning where the last sweep was left; then it ends.

        An entry may have left the table meanwhile (serial -1).
        """
        for _ in range(SHARD_COUNT + 1):
            while self._queue:
                yield self._queue.pop()
            self._queue = list(self.shards[self._swept].values())
            self._swept = (self._swept + 1) & SHARD_MASK

    def __iter__(self) -> Iterator[Entry]:
        """Every entry once; the table may change meanwhile, shard by shard."""
        for shard in self.shards:
            for entry in list(shard.values()):
                if entry.serial >= 0:
                    yield entry
