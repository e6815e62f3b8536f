"""From policy objects, identities and endpoints to the next snapshot.

Policy is resolved once per identity, not per endpoint: everything with the same labels shares the
rows. Each identity's rows are kept until something that they depend on changes (an object whose
subject selects the identity, or the enforcement mode), and rows that did not change are the same
objects in the next snapshot. The order in which changes arrived leaves no trace in the answers.

A contradiction between rules (see `firewall.policy.compile`) concerns only the identities selected
by both: they keep the policy they had, and one that had none is closed.

Sources: Cilium pkg/policy/repository.go computePolicyEnforcementAndRules, pkg/policy/rule.go.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

import msgspec

from conntrack.address import Prefix
from firewall.identities.ipcache import LongestPrefixMap
from firewall.identities.labels import RESERVED, LabelSet
from firewall.identities.reserved import RESERVED_LABELS, Reserved
from firewall.policy.compile import (
    CompiledEntry,
    Conflict,
    compile_entry,
    find_conflict,
    new_tables,
)
from firewall.policy.difference import PrefixKey, sight_key
from firewall.policy.generation import permission_lost
from firewall.policy.model import (
    LabelPeer,
    NodePeer,
    ObjectKey,
    Origin,
    Peer,
    PolicyEntry,
    PolicyObject,
    Tier,
)
from firewall.policy.objects import Resource
from firewall.policy.repository import RepositoryChange, order_of
from firewall.policy.rows import Rows
from firewall.policy.selectors import Moved, SelectorCache
from firewall.policy.snapshot import (
    DirectionRow,
    EndpointRow,
    IdentityRow,
    IpcacheRow,
    NamedPortRow,
    OriginRow,
    PolicyRow,
    Settings,
    SightRow,
    Snapshot,
)
from firewall.policy.uses import Uses
from firewall.policy.verdict import TrafficDirection

_ISOLATED_BY_COUNT = 8  # objects named per direction: they travel with every denied flow

_OPEN = DirectionRow(enforced=False, default_deny=False)
_CLOSED = DirectionRow(enforced=True, default_deny=True)

ENFORCEMENT_ALWAYS = OriginRow(
    kind="setting",
    namespace="",
    name="enforcement always",
    path="",
    labels=("reserved:io.cilium.policy.derived-from=deny-any",),
)
"""Who isolates an endpoint that no rule selects, in mode `always`."""

ENFORCEMENT_INIT = OriginRow(
    kind="setting",
    namespace="",
    name="reserved:init is always enforced",
    path="",
    labels=("reserved:io.cilium.policy.derived-from=deny-any",),
)
"""Who isolates an endpoint whose labels are not known yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolutionError:
    """Rules that contradict each other for one identity, whose policy therefore did not change."""

    identity: int
    direction: TrafficDirection
    message: str
    first: Origin
    second: Origin

    def __str__(self) -> str:
        """Render as `file:line: message`, with the other place behind it."""
        where, other = _place(self.first), _place(self.second)
        return f"{where}: {self.message}; the other is {other} (identity {self.identity})"


def _place(origin: Origin) -> str:
    if origin.file:
        return f"{origin.file}:{origin.line}:{origin.column}"
    name = f"{origin.namespace}/{origin.name}" if origin.namespace else origin.name
    return f"{origin.kind} {name} {origin.path}"


@dataclass(slots=True)
class _Subject:
    """What is kept per identity that has endpoints here."""

    labels: LabelSet
    row: PolicyRow | None = None
    dirty: bool = True
    errors: list[ResolutionError] = field(default_factory=list)


class Resolver:
    """Resolves policy and assembles snapshots, doing again only what a change touches.

    The reserved identities are known from the start.

    Args:
        cluster: the own cluster's name, for the entity `cluster`.
        cidr_matches_nodes: see `SelectorCache`.
        names_by_identity: see `SelectorCache`.
        last: the snapshot in force when the agent started, so that revisions and the generation go
            on from there; the first different snapshot then counts as taking permissions away.

    Attributes:
        reason: why the last snapshot raised the generation, None if it did not.
    """

    def __init__(
        self,
        *,
        cluster: str = "default",
        cidr_matches_nodes: bool = False,
        names_by_identity: bool = True,
        last: Snapshot | None = None,
    ) -> None:
        self._peers = SelectorCache(
            cluster=cluster,
            cidr_matches_nodes=cidr_matches_nodes,
            names_by_identity=names_by_identity,
        )
        self._subject_selectors = SelectorCache(cluster=cluster)
        self._tables = new_tables()
        self._objects: dict[ObjectKey, tuple[CompiledEntry, ...]] = {}
        self._by_subject: dict[int, list[CompiledEntry]] = {}
        self._subjects: dict[int, _Subject] = {}
        self._endpoints: tuple[EndpointRow, ...] = ()
        self._named_ports: dict[int, tuple[NamedPortRow, ...]] = {}
        self._moved_ports: set[int] = set()
        self._identity_rows: Rows[int, IdentityRow] = Rows()
        self._known: dict[Prefix, int] = {}
        self._address_rows: Rows[PrefixKey, IpcacheRow] = Rows()
        self._uses = Uses()
        self._enforcement = "default"
        self._policy_revision = 1
        for reserved, labels in RESERVED_LABELS.items():
            if reserved is not Reserved.UNKNOWN:
                self._peers.upsert_identity(int(reserved), labels)
        self._last = last
        self.reason: str | None = None
        self._inherited = last is not None

    # --- what is known ------------------------------------------------------------------------

    def upsert_identity(self, number: int, labels: LabelSet) -> None:
        """Add an identity, or replace the labels of a reserved one."""
        self._peers.upsert_identity(number, labels)
        subject = self._subjects.get(number)
        if subject is not None and subject.labels != labels:
            self._subjects[number] = _Subject(labels, row=subject.row)
            self._subject_selectors.upsert_identity(number, labels)

    def remove_identity(self, number: int) -> None:
        """Forget an identity; endpoints that still have it keep their policy."""
        self._peers.remove_identity(number)

    def set_endpoints(
        self,
        endpoints: Iterable[EndpointRow],
        elsewhere: Iterable[tuple[int, tuple[NamedPortRow, ...]]] = (),
    ) -> None:
        """Replace the managed endpoints; their identities must have been added before.

        Args:
            endpoints: those of this node.
            elsewhere: identities of other nodes' endpoints, with the named ports of those.

        Raises:
            KeyError: an endpoint's identity is unknown.
        """
        rows = tuple(sorted(endpoints, key=lambda row: row.id))
        numbers = {row.identity for row in rows}
        for number in numbers - self._subjects.keys():
            labels = self._peers.labels(number)
            if labels is None:
                raise KeyError(f"identity {number} of an endpoint is unknown")
            self._subjects[number] = _Subject(labels)
            self._subject_selectors.upsert_identity(number, labels)
        for number in self._subjects.keys() - numbers:
            del self._subjects[number]
            self._subject_selectors.remove_identity(number)
        self._endpoints = rows
        ports: dict[int, set[NamedPortRow]] = {}
        for number, found in chain(((row.identity, row.named_ports) for row in rows), elsewhere):
            if found:
                ports.setdefault(number, set()).update(found)
        named = {
            number: tuple(sorted(several, key=_port_order)) for number, several in ports.items()
        }
        before = self._named_ports
        self._moved_ports.update(
            number
            for number in before.keys() | named.keys()
            if before.get(number) != named.get(number)
        )
        self._named_ports = named

    def set_resources(self, resources: Iterable[Resource]) -> None:
        """Replace the CIDR groups, services and backends that rules refer to."""
        self._peers.set_resources(resources)

    def apply(self, change: RepositoryChange) -> None:
        """Follow a change of the repository."""
        self._policy_revision = change.revision
        changed = change.changed
        fresh = [entry for one in changed if one.after for entry in one.after.entries]
        self._peers.add(peer for entry in fresh for peer in entry.peers or ())
        self._subject_selectors.add(_subject_peer(entry) for entry in fresh)
        touched: set[int] = set()
        for one in changed:
            for compiled in self._objects.pop(one.key, ()):
                touched.add(compiled.subject)
                self._by_subject[compiled.subject].remove(compiled)
                self._uses.drop(compiled)
            if one.after is None:
                continue
            after = tuple(self._compile(one.after))
            self._objects[one.key] = after
            for compiled in after:
                touched.add(compiled.subject)
                self._by_subject.setdefault(compiled.subject, []).append(compiled)
                self._uses.take(compiled)
        for number, subject in self._subjects.items():
            if not touched.isdisjoint(self._subject_selectors.matched(number)):
                subject.dirty = True

    def _compile(self, one: PolicyObject) -> Iterator[CompiledEntry]:
        for at, entry in enumerate(one.entries):
            yield compile_entry(
                entry,
                self._peers.number,
                self._tables,
                subject=self._subject_selectors.number(_subject_peer(entry)),
                order=(*order_of(one.key), at),
            )

    # --- what follows from it -----------------------------------------------------------------

    def prefixes(self) -> set[Prefix]:
        """Return the prefixes of all rules, excepts included, that need an ipcache row each.

        The row's identity should carry `cidr:<prefix>` and `reserved:world`; a row that stays with
        a world identity is matched by its prefix all the same.
        """
        self._settle()
        return self._peers.prefixes()

    def fqdns(self) -> set[str]:
        """Return the FQDN selector texts of all rules: the `fqdn:` labels that mean something."""
        self._settle()
        return self._peers.texts()

    @property
    def selectors(self) -> Mapping[int, Peer]:
        """What the selector numbers of the snapshot mean, for explanations."""
        return self._peers.peers()

    @property
    def errors(self) -> tuple[ResolutionError, ...]:
        """The contradictions found by the last `snapshot`, by identity."""
        return tuple(
            error for number in sorted(self._subjects) for error in self._subjects[number].errors
        )

    def snapshot(
        self,
        *,
        settings: Settings | None = None,
        ipcache: Iterable[tuple[Prefix, int]] = (),
        sights: Iterable[tuple[int, bytes, tuple[str, ...]]] = (),
    ) -> Snapshot:
        """Return the snapshot for the present state, the last one itself if nothing changed.

        Args:
            settings: what else workers must know; `settings.enforcement` is obeyed here.
            ipcache: every known prefix with its identity. Whole families that nobody mentions are
                added as world.
            sights: endpoint, address, and the FQDN selector texts that mean it for that endpoint;
                only without `names_by_identity`.
        """
        settings = settings or Settings()
        if settings.enforcement != self._enforcement:
            self._enforcement = settings.enforcement
            for subject in self._subjects.values():
                subject.dirty = True
        self._settle()
        moved = self._peers.moved
        policies = tuple(
            row for _, subject in sorted(self._subjects.items()) if (row := subject.row) is not None
        )
        identities = self._identities(moved.identities)
        addresses = self._addresses(ipcache, settings, moved)
        self._peers.settle()
        return self._publish(
            Snapshot(
                policy_revision=self._policy_revision,
                settings=settings,
                endpoints=self._endpoints,
                identities=identities,
                ipcache=addresses,
                sights=self._sights(sights),
                policies=policies,
                l7=self._tables.l7.values(),
                origins=self._tables.origins.values(),
            )
        )

    def _settle(self) -> None:
        """Resolve what changed, then forget what only the old rules used."""
        for number, subject in self._subjects.items():
            if subject.dirty:
                self._resolve(number, subject)
        if self._uses.doubtful:
            self._forget_unused()

    def _publish(self, new: Snapshot) -> Snapshot:
        old = self._last
        if old is None:
            new = msgspec.structs.replace(new, revision=1)
        else:
            new = msgspec.structs.replace(new, revision=old.revision, generation=old.generation)
            if new == old:
                self._inherited = False
                return old
            # Numbers of an earlier agent's tables mean nothing here, so they cannot be compared.
            lost = "the agent restarted" if self._inherited else permission_lost(old, new)
            new = msgspec.structs.replace(
                new,
                revision=old.revision + 1,
                generation=old.generation + (lost is not None),
            )
            self.reason = lost
        self._inherited = False
        self._last = new
        return new

    def _resolve(self, number: int, subject: _Subject) -> None:
        subject.dirty = False
        subject.errors = []
        selected = self._selected(number)
        rows: dict[TrafficDirection, DirectionRow] = {}
        for direction in TrafficDirection:
            entries = [c for c in selected if c.entry.direction is direction]
            conflict = None if self._enforcement == "never" else find_conflict(entries)
            if conflict is not None:
                subject.errors.append(_error(number, direction, conflict))
            rows[direction] = self._direction(subject, entries)
        if subject.errors:
            if subject.row is None:
                subject.row = PolicyRow(number, _CLOSED, _CLOSED)
            return
        new = PolicyRow(number, rows[TrafficDirection.INGRESS], rows[TrafficDirection.EGRESS])
        if new != subject.row:
            subject.row = new

    def _selected(self, number: int) -> list[CompiledEntry]:
        """Return the entries whose subject selects the identity, in the order of the objects.

        The host is selected by node selectors only, whatever its labels.
        """
        host = _is_host(self._subjects[number].labels)
        found = [
            compiled
            for subject in self._subject_selectors.matched(number)
            for compiled in self._by_subject.get(subject, ())
            if compiled.entry.subject_is_node or not host
        ]
        found.sort(key=_place_among_all)
        return found

    def _direction(self, subject: _Subject, entries: list[CompiledEntry]) -> DirectionRow:
        host = _is_host(subject.labels)
        if self._enforcement == "never" or (host and not entries):
            return _OPEN
        isolated_by = self._isolated_by(entries)
        if isolated_by:
            entries = _before_default_deny(entries)
        if self._enforcement == "always" and not host:
            isolated_by[self._tables.origins.number(ENFORCEMENT_ALWAYS)] = None
        elif subject.labels.get(RESERVED, Reserved.INIT.label) is not None:
            isolated_by[self._tables.origins.number(ENFORCEMENT_INIT)] = None
        if not entries and not isolated_by:
            return _OPEN
        return DirectionRow(
            enforced=True,
            default_deny=bool(isolated_by),
            entries=tuple(row for compiled in entries for row in compiled.rows),
            isolated_by=tuple(isolated_by)[:_ISOLATED_BY_COUNT],
        )

    @staticmethod
    def _isolated_by(entries: Iterable[CompiledEntry]) -> dict[int, None]:
        """Return one origin for each object that switches default deny on, its first."""
        found: dict[tuple[str, str, str], int] = {}
        for compiled in entries:
            if compiled.entry.default_deny:
                origin = compiled.entry.origin
                found.setdefault((origin.kind, origin.namespace, origin.name), compiled.origin)
        return dict.fromkeys(found.values())

    def _identities(self, moved: set[int]) -> tuple[IdentityRow, ...]:
        """Make the rows of these identities again, and of those whose named ports changed."""
        rows = self._identity_rows
        for number in moved | self._moved_ports:
            labels = self._peers.labels(number)
            if labels is None:
                rows.drop(number)
                continue
            matched = tuple(sorted(self._peers.matched(number)))
            ports = self._named_ports.get(number, ())
            rows.put(number, IdentityRow(number, labels.strings(), matched, ports))
        self._moved_ports.clear()
        return rows.table()

    def _addresses(
        self, ipcache: Iterable[tuple[Prefix, int]], settings: Settings, moved: Moved
    ) -> tuple[IpcacheRow, ...]:
        """Make the rows again that say something else, or whose matches may have moved."""
        known = dict(ipcache)
        world = Reserved.WORLD_IPV4 if settings.dual_stack else Reserved.WORLD
        known.setdefault(Prefix(bytes(4), 0), int(world))
        world = Reserved.WORLD_IPV6 if settings.dual_stack else Reserved.WORLD
        known.setdefault(Prefix(bytes(16), 0), int(world))
        before, rows = self._known, self._address_rows
        for prefix in before.keys() - known.keys():
            rows.drop(_prefix_key(prefix))
        for prefix in _touched(before, known, moved):
            number = known[prefix]
            matched = self._peers.matched_by_row(prefix, number)
            row = IpcacheRow(prefix.network, prefix.length, number, matched)
            rows.put(_prefix_key(prefix), row)
        self._known = known
        return rows.table()

    def _sights(self, sights: Iterable[tuple[int, bytes, tuple[str, ...]]]) -> tuple[SightRow, ...]:
        rows = (
            SightRow(endpoint, address, numbers)
            for endpoint, address, texts in sights
            if (numbers := self._peers.named(texts))
        )
        return tuple(sorted(rows, key=sight_key))

    def _forget_unused(self) -> None:
        """Free numbers that no entry uses any more, but for those in rows kept after an error."""
        kept = Uses()
        for subject in self._subjects.values():
            if subject.errors and subject.row is not None:
                kept.take_row(subject.row)
        unused = self._uses.unused(kept)
        self._tables.origins.release(unused.origins)
        self._tables.l7.release(unused.l7)
        self._peers.forget(unused.selectors)
        self._subject_selectors.forget(unused.subjects)
        for number in unused.subjects:
            del self._by_subject[number]


def _touched(
    before: Mapping[Prefix, int], known: Mapping[Prefix, int], moved: Moved
) -> Iterable[Prefix]:
    """Return the prefixes whose rows may differ from what they were."""
    found = {prefix for prefix, number in known.items() if before.get(prefix) != number}
    if moved.identities:
        found.update(prefix for prefix, number in known.items() if number in moved.identities)
    if moved.blocks:
        blocks: LongestPrefixMap[bool] = LongestPrefixMap()
        for block in moved.blocks:
            blocks.insert(block, True)
        found.update(prefix for prefix in known if any(blocks.covering(prefix)))
    return found


def _prefix_key(prefix: Prefix) -> PrefixKey:
    return len(prefix.network), prefix.network, prefix.length


def _is_host(labels: LabelSet) -> bool:
    return labels.get(RESERVED, Reserved.HOST.label) is not None


def _before_default_deny(entries: list[CompiledEntry]) -> list[CompiledEntry]:
    """Leave out the tiers behind those that isolate: their default deny decides before them.

    A NetworkPolicy decides finally for the pods it selects (network-policy-api,
    v1alpha2 ClusterNetworkPolicySpec.Tier; v1alpha1 says the same of Pass).
    """
    isolating = (compiled.entry.tier for compiled in entries if compiled.entry.default_deny)
    last = max(Tier.NORMAL, *isolating)
    return [compiled for compiled in entries if compiled.entry.tier <= last]


def _place_among_all(compiled: CompiledEntry) -> tuple[str, str, str, int]:
    return compiled.order


def _subject_peer(entry: PolicyEntry) -> Peer:
    return NodePeer(entry.subject) if entry.subject_is_node else LabelPeer(entry.subject)


def _port_order(row: NamedPortRow) -> tuple[str, int, int]:
    return row.name, row.protocol, row.port


def _error(number: int, direction: TrafficDirection, conflict: Conflict) -> ResolutionError:
    return ResolutionError(
        identity=number,
        direction=direction,
        message=conflict.message,
        first=conflict.first,
        second=conflict.second,
    )
