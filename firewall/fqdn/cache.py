"""What DNS answered, by endpoint and name, for as long as it counts. Pure: `now` is an argument.

An answer lives for its TTL, at least for `min_ttl_s`. What has expired is looked at by `collect`,
which the agent calls at intervals: it becomes a *zombie* (source "connection"; Cilium's deferred
deletes), and stays as long as a connection of the endpoint to the address lives. One without a
connection goes with the second look, as in Cilium: who was told just before the first may be about
to connect, and an answer may have a TTL of 0. Above `per_name` addresses of a name, those that
expire first become zombies as well, of one answer the last. Above `zombie_count` zombies the oldest
go, those with a connection last.

Times are wall-clock seconds: they are kept over restarts.

Source: Cilium pkg/fqdn/cache.go (DNSCache, DNSZombieMappings).
"""

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import NamedTuple

_Key = tuple[int, str, bytes]  # endpoint, name, address

Connection = tuple[int, bytes]
"""An endpoint's id and a packed address that it has a connection to."""

NAMES_PER_ENDPOINT = 10_000
"""Names of one endpoint: what a tunnel through an allowed pattern could use up, about 5 MB."""


class Bounds(NamedTuple):
    """What the cache holds at most, and how long.

    Attributes:
        min_ttl_s: shortest life of an answer (Cilium tofqdns-min-ttl).
        per_name: addresses of one name for one endpoint (tofqdns-endpoint-max-ip-per-hostname).
        zombie_count: zombies of all endpoints (tofqdns-max-deferred-connection-deletes).
        grace_s: how long a zombie stays after its last connection
            (tofqdns-idle-connection-grace-period).
    """

    min_ttl_s: float = 0.0
    per_name: int = 50
    zombie_count: int = 10_000
    grace_s: float = 0.0


class Entry(NamedTuple):
    """One address of one name, as one endpoint learnt it.

    `zombie_since` None: the answer still counts by itself. `connected_at`: when a connection of a
    zombie was last seen.
    """

    endpoint: int
    name: str
    address: bytes
    ttl_s: int
    expires_at: float
    zombie_since: float | None = None
    connected_at: float = 0.0

    @property
    def source(self) -> str:
        """Cilium's word for why the address counts."""
        return "lookup" if self.zombie_since is None else "connection"


class NameCache:
    """Names and their addresses.

    Attributes:
        changed: the addresses whose names are not what they were; the caller empties it.
        forgotten_count: zombies that went because there were too many.
    """

    def __init__(self, bounds: Bounds = Bounds()) -> None:  # noqa: B008 - an immutable value
        self.bounds = bounds
        self.changed: set[bytes] = set()
        self.forgotten_count = 0
        self._entries: dict[int, dict[str, dict[bytes, Entry]]] = {}
        self._by_address: dict[bytes, dict[str, set[int]]] = {}
        # Zombies, oldest first: those of which no connection was seen yet, and the others.
        self._idle: dict[_Key, None] = {}
        self._busy: dict[_Key, None] = {}
        self._soonest: dict[int, list[tuple[float, str]]] = {}
        self._collected_at = 0.0

    # --- learning -----------------------------------------------------------------------------

    def learn(
        self, endpoint: int, name: str, addresses: Iterable[bytes], ttl_s: int, now: float
    ) -> bool:
        """Note an answer; say whether an address or a longer life is new.

        Args:
            endpoint: who asked.
            name: lower case, trailing dot.
            addresses: packed, in the order of the answer.
            ttl_s: as answered.
            now: wall clock, seconds.
        """
        addresses = tuple(addresses)
        if not addresses:
            return False
        expires_at = now + max(float(ttl_s), self.bounds.min_ttl_s)
        names = self._entries.setdefault(endpoint, {})
        fresh = name not in names
        if fresh and len(names) >= NAMES_PER_ENDPOINT:
            self._drop_soonest(endpoint, names)
        held = names.setdefault(name, {})
        news = False
        for address in addresses:
            old = held.get(address)
            if old is not None and old.zombie_since is None and old.expires_at >= expires_at:
                continue
            self._put(Entry(endpoint, name, address, ttl_s, expires_at))
            news = True
        if fresh and endpoint in self._soonest:
            heappush(self._soonest[endpoint], (expires_at, name))
        if len(held) > self.bounds.per_name:
            self._retire_surplus(held, addresses, now)
        return news

    def restore(self, entries: Iterable[Entry]) -> None:
        """Take over what an earlier life knew."""
        for entry in entries:
            self._put(entry)

    def _put(self, entry: Entry) -> None:
        held = self._entries.setdefault(entry.endpoint, {}).setdefault(entry.name, {})
        key = entry.endpoint, entry.name, entry.address
        if entry.zombie_since is None or entry.connected_at:
            self._idle.pop(key, None)
        else:
            self._idle[key] = None
        if entry.zombie_since is None:
            self._busy.pop(key, None)
        elif entry.connected_at:
            self._busy[key] = None
        held[entry.address] = entry
        names = self._by_address.setdefault(entry.address, {})
        owners = names.get(entry.name)
        if owners is None:
            names[entry.name] = {entry.endpoint}
            self.changed.add(entry.address)
        elif entry.endpoint not in owners:
            owners.add(entry.endpoint)
            self.changed.add(entry.address)

    def _remove(self, entry: Entry) -> None:
        endpoint, name, address = entry.endpoint, entry.name, entry.address
        names = self._entries[endpoint]
        del names[name][address]
        if not names[name]:
            del names[name]
        if not names:
            del self._entries[endpoint]
            self._soonest.pop(endpoint, None)
        self._idle.pop((endpoint, name, address), None)
        self._busy.pop((endpoint, name, address), None)
        owners = self._by_address[address][name]
        owners.discard(endpoint)
        if not owners:
            del self._by_address[address][name]
        if not self._by_address[address]:
            del self._by_address[address]
        self.changed.add(address)

    def _retire_surplus(
        self, held: dict[bytes, Entry], answered: tuple[bytes, ...], now: float
    ) -> None:
        """Make zombies of the addresses of a name that expire first and are too many.

        Clients try an answer's addresses from the first on.
        """
        ranks = {address: rank for rank, address in enumerate(answered)}
        last = len(ranks)
        alive = [entry for entry in held.values() if entry.zombie_since is None]
        surplus = len(alive) - self.bounds.per_name
        if surplus > 0:
            alive.sort(key=lambda entry: (entry.expires_at, -ranks.get(entry.address, last)))
            for entry in alive[:surplus]:
                self._put(entry._replace(zombie_since=now))
            self._bury_surplus()

    def _drop_soonest(self, endpoint: int, names: dict[str, dict[bytes, Entry]]) -> None:
        """Forget the name whose answers expire first.

        The order is kept for endpoints that are full: who asks for ever new names must not make
        each answer cost a look at all of them. A name that lives longer than its place says gets a
        new one when its turn comes.
        """
        order = self._soonest.get(endpoint)
        if not order or len(order) > 2 * NAMES_PER_ENDPOINT:
            order = self._soonest[endpoint] = [(_last(held), name) for name, held in names.items()]
            heapify(order)
        while order:
            expires_at, name = heappop(order)
            if name not in names:
                continue
            last = _last(names[name])
            if last <= expires_at:
                for entry in tuple(names[name].values()):
                    self._remove(entry)
                return
            heappush(order, (last, name))

    def _bury_surplus(self) -> None:
        """Forget the oldest zombies above the bound, first those without a connection."""
        while self.zombie_count > self.bounds.zombie_count:
            endpoint, name, address = next(iter(self._idle or self._busy))
            self._remove(self._entries[endpoint][name][address])
            self.forgotten_count += 1

    # --- forgetting ---------------------------------------------------------------------------

    def doubtful(self, now: float) -> set[Connection]:
        """Return whose connections `collect` must know: of what has expired, and of zombies."""
        return {
            (entry.endpoint, entry.address)
            for entry in self.entries()
            if entry.zombie_since is not None or entry.expires_at <= now
        }

    def collect(self, alive: set[Connection], now: float) -> int:
        """Make zombies of what has expired and forget older ones without a connection.

        Args:
            alive: which of `doubtful` have a connection.
            now: wall clock, seconds; as `doubtful` was told, so that nothing expired in between.

        Returns:
            How many entries went.
        """
        before = self.count
        for entry in tuple(self.entries()):
            if entry.zombie_since is None:
                if entry.expires_at > now:
                    continue
                entry = entry._replace(zombie_since=now)  # noqa: PLW2901
            if (entry.endpoint, entry.address) in alive:
                entry = entry._replace(connected_at=now)  # noqa: PLW2901
            since = now if entry.zombie_since is None else entry.zombie_since
            seen_before = since <= self._collected_at
            idle_s = now - max(entry.connected_at, since)
            if seen_before and entry.connected_at < now and idle_s >= self.bounds.grace_s:
                self._remove(entry)
            else:
                self._put(entry)
        self._collected_at = now
        self._bury_surplus()
        return before - self.count

    def forget_endpoint(self, endpoint: int) -> None:
        """Forget what an endpoint learnt: it is gone."""
        for held in tuple(self._entries.get(endpoint, {}).values()):
            for entry in tuple(held.values()):
                self._remove(entry)

    def forget(self, entries: Iterable[Entry]) -> None:
        """Forget these entries; one that changed meanwhile stays."""
        for entry in tuple(entries):
            held = self._entries.get(entry.endpoint, {}).get(entry.name, {})
            if held.get(entry.address) == entry:
                self._remove(entry)

    # --- asking -------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Number of entries."""
        return sum(len(held) for names in self._entries.values() for held in names.values())

    @property
    def zombie_count(self) -> int:
        """Number of zombies."""
        return len(self._idle) + len(self._busy)

    def sizes(self) -> dict[int, tuple[int, int]]:
        """Return how many names each endpoint has, and how many addresses in all of them."""
        return {
            endpoint: (len(names), sum(map(len, names.values())))
            for endpoint, names in self._entries.items()
        }

    def entries(self) -> Iterator[Entry]:
        """Yield every entry, by endpoint and name."""
        for names in self._entries.values():
            for held in names.values():
                yield from held.values()

    def addresses(self) -> Iterator[bytes]:
        """Yield every address that a name leads to."""
        return iter(self._by_address)

    def names(self, address: bytes) -> tuple[str, ...]:
        """Return the names that lead to an address, ascending."""
        return tuple(sorted(self._by_address.get(address, ())))

    def endpoints(self, address: bytes, name: str) -> frozenset[int]:
        """Return who learnt an address for a name."""
        return frozenset(self._by_address.get(address, {}).get(name, ()))


def _last(held: dict[bytes, Entry]) -> float:
    """Return until when an address of a name counts."""
    return max(entry.expires_at for entry in held.values())
