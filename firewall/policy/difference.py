"""What leads from one snapshot to the next, and the step itself.

A change of one label or one rule moves a handful of rows among thousands, so only those cross the
process border (`firewall.policy.snapshot_file`). Tables with a key (endpoints, identities, ipcache,
policies) send the rows that are new or other and the keys that are gone; tables by position (L7
rules, origins) send the places that hold something else, and their length. Settings and numbers
are few and sent always.

`patch(old, difference(old, new)) == new`, or there is no difference: a snapshot whose tables are
not in the order of their keys, as the resolver's always are, can only be sent whole.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable
from operator import attrgetter
from typing import TypeVar

import msgspec

from firewall.policy.snapshot import (
    EndpointRow,
    IdentityRow,
    IpcacheRow,
    L7Row,
    OriginRow,
    PolicyRow,
    Settings,
    SightRow,
    Snapshot,
    SnapshotError,
)

R = TypeVar("R")
K = TypeVar("K", int, tuple[int, bytes], tuple[int, bytes, int])

PrefixKey = tuple[int, bytes, int]
"""Key of an ipcache row: bytes of its network, network, length; its order is the table's."""


class Difference(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """The rows that `revision` has and `base` does not, and what it has no more.

    `l7` and `origins` are (place, row); `l7_count` and `origin_count` the length of their tables.
    """

    base: int
    revision: int
    policy_revision: int
    generation: int
    settings: Settings
    endpoints: tuple[EndpointRow, ...]
    endpoints_gone: tuple[int, ...]
    identities: tuple[IdentityRow, ...]
    identities_gone: tuple[int, ...]
    ipcache: tuple[IpcacheRow, ...]
    ipcache_gone: tuple[PrefixKey, ...]
    sights: tuple[SightRow, ...]
    sights_gone: tuple[tuple[int, bytes], ...]
    policies: tuple[PolicyRow, ...]
    policies_gone: tuple[int, ...]
    l7: tuple[tuple[int, L7Row], ...]
    l7_count: int
    origins: tuple[tuple[int, OriginRow], ...]
    origin_count: int


endpoint_key: Callable[[EndpointRow], int] = attrgetter("id")
identity_key: Callable[[IdentityRow], int] = attrgetter("number")
policy_key: Callable[[PolicyRow], int] = attrgetter("identity")


def sight_key(row: SightRow) -> tuple[int, bytes]:
    """Return the key of a sight."""
    return row.endpoint, row.address


def prefix_key(row: IpcacheRow) -> PrefixKey:
    """Return the key of an ipcache row."""
    return len(row.network), row.network, row.length


def difference(old: Snapshot, new: Snapshot) -> Difference | None:
    """Return what leads from `old` to `new`, None if `new` can only be sent whole."""
    endpoints, endpoints_gone = _rows(old.endpoints, new.endpoints, endpoint_key)
    identities, identities_gone = _rows(old.identities, new.identities, identity_key)
    ipcache, ipcache_gone = _rows(old.ipcache, new.ipcache, prefix_key)
    sights, sights_gone = _rows(old.sights, new.sights, sight_key)
    policies, policies_gone = _rows(old.policies, new.policies, policy_key)
    found = Difference(
        base=old.revision,
        revision=new.revision,
        policy_revision=new.policy_revision,
        generation=new.generation,
        settings=new.settings,
        endpoints=endpoints,
        endpoints_gone=endpoints_gone,
        identities=identities,
        identities_gone=identities_gone,
        ipcache=ipcache,
        ipcache_gone=ipcache_gone,
        sights=sights,
        sights_gone=sights_gone,
        policies=policies,
        policies_gone=policies_gone,
        l7=tuple(_places(old.l7, new.l7)),
        l7_count=len(new.l7),
        origins=tuple(_places(old.origins, new.origins)),
        origin_count=len(new.origins),
    )
    return found if patch(old, found) == new else None


def patch(old: Snapshot, step: Difference) -> Snapshot:
    """Return the snapshot after a step; rows that did not change are `old`'s own.

    Raises:
        SnapshotError: the step does not begin at `old`.
    """
    if step.base != old.revision:
        raise SnapshotError(f"a difference from revision {step.base}, this is {old.revision}")
    return Snapshot(
        revision=step.revision,
        policy_revision=step.policy_revision,
        generation=step.generation,
        settings=old.settings if step.settings == old.settings else step.settings,
        endpoints=_merged(old.endpoints, step.endpoints, step.endpoints_gone, endpoint_key),
        identities=_merged(old.identities, step.identities, step.identities_gone, identity_key),
        ipcache=_merged(old.ipcache, step.ipcache, step.ipcache_gone, prefix_key),
        sights=_merged(old.sights, step.sights, step.sights_gone, sight_key),
        policies=_merged(old.policies, step.policies, step.policies_gone, policy_key),
        l7=_placed(old.l7, step.l7, step.l7_count),
        origins=_placed(old.origins, step.origins, step.origin_count),
    )


def moved(
    old: tuple[R, ...], new: tuple[R, ...], key: Callable[[R], K]
) -> dict[K, tuple[R | None, R | None]]:
    """Return the rows of a table that are not as before, by key; None = there was or is none.

    Rows that are the same object are passed over without a look.
    """
    if old is new:
        return {}
    stale, fresh = _unaligned(old, new)
    earlier = {key(row): row for row in stale}
    later = {key(row): row for row in fresh}
    found: dict[K, tuple[R | None, R | None]] = {
        at: (earlier.get(at), row) for at, row in later.items() if earlier.get(at) != row
    }
    found.update((at, (row, None)) for at, row in earlier.items() if at not in later)
    return found


def _unaligned(old: tuple[R, ...], new: tuple[R, ...]) -> tuple[list[R], list[R]]:
    """Return the rows of either table that the other has not got as the same object there."""
    if len(old) == len(new):
        places = [at for at, (one, two) in enumerate(zip(old, new, strict=True)) if one is not two]
        return [old[at] for at in places], [new[at] for at in places]
    first = 0
    for one, two in zip(old, new, strict=False):
        if one is not two:
            break
        first += 1
    most = min(len(old), len(new)) - first
    last = 0
    while last < most and old[-1 - last] is new[-1 - last]:
        last += 1
    before, after = old[first : len(old) - last], new[first : len(new) - last]
    known, kept = set(map(id, before)), set(map(id, after))
    return (
        [row for row in before if id(row) not in kept],
        [row for row in after if id(row) not in known],
    )


def _rows(
    old: tuple[R, ...], new: tuple[R, ...], key: Callable[[R], K]
) -> tuple[tuple[R, ...], tuple[K, ...]]:
    """Return the rows that are new or other, and the keys of those that are gone."""
    found = moved(old, new, key)
    changed = tuple(row for _, row in found.values() if row is not None)
    return changed, tuple(at for at, (_, row) in found.items() if row is None)


def _merged(
    old: tuple[R, ...], changed: Collection[R], gone: Collection[K], key: Callable[[R], K]
) -> tuple[R, ...]:
    if not changed and not gone:
        return old
    rows = list(old)
    for row in changed:
        wanted = key(row)
        place = bisect_left(rows, wanted, key=key)
        if place < len(rows) and key(rows[place]) == wanted:
            rows[place] = row
        else:
            rows.insert(place, row)
    for wanted in gone:
        place = bisect_left(rows, wanted, key=key)
        if place < len(rows) and key(rows[place]) == wanted:
            del rows[place]
    return tuple(rows)


def _places(old: tuple[R, ...], new: tuple[R, ...]) -> Iterable[tuple[int, R]]:
    for place, row in enumerate(new):
        if place >= len(old) or (old[place] is not row and old[place] != row):
            yield place, row


def _placed(old: tuple[R, ...], changed: Collection[tuple[int, R]], count: int) -> tuple[R, ...]:
    if not changed and count == len(old):
        return old
    rows = list(old[:count])
    for place, row in changed:
        if place < len(rows):
            rows[place] = row
        elif place == len(rows) < count:
            rows.append(row)
        else:
            raise SnapshotError(
                f"a difference names place {place} of {count}, {len(rows)} are known"
            )
    if len(rows) != count:
        raise SnapshotError(f"a difference leaves {len(rows)} rows of {count}")
    return tuple(rows)
