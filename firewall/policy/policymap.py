"""The answer of one identity's policy in one direction, for one peer, protocol and port.

Entries are looked up by protocol, then by the selectors that the peer matches, then by port; what
is found is put in order of precedence and read from the front:

    tier, then priority, then deny < allow < pass; the first deny or allow decides,
    a pass skips the rest of its tier, and if nothing is left the direction's default decides.

Cilium and Kubernetes policies all live in one tier at one priority, so for them any deny wins, else
any allow, and specificity decides nothing. It only names the winner among equals (the reported
match type) and, for L7, nothing at all: every allow of the deciding level that matches is gathered;
if one has L7 rules the traffic is proxied, if one has none the proxy refuses nothing.

Sources: Cilium pkg/policy/mapstate.go, pkg/policy/testutils/simulate.go, bpf/lib/policy.h.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from firewall.policy.model import ANY_PROTOCOL, Action, Tier
from firewall.policy.snapshot import ANY_SELECTOR, DirectionRow, EntryRow, L7Row, OriginRow
from firewall.policy.verdict import DropReason, PolicyMatch

LOCAL_HOST_SELECTOR = -1
"""Matched by the local host alone; never in a snapshot, only for `allow_localhost`."""

LOCAL_HOST_ORIGIN = OriginRow(
    kind="reserved",
    namespace="",
    name="allow-localhost-ingress",
    path="",
    labels=("reserved:io.cilium.policy.derived-from=allow-localhost-ingress",),
)
"""Where the permission of the local host comes from: the setting, not a file."""

LOCAL_HOST_ENTRY = EntryRow(
    action=Action.ALLOW,
    tier=Tier.NORMAL,
    priority=0.0,
    selector=LOCAL_HOST_SELECTOR,
    protocol=ANY_PROTOCOL,
    port_low=0,
    port_high=65535,
    port_name="",
    l7=-1,
    origin=-1,
    authentication="disabled",
)
"""What `allow_localhost: always` adds to every endpoint's ingress; a deny still wins over it."""

_LAST_PORT = 65535
_ACTION_ORDER = {Action.DENY: 0, Action.ALLOW: 1, Action.PASS: 2}
_UNAUTHENTICATED = frozenset({"required", "test-always-fail"})
_MEMO_COUNT = 4096  # verdicts remembered per map: a few MB at worst, more than a map's entries


class DirectionVerdict(NamedTuple):
    """What one side says.

    Attributes:
        allowed: whether the packet may pass this side (an audited denial may).
        enforced: False = no policy in this direction, nothing was looked up.
        audited: the side denies, but audit mode lets it pass; `reason` says why it denies.
        match: how specific the deciding entry is.
        reason: why it is denied, None if it is not.
        l7: rules for the proxy, None = not proxied.
        unrestricted: proxied, but the proxy refuses nothing.
        allowed_by: where the deciding allows were written.
        denied_by: where the deciding denies (or the authentication demand) were written.
        isolated_by: where default deny was switched on.
        log: the `log.value` of the deciding rules.
        entries: the deciding entries, most specific first; empty if the default decided.
    """

    allowed: bool
    enforced: bool
    audited: bool
    match: PolicyMatch
    reason: DropReason | None = None
    l7: tuple[L7Row, ...] | None = None
    unrestricted: bool = False
    allowed_by: tuple[OriginRow, ...] = ()
    denied_by: tuple[OriginRow, ...] = ()
    isolated_by: tuple[OriginRow, ...] = ()
    log: tuple[str, ...] = ()
    entries: tuple[EntryRow, ...] = ()


UNENFORCED = DirectionVerdict(
    allowed=True, enforced=False, audited=False, match=PolicyMatch.ALL, unrestricted=False
)
"""No policy in this direction (Cilium keeps an allow-all entry in the map then)."""

UNRESOLVED = DirectionVerdict(
    allowed=False,
    enforced=True,
    audited=False,
    match=PolicyMatch.NONE,
    reason=DropReason.DROP_EP_NOT_READY,
)
"""An endpoint whose identity has no policy yet: closed until it has."""


class _Ranked(NamedTuple):
    """An entry with its place in the order of precedence; tuples of it sort by that place.

    `order` makes the place unique, so that sorting never compares rows.
    """

    tier: int
    priority: float
    action: int
    plain: bool
    width: int
    everyone: bool
    order: int
    row: EntryRow


def _rank(order: int, row: EntryRow) -> _Ranked:
    ports = _LAST_PORT + 2 if row.protocol == ANY_PROTOCOL else row.port_high - row.port_low
    return _Ranked(
        tier=row.tier,
        priority=row.priority,
        action=_ACTION_ORDER[Action(row.action)],
        plain=row.l7 < 0,
        width=0 if row.port_name else ports,
        everyone=row.selector == ANY_SELECTOR,
        order=order,
        row=row,
    )


def match_type(row: EntryRow) -> PolicyMatch:
    """Return how specific an entry is, as Hubble reports it."""
    someone = row.selector != ANY_SELECTOR
    if row.protocol == ANY_PROTOCOL:
        return PolicyMatch.L3_ONLY if someone else PolicyMatch.ALL
    if not row.port_name and row.port_low == 0 and row.port_high == _LAST_PORT:
        return PolicyMatch.L3_PROTO if someone else PolicyMatch.PROTO_ONLY
    return PolicyMatch.L3_L4 if someone else PolicyMatch.L4_ONLY


class _Group:
    """Entries by selector, to be met with the selectors of a peer; the smaller side is walked."""

    __slots__ = ("_by_selector", "_selectors")

    def __init__(self) -> None:
        self._by_selector: dict[int, list[_Ranked]] = {}
        self._selectors: frozenset[int] = frozenset()

    def add(self, entry: _Ranked) -> None:
        self._by_selector.setdefault(entry.row.selector, []).append(entry)

    def close(self) -> None:
        self._selectors = frozenset(self._by_selector)

    def collect(self, selectors: frozenset[int], into: list[_Ranked]) -> None:
        for selector in self._selectors & selectors:
            into += self._by_selector[selector]


class _Ports:
    """Groups by port range: a segment tree over the boundaries of the ranges.

    A range lies in at most 2*log2(n) nodes and a port is in log2(n) of them, so neither a thousand
    single ports nor a thousand nested ranges cost a scan.
    """

    __slots__ = ("_bounds", "_leaves", "_tree")

    def __init__(self, entries: Sequence[_Ranked]) -> None:
        edges = {entry.row.port_low for entry in entries}
        edges.update(entry.row.port_high + 1 for entry in entries)
        self._bounds = sorted(edges)
        self._leaves = len(self._bounds)
        self._tree: list[_Group | None] = [None] * (2 * self._leaves)
        at = {edge: place for place, edge in enumerate(self._bounds)}
        for entry in entries:
            self._insert(at[entry.row.port_low], at[entry.row.port_high + 1], entry)
        for group in self._tree:
            if group is not None:
                group.close()

    def _insert(self, first: int, end: int, entry: _Ranked) -> None:
        first += self._leaves
        end += self._leaves
        while first < end:
            if first & 1:
                self._group(first).add(entry)
                first += 1
            if end & 1:
                end -= 1
                self._group(end).add(entry)
            first >>= 1
            end >>= 1

    def _group(self, place: int) -> _Group:
        group = self._tree[place]
        if group is None:
            group = self._tree[place] = _Group()
        return group

    def collect(self, port: int, selectors: frozenset[int], into: list[_Ranked]) -> None:
        place = bisect_right(self._bounds, port) - 1
        if place < 0:
            return
        tree = self._tree
        place += self._leaves
        while place:
            group = tree[place]
            if group is not None:
                group.collect(selectors, into)
            place >>= 1


class _Table:
    """The entries of one protocol (0 = the entries for every protocol)."""

    __slots__ = ("_named", "_ports", "_whole")

    def __init__(self, entries: Iterable[_Ranked]) -> None:
        ranges: list[_Ranked] = []
        self._whole = _Group()
        self._named: dict[str, _Group] = {}
        for entry in entries:
            row = entry.row
            if row.port_name:
                self._named.setdefault(row.port_name, _Group()).add(entry)
            elif row.port_low == 0 and row.port_high == _LAST_PORT:
                self._whole.add(entry)
            else:
                ranges.append(entry)
        self._ports = _Ports(ranges) if ranges else None
        for group in (self._whole, *self._named.values()):
            group.close()

    def collect(
        self, selectors: frozenset[int], port: int, names: frozenset[str], into: list[_Ranked]
    ) -> None:
        self._whole.collect(selectors, into)
        if self._ports is not None:
            self._ports.collect(port, selectors, into)
        for name in names:
            group = self._named.get(name)
            if group is not None:
                group.collect(selectors, into)


class PolicyMap:
    """One direction of one identity, arranged for lookups.

    Built on first use, and kept while later snapshots say the same.

    Args:
        row: the direction as published.
        l7: the snapshot's L7 table.
        origins: the snapshot's table of origins.
        allow_local_host: whether to add `LOCAL_HOST_ENTRY`.
    """

    def __init__(
        self,
        row: DirectionRow,
        l7: Sequence[L7Row],
        origins: Sequence[OriginRow],
        *,
        allow_local_host: bool = False,
    ) -> None:
        entries = (*row.entries, LOCAL_HOST_ENTRY) if allow_local_host else row.entries
        by_protocol: dict[int, list[_Ranked]] = {}
        for order, entry in enumerate(entries):
            by_protocol.setdefault(entry.protocol, []).append(_rank(order, entry))
        self._every = _Table(by_protocol.pop(ANY_PROTOCOL, ()))
        self._tables = {protocol: _Table(found) for protocol, found in by_protocol.items()}
        self._l7 = l7
        self._origins = origins
        self._l7_used = frozenset(entry.l7 for entry in row.entries)
        self._origins_used = frozenset(entry.origin for entry in row.entries).union(row.isolated_by)
        self._enforced = row.enforced
        self._memo: dict[tuple[frozenset[int], int, int, frozenset[str]], DirectionVerdict] = {}
        self.named = any(entry.port_name for entry in entries)
        self._default = self._default_verdict(row)

    def uses(self, l7: set[int], origins: set[int]) -> bool:
        """Say whether any of these places in the snapshot's tables is referred to."""
        return not (self._l7_used.isdisjoint(l7) and self._origins_used.isdisjoint(origins))

    def rebase(self, l7: Sequence[L7Row], origins: Sequence[OriginRow]) -> None:
        """Go over to another snapshot's tables, which hold the same rows in all used places."""
        self._l7 = l7
        self._origins = origins

    def _default_verdict(self, row: DirectionRow) -> DirectionVerdict:
        isolated_by = tuple(self._origins[index] for index in row.isolated_by)
        return DirectionVerdict(
            allowed=not row.default_deny,
            enforced=row.enforced,
            audited=False,
            match=PolicyMatch.NONE if row.default_deny else PolicyMatch.ALL,
            reason=DropReason.POLICY_DENIED if row.default_deny else None,
            isolated_by=isolated_by,
        )

    def lookup(
        self, selectors: frozenset[int], protocol: int, port: int, names: frozenset[str]
    ) -> DirectionVerdict:
        """Return this direction's verdict.

        Args:
            selectors: the numbers that the peer matches, `ANY_SELECTOR` among them.
            protocol: IANA number of the upper layer.
            port: destination port, or the ICMP type.
            names: names of that port and protocol: the subject's for ingress, the peer's for
                egress; read only if `named`.
        """
        if not self._enforced:
            return UNENFORCED
        key = selectors, protocol, port, names
        verdict = self._memo.get(key)
        if verdict is None:
            verdict = self._decide(self.matching(selectors, protocol, port, names))
            if len(self._memo) >= _MEMO_COUNT:
                self._memo.clear()
            self._memo[key] = verdict
        return verdict

    def matching(
        self, selectors: frozenset[int], protocol: int, port: int, names: frozenset[str]
    ) -> list[_Ranked]:
        """Return every entry that speaks about this traffic, highest precedence first."""
        found: list[_Ranked] = []
        self._every.collect(selectors, port, names, found)
        table = self._tables.get(protocol)
        if table is not None:
            table.collect(selectors, port, names, found)
        if len(found) > 1:
            found.sort()
        return found

    def _decide(self, found: list[_Ranked]) -> DirectionVerdict:
        passed = None
        for at, entry in enumerate(found):
            if entry.tier == passed:
                continue
            if entry.row.action == Action.PASS:
                passed = entry.tier
                continue
            level = [
                other.row
                for other in found[at:]
                if other.action == entry.action
                and other.priority == entry.priority
                and other.tier == entry.tier
            ]
            return self._deny(level) if entry.row.action == Action.DENY else self._allow(level)
        return self._default

    def _deny(
        self, level: list[EntryRow], reason: DropReason = DropReason.POLICY_DENY
    ) -> DirectionVerdict:
        return DirectionVerdict(
            allowed=False,
            enforced=True,
            audited=False,
            match=match_type(level[0]),
            reason=reason,
            denied_by=self._written(level),
            isolated_by=self._default.isolated_by,
            log=_log(level),
            entries=tuple(level),
        )

    def _allow(self, level: list[EntryRow]) -> DirectionVerdict:
        for row in level:
            if row.authentication:
                if row.authentication in _UNAUTHENTICATED and not _lets_host_in(level):
                    return self._deny([row], DropReason.AUTH_REQUIRED)
                break
        l7, unrestricted = None, False
        if level[0].l7 >= 0:  # rows that redirect come first
            l7 = tuple(dict.fromkeys(self._l7[row.l7] for row in level if row.l7 >= 0))
            unrestricted = any(row.l7 < 0 or row.observe for row in level)
        return DirectionVerdict(
            allowed=True,
            enforced=True,
            audited=False,
            match=match_type(level[0]),
            l7=l7,
            unrestricted=unrestricted,
            allowed_by=self._written(level),
            isolated_by=self._default.isolated_by,
            log=_log(level),
            entries=tuple(level),
        )

    def _written(self, level: list[EntryRow]) -> tuple[OriginRow, ...]:
        if len(level) == 1:
            return (self._origin(level[0].origin),)
        indexes = dict.fromkeys(row.origin for row in level)
        return tuple(self._origin(index) for index in indexes)

    def _origin(self, index: int) -> OriginRow:
        return self._origins[index] if index >= 0 else LOCAL_HOST_ORIGIN


def _lets_host_in(level: Iterable[EntryRow]) -> bool:
    return any(row is LOCAL_HOST_ENTRY for row in level)


def _log(level: Iterable[EntryRow]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.log for row in level if row.log))
