"""Which entries mean everything that another one means, found without asking each pair.

An entry covers another if it has the same subjects or more, peers and ports. Selectors are compared
by their requirements: one with fewer of them covers one with more. That misses some cases and never
claims a false one. Thousands of entries are compared with thousands, so those that could cover a
peer are found by what a peer must have: one requirement, or a prefix around its own.
"""

from collections.abc import Iterator

from conntrack.address import prefix_contains
from firewall.identities.ipcache import LongestPrefixMap
from firewall.identities.labels import CLUSTER, POD_NAMESPACE
from firewall.identities.selector import Requirement, Selector
from firewall.policy.model import CidrPeer, EntityPeer, LabelPeer, Peer, PolicyEntry, PortRange

_IMPLIED = (CLUSTER, POD_NAMESPACE)
_Row = list[tuple[int, PolicyEntry]]


class Covers:
    """Entries to find those that cover another one; the order of `add` is the order of answers."""

    def __init__(self) -> None:
        self._count = 0
        self._everyone: _Row = []
        self._any_labels: _Row = []
        self._by_requirement: dict[Requirement, _Row] = {}
        self._by_prefix: LongestPrefixMap[_Row] = LongestPrefixMap()
        self._by_peer: dict[Peer, _Row] = {}

    def add(self, entry: PolicyEntry) -> None:
        """Keep an entry under each of its peers."""
        item = self._count, entry
        self._count += 1
        if entry.peers is None or EntityPeer("all") in entry.peers:
            self._everyone.append(item)
            return
        for peer in entry.peers:
            self._row(peer).append(item)

    def _row(self, peer: Peer) -> _Row:
        match peer:
            case LabelPeer(selector) if not selector.requirements:
                return self._any_labels
            case LabelPeer(selector):
                # Every other selector has the two that are implied.
                rare = min(selector.requirements, key=lambda one: one.key.name in _IMPLIED)
                return self._by_requirement.setdefault(rare, [])
            case CidrPeer(prefix):
                row = self._by_prefix.get(prefix)
                if row is None:
                    row = []
                    self._by_prefix.insert(prefix, row)
                return row
            case _:
                return self._by_peer.setdefault(peer, [])

    def of(self, inner: PolicyEntry) -> Iterator[PolicyEntry]:
        """Yield the entries that cover this one."""
        found = list(self._everyone)
        if inner.peers:  # whoever covers all of them covers the first
            for row in self._rows(inner.peers[0]):
                found += row
        found.sort(key=lambda item: item[0])
        last = -1
        for place, entry in found:
            if place != last and _covers(entry, inner):
                yield entry
            last = place

    def _rows(self, peer: Peer) -> Iterator[_Row]:
        match peer:
            case LabelPeer(selector):
                yield self._any_labels
                for requirement in selector.requirements:
                    yield self._by_requirement.get(requirement, [])
            case CidrPeer(prefix):
                yield self._by_peer.get(EntityPeer("world"), [])
                for _, row in self._by_prefix.covering(prefix):
                    yield row
            case _:
                yield self._by_peer.get(peer, [])


def _covers(outer: PolicyEntry, inner: PolicyEntry) -> bool:
    return (
        selector_covers(outer.subject, inner.subject)
        and peers_cover(outer.peers, inner.peers)
        and _ports_cover(outer.ports, inner.ports)
    )


def selector_covers(outer: Selector, inner: Selector) -> bool:
    """Say whether a selector means every label set that another one means."""
    return set(outer.requirements) <= set(inner.requirements)


def peers_cover(outer: tuple[Peer, ...] | None, inner: tuple[Peer, ...] | None) -> bool:
    """Say whether peers (None: everybody) mean all whom others mean."""
    if outer is None or EntityPeer("all") in outer:
        return True
    if inner is None:
        return False
    return all(any(_peer_covers(one, peer) for one in outer) for peer in inner)


def _peer_covers(outer: Peer, inner: Peer) -> bool:
    match outer, inner:
        case LabelPeer(wide), LabelPeer(narrow):
            return selector_covers(wide, narrow)
        case EntityPeer("world"), CidrPeer(match_endpoints=False):
            return True
        case CidrPeer() as wide, CidrPeer() as narrow:
            return (
                (wide.match_endpoints or not narrow.match_endpoints)
                and prefix_contains(wide.prefix, narrow.prefix)
                and all(
                    any(prefix_contains(own, hole) for own in narrow.excepts)
                    or (
                        not prefix_contains(narrow.prefix, hole)
                        and not prefix_contains(hole, narrow.prefix)
                    )
                    for hole in wide.excepts
                )
            )
        case _:
            return outer == inner


def _ports_cover(outer: tuple[PortRange, ...] | None, inner: tuple[PortRange, ...] | None) -> bool:
    if outer is None:
        return True
    if inner is None:
        return False
    return all(any(_port_covers(one, port) for one in outer) for port in inner)


def _port_covers(outer: PortRange, inner: PortRange) -> bool:
    if outer == inner:
        return True
    if outer.protocol != inner.protocol or outer.name is not None:
        return False
    if inner.name is not None:
        return (outer.low, outer.high) == (0, 65535)
    return outer.low <= inner.low and inner.high <= outer.high
