"""Does a new snapshot take a permission away?

Established flows bypass userspace as long as the generation stands (ARCHITECTURE, bypass). So it
must rise whenever something that was allowed may now be refused, and should not rise for anything
else, because every live flow then comes back once to be decided anew. In doubt it rises; what must
never raise it is the everyday growth: one more allow for an isolated subject, one more identity.

The comparison is between two snapshots, by content where rows are not the same objects, so it needs
no knowledge of what led from one to the other.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

from conntrack.address import Prefix, format_address, mask
from firewall.identities.reserved import world_for
from firewall.policy.difference import PrefixKey, identity_key, moved, prefix_key, sight_key
from firewall.policy.model import Action
from firewall.policy.snapshot import (
    DirectionRow,
    EndpointRow,
    EntryRow,
    IdentityRow,
    IpcacheRow,
    L7Row,
    NamedPortRow,
    PolicyRow,
    Snapshot,
)

_ALLOW = int(Action.ALLOW)  # a member of an enum costs 50 ns, and rows are many
_DENY = int(Action.DENY)
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


class _Used:
    """What the rules of a snapshot refer to, found out when it is asked for."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._directions = [
            direction for row in snapshot.policies for direction in (row.ingress, row.egress)
        ]

    @cached_property
    def allowing(self) -> frozenset[int]:
        """Selectors whose loss may lose a peer a permission."""
        return frozenset(
            row.selector for one in self._directions for row in one.entries if row.action != _DENY
        )

    @cached_property
    def denying(self) -> frozenset[int]:
        """Selectors whose gain may lose a peer a permission."""
        return frozenset(
            row.selector
            for one in self._directions
            for row in one.entries
            if row.action != _ALLOW or row.authentication in _DEMANDS_AUTHENTICATION
        )

    @cached_property
    def named(self) -> bool:
        """Whether a rule names a port."""
        return any(row.port_name for one in self._directions for row in one.entries)

    @cached_property
    def names_denied(self) -> bool:
        """Whether a rule that does not simply allow names a port."""
        return any(
            row.port_name
            and (row.action != _ALLOW or row.authentication in _DEMANDS_AUTHENTICATION)
            for one in self._directions
            for row in one.entries
        )


def permission_lost(old: Snapshot, new: Snapshot) -> str | None:
    """Say what a flow allowed by `old` may be refused for by `new`; None = nothing."""
    used = _Used(new)
    return (
        _settings(old, new)
        or _policies(old, new)
        or _endpoints(old, new)
        or _identities(old, new, used)
        or _addresses(old, new, used)
        or _sights(old, new)
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


def _sights(old: Snapshot, new: Snapshot) -> str | None:
    for (endpoint, address), (before, after) in moved(old.sights, new.sights, sight_key).items():
        left = after.selectors if after is not None else ()
        if before is not None and not set(before.selectors) <= set(left):
            return f"endpoint {endpoint} knows {format_address(address)} by fewer names"
    return None


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
    gone = set()
    for number, (before, after) in moved(old.identities, new.identities, identity_key).items():
        if before is None:
            continue
        if after is None:
            gone.add(number)
        elif _moved(frozenset(before.selectors), frozenset(after.selectors), used):
            return f"identity {number} matches other selectors"
        elif before.named_ports != after.named_ports and used.named:
            return f"identity {number} has other named ports"
    still = gone & {row.identity for row in new.ipcache} if gone else gone
    return f"identity {min(still)} has no labels any more" if still else None


def _moved(before: frozenset[int], after: frozenset[int], used: _Used) -> bool:
    """Whether a peer lost a selector that allows, or gained one that denies."""
    lost, gained = before - after, after - before
    return bool((lost and lost & used.allowing) or (gained and gained & used.denying))


class _Owner(NamedTuple):
    """What is known of an address as a peer: selectors that it matches, and its named ports."""

    selectors: frozenset[int]
    ports: frozenset[NamedPortRow]


class _Addresses:
    """The ipcache of one snapshot, to ask what the addresses of a prefix match."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    @cached_property
    def _rows(self) -> dict[PrefixKey, IpcacheRow]:
        return {prefix_key(row): row for row in self._snapshot.ipcache}

    @cached_property
    def _lengths(self) -> list[int]:
        return sorted({row.length for row in self._snapshot.ipcache}, reverse=True)

    @cached_property
    def _identities(self) -> dict[int, IdentityRow]:
        return {row.number: row for row in self._snapshot.identities}

    def owner(self, prefix: Prefix, row: IpcacheRow | None) -> _Owner:
        """Return what an address matches of which no longer prefix says more.

        Args:
            prefix: holds the address.
            row: the prefix's own row, None = it has none and a wider one counts.
        """
        if row is None:
            row = self._wider(prefix)
        if row is None:
            dual_stack = self._snapshot.settings.dual_stack
            number = int(world_for(prefix.network, dual_stack=dual_stack))
        else:
            number = row.identity
        identity = self._identities.get(number)
        own = row.selectors if row is not None else ()
        if identity is None:
            return _Owner(frozenset(own), frozenset())
        return _Owner(frozenset(identity.selectors).union(own), frozenset(identity.named_ports))

    def _wider(self, prefix: Prefix) -> IpcacheRow | None:
        size_bytes = len(prefix.network)
        for length in self._lengths:
            if length <= prefix.length:
                row = self._rows.get((size_bytes, mask(prefix.network, length), length))
                if row is not None:
                    return row
        return None


def _addresses(old: Snapshot, new: Snapshot, used: _Used) -> str | None:
    before, after = _Addresses(old), _Addresses(new)
    for key, (was, now) in moved(old.ipcache, new.ipcache, prefix_key).items():
        prefix = Prefix(*key[1:])
        had, has = before.owner(prefix, was), after.owner(prefix, now)
        if _moved(had.selectors, has.selectors, used):
            return f"{prefix} matches other selectors"
        lost, gained = had.ports - has.ports, has.ports - had.ports
        if (lost and used.named) or (gained and used.names_denied):
            return f"{prefix} has other named ports"
    return None
