"""Does a new snapshot take a permission away?

Established flows bypass userspace as long as the generation stands (ARCHITECTURE, bypass). So it
must rise whenever something that was allowed may now be refused, and should not rise for anything
else, because every live flow then comes back once to be decided anew. In doubt it rises; what must
never raise it is the everyday growth: one more allow for an isolated subject, one more identity.

The comparison is between two snapshots, by content where rows are not the same objects, so it needs
no knowledge of what led from one to the other.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from conntrack.address import Prefix, format_address, mask
from firewall.identities.reserved import world_for
from firewall.policy.model import Action
from firewall.policy.snapshot import (
    DirectionRow,
    EndpointRow,
    EntryRow,
    IpcacheRow,
    L7Row,
    PolicyRow,
    Snapshot,
)

_DEMANDS_AUTHENTICATION = frozenset({"required", "test-always-fail"})


class _Rule(NamedTuple):
    """An entry without what changes no verdict: where it was written and what it logs."""

    action: int
    tier: int
    priority: float
    selector: int
    protocol: int
    port_low: int
    port_high: int
    port_name: str
    l7: L7Row | None
    authentication: str
    observe: bool


class _Used(NamedTuple):
    """Selectors by what their gain or loss means for a peer."""

    allowing: frozenset[int]
    denying: frozenset[int]
    named: bool


def permission_lost(old: Snapshot, new: Snapshot) -> str | None:
    """Say what a flow allowed by `old` may be refused for by `new`; None = nothing."""
    used = _used(new)
    return (
        _settings(old, new)
        or _policies(old, new)
        or _endpoints(old, new)
        or _identities(old, new, used)
        or _addresses(old, new, used)
    )


def _settings(old: Snapshot, new: Snapshot) -> str | None:
    before, after = old.settings, new.settings
    if before.enforcement != after.enforcement:
        return f"enforcement is {after.enforcement}"
    if before.allow_localhost == "always" and after.allow_localhost != "always":
        return "the local host is subject to policy"
    if before.policy_audit_mode and not after.policy_audit_mode:
        return "audit mode ended"
    if before.allow_icmp_frag_needed and not after.allow_icmp_frag_needed:
        return "fragmentation-needed messages are subject to policy"
    if set(before.local_addresses) - set(after.local_addresses):
        return "an address of the host is gone"
    if before.dual_stack != after.dual_stack:
        return "the world has other identities"
    return None


def _used(snapshot: Snapshot) -> _Used:
    allowing: set[int] = set()
    denying: set[int] = set()
    named = False
    for policy in snapshot.policies:
        for row in (*policy.ingress.entries, *policy.egress.entries):
            named = named or bool(row.port_name)
            if row.action != Action.DENY:
                allowing.add(row.selector)
            if row.action != Action.ALLOW or row.authentication in _DEMANDS_AUTHENTICATION:
                denying.add(row.selector)
    return _Used(frozenset(allowing), frozenset(denying), named)


def _policies(old: Snapshot, new: Snapshot) -> str | None:
    before = {row.identity: row for row in old.policies}
    for row in new.policies:
        earlier = before.get(row.identity)
        if earlier is not None and earlier is not row:
            lost = _policy(old, earlier, new, row)
            if lost:
                return f"identity {row.identity}: {lost}"
    return None


def _policy(old: Snapshot, before: PolicyRow, new: Snapshot, after: PolicyRow) -> str | None:
    return _direction(old, before.ingress, new, after.ingress) or _direction(
        old, before.egress, new, after.egress
    )


def _direction(
    old: Snapshot, before: DirectionRow, new: Snapshot, after: DirectionRow
) -> str | None:
    if before is after or not after.enforced:
        return None
    if after.default_deny and not (before.enforced and before.default_deny):
        return "isolated"
    earlier = _rules(old, before.entries) if before.enforced else set()
    later = _rules(new, after.entries)
    if any(rule.action != Action.DENY for rule in earlier - later):
        return "an allow is gone"
    for rule in later - earlier:
        if rule.action != Action.ALLOW:
            return "a deny is new"
        if rule.authentication in _DEMANDS_AUTHENTICATION:
            return "authentication is demanded"
        if rule.l7 is not None and not rule.observe and _hides(rule, earlier, after):
            return "an allow is narrowed by L7 rules"
    return None


def _hides(rule: _Rule, earlier: set[_Rule], after: DirectionRow) -> bool:
    """Whether an allow with L7 rules decides where something of lower precedence allowed more."""
    if not after.default_deny:
        return True
    level = rule.tier, rule.priority
    return any(
        other.action == Action.ALLOW and (other.tier, other.priority) > level for other in earlier
    )


def _rules(snapshot: Snapshot, rows: Iterable[EntryRow]) -> set[_Rule]:
    return {
        _Rule(
            row.action,
            row.tier,
            row.priority,
            row.selector,
            row.protocol,
            row.port_low,
            row.port_high,
            row.port_name,
            snapshot.l7[row.l7] if row.l7 >= 0 else None,
            row.authentication,
            row.observe,
        )
        for row in rows
    }


def _endpoints(old: Snapshot, new: Snapshot) -> str | None:
    owners = {address: row for row in old.endpoints for address in row.addresses}
    policies_before = {row.identity: row for row in old.policies}
    policies_after = {row.identity: row for row in new.policies}
    for row in new.endpoints:
        after = policies_after.get(row.identity)
        for address in row.addresses:
            owner = owners.get(address)
            if owner is row:
                continue
            before = policies_before.get(owner.identity) if owner else None
            lost = _endpoint(old, owner, before, new, row, after)
            if lost:
                return f"endpoint {row.name} ({format_address(address)}): {lost}"
    return None


def _endpoint(  # noqa: PLR0917  # three things, before and after
    old: Snapshot,
    owner: EndpointRow | None,
    before: PolicyRow | None,
    new: Snapshot,
    row: EndpointRow,
    after: PolicyRow | None,
) -> str | None:
    if owner is None:
        # Nobody decided for this address before, and flows with it may live already.
        isolated = after is None or after.ingress.enforced or after.egress.enforced
        return "newly managed and isolated" if isolated else None
    if owner.audit and not row.audit:
        return "audit mode ended"
    named = after is not None and any(entry.port_name for entry in after.ingress.entries)
    if named and owner.named_ports != row.named_ports:
        return "a named port is another one"
    if owner.identity == row.identity:
        return None
    if before is None:
        return None
    return "no policy yet" if after is None else _policy(old, before, new, after)


def _identities(old: Snapshot, new: Snapshot, used: _Used) -> str | None:
    before = {row.number: row for row in old.identities}
    for row in new.identities:
        earlier = before.get(row.number)
        if earlier is None or earlier is row:
            continue
        if _moved(frozenset(earlier.selectors), frozenset(row.selectors), used):
            return f"identity {row.number} matches other selectors"
        if used.named and earlier.named_ports != row.named_ports:
            return f"identity {row.number} has other named ports"
    gone = before.keys() - {row.number for row in new.identities}
    still = gone & {row.identity for row in new.ipcache}
    return f"identity {min(still)} has no labels any more" if still else None


def _moved(before: frozenset[int], after: frozenset[int], used: _Used) -> bool:
    """Whether a peer lost a selector that allows, or gained one that denies."""
    return bool((before - after) & used.allowing or (after - before) & used.denying)


_Key = tuple[bytes, int]


class _Addresses:
    """The ipcache of one snapshot, to ask which row holds a prefix."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.rows: dict[_Key, IpcacheRow] = {
            (row.network, row.length): row for row in snapshot.ipcache
        }
        self._lengths = sorted({row.length for row in snapshot.ipcache}, reverse=True)
        self._selectors = {row.number: frozenset(row.selectors) for row in snapshot.identities}
        self._dual_stack = snapshot.settings.dual_stack

    def selectors(self, prefix: Prefix) -> frozenset[int]:
        """Return what an address of the prefix matches, as far as rows this wide or wider say."""
        for length in self._lengths:
            if length <= prefix.length:
                row = self.rows.get((mask(prefix.network, length), length))
                if row is not None:
                    return self._selectors.get(row.identity, frozenset()).union(row.selectors)
        number = int(world_for(prefix.network, dual_stack=self._dual_stack))
        return self._selectors.get(number, frozenset())


def _addresses(old: Snapshot, new: Snapshot, used: _Used) -> str | None:
    if old.ipcache is new.ipcache:
        return None
    before, after = _Addresses(old), _Addresses(new)
    for key in _changed(before.rows, after.rows):
        prefix = Prefix(*key)
        if _moved(before.selectors(prefix), after.selectors(prefix), used):
            return f"{prefix} matches other selectors"
    return None


def _changed(before: Mapping[_Key, IpcacheRow], after: Mapping[_Key, IpcacheRow]) -> Iterable[_Key]:
    for key, row in after.items():
        earlier = before.get(key)
        if earlier is not row and earlier != row:
            yield key
    yield from before.keys() - after.keys()
