"""Who has which number: label sets get numbers, and equal sets get equal numbers on every node.

Three kinds of number come from three places. Reserved and fixed ones are known beforehand. The
label sets of CIDR and FQDN peers concern one node only and are numbered in memory, from 1 << 24;
so are, from 2 << 24, those of other nodes.
Everything else is numbered together with all other nodes through a key-value store that needs to
know one trick, creating a key only if it is absent (`KvStore`).

Keys, after Cilium's pkg/allocator and pkg/kvstore/allocator:

    <prefix>/id/<number>              label text      master: lives until nobody uses it any more
    <prefix>/value/<label text>/<node>  number        slave: this node uses it; ends with its lease
    <prefix>/value/<label text>/      number          finds the master while no node uses it
    <prefix>/locks/<label text>       a token         held while the others are changed

A number whose last user left keeps its master for a grace period, so that packets and flow records
that still name it are not read as somebody else's. `collect` ends that period; it must be called at
regular intervals, on any number of nodes.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Container, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from firewall.identities.labels import RESERVED, Label, LabelError, LabelSet
from firewall.identities.local import GRACE_S, IdentityError, Known, LocalNumbers, is_local_set
from firewall.identities.reserved import (
    CLUSTER_MAX,
    CLUSTER_MIN,
    FIXED_MIN,
    NODE_MAX,
    NODE_MIN,
    RESERVED_LABELS,
    RESERVED_MAX,
    Reserved,
    reserved_number,
)
from firewall.identities.store import KvEntry, KvStore, KvStoreError

__all__ = [
    "GRACE_S",
    "IdentityError",
    "IdentityRegistry",
    "KvEntry",
    "KvStore",
    "KvStoreError",
    "LocalNumbers",
    "is_local_set",
]

PREFIX = "cilium/state/identities/v1"
"""Where the keys stand; Cilium's own, so that its tools read them."""

NODE_LEASE_S = 900.0
"""How long a silent node keeps its numbers: 15 min (Cilium kvstore-lease-ttl)."""

LOCK_LEASE_S = 25.0
"""After this time a lock's holder is taken for dead: 25 s (Cilium's lock lease)."""

GUESSES_COUNT = 4
"""How many numbers are tried by what this node knows before the store's whole list is read."""

ATTEMPTS_COUNT = 16
"""How often a number, or a lock, is asked for before giving up (Cilium maxAllocAttempts)."""

BACKOFF_S = 0.02
"""First pause between attempts, doubled each time up to `BACKOFF_MAX_S` (Cilium: 20 ms)."""

BACKOFF_MAX_S = 2.0

FIXED_KEY = "io.cilium.fixed-identity"
"""Key of the label by which a workload asks for a number the operator fixed."""


def _check_fixed(fixed: Mapping[str, int]) -> dict[str, int]:
    for name, number in fixed.items():
        if not FIXED_MIN <= number <= RESERVED_MAX:
            raise IdentityError(
                f"fixed identity {name}={number} is outside {FIXED_MIN}-{RESERVED_MAX}"
            )
    if len(set(fixed.values())) != len(fixed):
        raise IdentityError("two fixed identities have the same number")
    return dict(fixed)


class IdentityRegistry:
    """Gives label sets their numbers and counts who uses them.

    Args:
        store: where the nodes agree.
        node: this node's name, the end of its slave keys.
        fixed: name to number (128-255): a label set with the label `io.cilium.fixed-identity=name`
            gets this number and, as in Cilium, is then known as `reserved:name` only.
        grace_s: how long an unused number keeps its labels.
        low: first number of the shared range.
        high: last number of the shared range.

    Raises:
        IdentityError: a fixed number outside its range, or given twice.
    """

    def __init__(
        self,
        store: KvStore,
        *,
        node: str,
        fixed: Mapping[str, int] | None = None,
        grace_s: float = GRACE_S,
        low: int = CLUSTER_MIN,
        high: int = CLUSTER_MAX,
    ) -> None:
        self._store = store
        self._node = node
        self._range = range(low, high + 1)
        self._grace_s = grace_s
        self._fixed = _check_fixed(fixed or {})
        self._well_known: dict[int, LabelSet] = {int(n): s for n, s in RESERVED_LABELS.items()}
        for name, number in self._fixed.items():
            self._well_known[number] = LabelSet([Label(RESERVED, name)])
        self.local = LocalNumbers(grace_s=grace_s)
        self.nodes = LocalNumbers(NODE_MIN, NODE_MAX, grace_s)
        self._used: dict[int, Known] = {}
        self._numbers: dict[LabelSet, int] = {}
        self._seen: dict[int, LabelSet] = {}
        self._unused_since: dict[int, float] = {}
        self._lease: int | None = None
        self._stale = False
        self._lost: list[int] = []
        # Weak: a gate lives while somebody stands at it, not as long as the agent.
        self._gates: WeakValueDictionary[LabelSet, asyncio.Lock] = WeakValueDictionary()
        self._orphans: set[tuple[LabelSet, int]] = set()

    # --- keys ---------------------------------------------------------------------------------

    def _master(self, number: int) -> str:
        return f"{PREFIX}/id/{number}"

    def _slaves(self, labels: LabelSet) -> str:
        return f"{PREFIX}/value/{labels.text}/"

    def _slave(self, labels: LabelSet) -> str:
        return self._slaves(labels) + self._node

    # --- allocate -----------------------------------------------------------------------------

    def reserved_for(self, labels: LabelSet) -> int | None:
        """Return the number that a label set has without being allocated, None if it has none."""
        for label in labels.named(FIXED_KEY):
            if label.value in self._fixed:
                return self._fixed[label.value]
        if not labels:
            return Reserved.INIT
        return reserved_number(labels)

    async def allocate(self, labels: LabelSet) -> int:
        """Return the number of a label set and take one reference to it.

        The empty set is `reserved:init`. A set that this node uses already costs no round trip.

        Raises:
            KvStoreError: the store is needed and does not answer.
            IdentityError: the range is exhausted, or the set stays locked.
        """
        number = self.reserved_for(labels)
        if number is not None:
            return number
        if is_local_set(labels):
            return self.local.allocate(labels)
        # Two endpoints with one new label set must not ask for it twice at the same time.
        async with self._gates.setdefault(labels, asyncio.Lock()):
            number = self._numbers.get(labels)
            if number is None:
                number = await self._agree(labels)
                self._remember(number, labels)
            self._used[number].refcount += 1
            return number

    def _remember(self, number: int, labels: LabelSet) -> None:
        self._used[number] = Known(labels)
        self._numbers[labels] = number
        self._seen[number] = labels
        self._unused_since.pop(number, None)

    async def _agree(self, labels: LabelSet) -> int:
        lease = await self._node_lease()
        refused: set[int] = set()
        async with self._locked(labels) as lock:
            for attempt in range(ATTEMPTS_COUNT):
                number = await self._existing(labels, refused)
                if number is None:
                    number = await self._pick(refused, ask=attempt >= GUESSES_COUNT)
                if await self._write_master(number, labels, lock):
                    await self._write(self._slave(labels), number, lock, lease=lease)
                    self._orphans.discard((labels, number))
                    return number
                refused.add(number)
        raise IdentityError(f"no number for {labels} after {ATTEMPTS_COUNT} attempts")

    async def _existing(self, labels: LabelSet, refused: Container[int]) -> int | None:
        """Find the number that another node, or an earlier user, has given the label set."""
        for entry in await self._store.list_prefix(self._slaves(labels)):
            if entry.value.isdigit() and int(entry.value) not in refused:
                return int(entry.value)
        return None

    async def _write_master(self, number: int, labels: LabelSet, lock: KvEntry) -> bool:
        """Make a number the label set's own; False if it is another's."""
        created = await self._store.create(self._master(number), labels.text.encode(), guard=lock)
        if not created and await self._owner(number) != labels:
            return False
        await self._write(self._slaves(labels), number, lock)
        return True

    async def _owner(self, number: int) -> LabelSet | None:
        value = await self._store.get(self._master(number))
        return None if value is None else _read_labels(value)

    async def _pick(self, refused: Container[int], *, ask: bool) -> int:
        """Choose a free number at random: nodes that choose at one time seldom collide then.

        Only if guesses by what this node knows keep failing is the whole list read (`ask`).
        """
        for _ in range(0 if ask else GUESSES_COUNT):
            guess = random.choice(self._range)  # noqa: S311 - to spread, not to hide
            if guess not in self._seen and guess not in refused:
                return guess
        masters = await self._store.list_prefix(f"{PREFIX}/id/")
        taken = {_master_number(entry.key) for entry in masters}
        free = [n for n in self._range if n not in taken and n not in refused]
        if not free:
            raise IdentityError(
                f"all identities {self._range[0]}-{self._range[-1]} are in use; "
                "narrow the labels option so that fewer label sets differ"
            )
        return random.choice(free)  # noqa: S311 - to spread, not to hide

    async def _write(
        self, key: str, number: int, lock: KvEntry, *, lease: int | None = None
    ) -> None:
        """Set one of this node's keys whatever it held before; only the lock's holder may."""
        value = str(number).encode()
        for _ in range(ATTEMPTS_COUNT):
            if await self._store.create(key, value, lease=lease, guard=lock):
                return
            old = await self._store.get(key)
            if old == value and lease is None:
                return
            if await self._store.get(lock.key) != lock.value:
                break
            if old is not None:
                await self._store.compare_and_delete(key, old)
        raise IdentityError(f"lost {lock.key} while identity {number} was being written")

    async def _node_lease(self) -> int:
        if self._lease is not None and not await self._store.keep_alive(self._lease):
            self._lease = None
            self._stale = True  # the other numbers' keys went with it; keep_alive rewrites them
        if self._lease is None:
            self._lease = await self._store.grant_lease(NODE_LEASE_S)
        return self._lease

    @asynccontextmanager
    async def _locked(self, labels: LabelSet) -> AsyncIterator[KvEntry]:
        key, waited_s, pause_s = f"{PREFIX}/locks/{labels.text}", 0.0, BACKOFF_S
        # A dead holder's lock ends with its lease; whoever waits longer than that has bad luck.
        while waited_s <= 2 * LOCK_LEASE_S:
            lease = await self._store.grant_lease(LOCK_LEASE_S)
            try:
                lock = KvEntry(key, f"{self._node}/{lease}".encode())
                if await self._store.create(key, lock.value, lease=lease):
                    yield lock
                    return
            finally:
                await self._store.revoke_lease(lease)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311
            waited_s += pause_s
            pause_s = min(pause_s * 2, BACKOFF_MAX_S)
        raise IdentityError(f"{key} has been locked for {waited_s:.0f} s")

    # --- release ------------------------------------------------------------------------------

    async def release(self, number: int) -> bool:
        """Give one reference back; say whether it was this node's last one.

        The slave key goes at once; if the store does not answer, `keep_alive` does it later. The
        labels of the number stay readable until `collect` has seen the grace period pass.

        Raises:
            IdentityError: released more often than allocated.
        """
        if number in self._well_known:
            return False
        if self.local.refcount(number):
            return self.local.release(number)
        known = self._used.get(number)
        if known is None:
            raise IdentityError(f"identity {number} was released more often than allocated")
        async with self._gates.setdefault(known.labels, asyncio.Lock()):
            known.refcount -= 1
            if known.refcount:
                return False
            del self._used[number]
            del self._numbers[known.labels]
            self._orphans.add((known.labels, number))
            try:
                await self._drop_orphan(known.labels, number)
            except KvStoreError:
                return True
        return True

    async def _drop_orphan(self, labels: LabelSet, number: int) -> None:
        await self._store.compare_and_delete(self._slave(labels), str(number).encode())
        self._orphans.discard((labels, number))

    async def collect(self, now: float) -> tuple[int, ...]:
        """Free the numbers that nobody, on any node, has used for the grace period.

        A number counts as unused from the first call that saw no slave of it, so it takes two
        calls at least, as Cilium's garbage collector takes two rounds.

        Args:
            now: monotonic seconds.

        Returns:
            The numbers freed, local ones included.

        Raises:
            KvStoreError: the store does not answer.
        """
        freed = [*self.local.collect(now), *self.nodes.collect(now)]
        slaves = await self._store.list_prefix(f"{PREFIX}/value/")
        used = {entry.value for entry in slaves if not entry.key.endswith("/")}
        masters = await self._store.list_prefix(f"{PREFIX}/id/")
        present = set()
        for entry in masters:
            number = _master_number(entry.key)
            if number is None:
                continue
            present.add(number)
            if str(number).encode() in used or number in self._used:
                self._unused_since.pop(number, None)
                continue
            since = self._unused_since.setdefault(number, now)
            if now - since >= self._grace_s and await self._free_master(number, entry.value):
                freed.append(number)
                self._seen.pop(number, None)
        for number in set(self._unused_since) - present:
            del self._unused_since[number]
        return tuple(freed)

    async def _free_master(self, number: int, value: bytes) -> bool:
        labels = _read_labels(value)
        if labels is None:
            return await self._store.compare_and_delete(self._master(number), value)
        async with self._gates.setdefault(labels, asyncio.Lock()), self._locked(labels):
            index = self._slaves(labels)
            slaves = await self._store.list_prefix(index)
            if number in self._used or any(entry.key != index for entry in slaves):
                return False
            await self._store.compare_and_delete(index, str(number).encode())
            return await self._store.compare_and_delete(self._master(number), value)

    async def keep_alive(self) -> tuple[int, ...]:
        """Tell the store that this node lives; call it several times per `NODE_LEASE_S`.

        If the lease has ended all the same (a suspended machine), a new one is taken and the keys
        of every number in use are written again.

        Returns:
            As `rewrite`; usually nothing.

        Raises:
            KvStoreError: the store does not answer.
        """
        for labels, number in tuple(self._orphans):
            if self._numbers.get(labels) != number:
                await self._drop_orphan(labels, number)
        if self._lease is None:
            return ()
        await self._node_lease()
        return await self.rewrite() if self._stale else ()

    async def rewrite(self) -> tuple[int, ...]:
        """Write the keys of all numbers in use again; somebody may have deleted them.

        Returns:
            Numbers that now belong to another label set. They are forgotten here: whoever holds one
            must allocate its labels anew and must not release it.

        Raises:
            KvStoreError: the store does not answer.
        """
        lease = await self._node_lease()
        for number, known in tuple(self._used.items()):
            async with self._locked(known.labels) as lock:
                if await self._write_master(number, known.labels, lock):
                    await self._write(self._slave(known.labels), number, lock, lease=lease)
                else:
                    self._lost.append(number)
                    del self._used[number]
                    del self._numbers[known.labels]
                    self._seen.pop(number, None)
                    if (owner := await self._owner(number)) is not None:
                        self._seen[number] = owner
        self._stale = False
        lost, self._lost = tuple(self._lost), []
        return lost

    # --- questions ----------------------------------------------------------------------------

    def lookup(self, number: int) -> LabelSet | None:
        """Return the labels of a number as far as this node knows them, without the store."""
        return (
            self._well_known.get(number)
            or self._seen.get(number)
            or self.local.lookup(number)
            or self.nodes.lookup(number)
        )

    def refcount(self, number: int) -> int:
        """Return how many references this node holds; reserved numbers have none."""
        known = self._used.get(number)
        if known is not None:
            return known.refcount
        return self.local.refcount(number) or self.nodes.refcount(number)

    def known(self) -> dict[int, LabelSet]:
        """Return every number this node knows with its labels, reserved ones included."""
        numbered = dict(self.local.items()) | dict(self.nodes.items())
        return self._well_known | self._seen | numbered

    def describe_host(self, labels: Iterable[Label]) -> None:
        """Give the identity of this node the node's labels besides its own, `reserved:host`."""
        host = RESERVED_LABELS[Reserved.HOST]
        self._well_known[int(Reserved.HOST)] = host.with_labels(labels)

    async def follow(self) -> AsyncIterator[frozenset[int]]:
        """Know the numbers that other nodes use, too, from now on, until closed.

        Yields:
            The numbers that got other labels, or lost them; first, perhaps none, once all that are
            there now are known.

        Raises:
            KvStoreError: the store does not answer.
        """
        told: Mapping[str, bytes] = {}
        async for masters in self._store.watch(f"{PREFIX}/id/"):
            fresh = [key for key, value in masters.items() if told.get(key) != value]
            told = masters
            yield frozenset(self._learn({key: masters[key] for key in fresh}, masters.keys()))

    def _learn(self, fresh: Mapping[str, bytes], present: Container[str]) -> Iterator[int]:
        """Take over masters; what this node uses itself it has agreed on, and knows better."""
        for key, value in fresh.items():
            number, labels = _master_number(key), _read_labels(value)
            if number is None or labels is None or number in self._used:
                continue
            if self._seen.get(number) != labels:
                self._seen[number] = labels
                yield number
        for number in tuple(self._seen):
            if number not in self._used and self._master(number) not in present:
                del self._seen[number]
                yield number


def _master_number(key: str) -> int | None:
    text = key.rpartition("/")[2]
    return int(text) if text.isdigit() else None


def _read_labels(value: bytes) -> LabelSet | None:
    """Read a master's value; None if another program wrote something else there."""
    try:
        return LabelSet.from_text(value.decode())
    except (UnicodeDecodeError, LabelError):
        return None
