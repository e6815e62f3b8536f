"""Which identities each peer of a policy means.

Rules do not hold peers: they hold the number of a selector, and every identity holds the numbers of
the selectors that it matches. A new identity therefore costs one row, whatever the number of rules
and endpoints, and a new rule costs nothing where its peers are already known. Number 0 stands for
everyone, unknown addresses included.

Three things can be matched: the labels of an identity (label, entity, node, FQDN, service), the
prefix that a CIDR identity stands for (its longest `cidr:` label), and the prefix of an ipcache
row. The last is needed twice: Kubernetes' ipBlock means pod addresses too, and the world identities
have no prefix of their own.

A new identity asks the index of selectors; new selectors make a small index of their own, which is
asked once by each identity that they may match (`firewall.policy.selector_index`).

Source: Cilium pkg/policy/selectorcache.go (the idea).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, assert_never

from conntrack.address import Prefix
from firewall.identities.labels import ANY, K8S, POD_NAMESPACE, LabelSet
from firewall.identities.reserved import is_world
from firewall.identities.selector import Key, Selector
from firewall.policy.model import (
    CidrGroupPeer,
    CidrPeer,
    EntityPeer,
    FqdnPeer,
    LabelPeer,
    NodePeer,
    Peer,
    ServicePeer,
)
from firewall.policy.objects import BackendsObject, CidrGroupObject, Resource, ServiceObject
from firewall.policy.selector_index import (
    WIDTH_OF_FAMILY,
    Block,
    IdentityIndex,
    Known,
    SelectorIndex,
    Target,
    known,
)
from firewall.policy.snapshot import ANY_SELECTOR


class Moved(NamedTuple):
    """What may match other selectors than before.

    Attributes:
        identities: those with other labels or other matches, and those that are gone.
        blocks: prefixes inside which `matched_by_row` may answer otherwise for any identity.
    """

    identities: set[int]
    blocks: set[Prefix]


_EVERYWHERE = frozenset({Prefix(bytes(4), 0), Prefix(bytes(16), 0)})


class SelectorCache:
    """Numbers for peers, and for each identity the numbers it matches.

    Args:
        cluster: the own cluster's name, for the entity `cluster`.
        cidr_matches_nodes: whether CIDR peers mean host addresses too (Cilium's
            `policy-cidr-match-mode: nodes`); endpoints are never meant.
        names_by_identity: whether FQDN peers are matched by the `fqdn:` labels of identities; else
            they match none, and who sees which is said elsewhere (`snapshot.SightRow`).
    """

    def __init__(
        self,
        *,
        cluster: str = "default",
        cidr_matches_nodes: bool = False,
        names_by_identity: bool = True,
    ) -> None:
        self._cluster = cluster
        self._names_by_identity = names_by_identity
        self._cidr_matches_nodes = cidr_matches_nodes
        self._numbers: dict[Peer, int] = {}
        self._peers: dict[int, Peer] = {}
        self._targets: dict[int, Target] = {}
        self._index = SelectorIndex()
        self._last = ANY_SELECTOR
        self._identities: dict[int, Known] = {}
        self._carriers = IdentityIndex()
        self._matches: dict[int, frozenset[int]] = {}
        self._resources: tuple[Resource, ...] = ()
        self._wanted: set[Prefix] | None = None
        self._moved_identities: set[int] = set()
        self._moved_blocks: set[Prefix] = set()

    def number(self, peer: Peer) -> int:
        """Return the number of a peer, giving it one if it is new."""
        if isinstance(peer, EntityPeer) and peer.entity == "all":
            return ANY_SELECTOR
        number = self._numbers.get(peer)
        if number is None:
            self.add((peer,))
            number = self._numbers[peer]
        return number

    def add(self, peers: Iterable[Peer]) -> None:
        """Give numbers to many peers at once, asking each identity only once."""
        fresh = SelectorIndex()
        named: dict[int, Peer] = {}
        for peer in peers:
            if peer in self._numbers or (isinstance(peer, EntityPeer) and peer.entity == "all"):
                continue
            self._last += 1
            self._numbers[peer] = self._last
            named[self._last] = peer
            target = self._target(peer)
            self._targets[self._last] = target
            self._disturb(target)
            self._index.add(self._last, target)
            fresh.add(self._last, target)
        if not named:
            return
        self._peers = self._peers | named
        asked = self._carriers.candidates(self._targets[number] for number in named)
        for number in self._identities if asked is None else asked:
            gained = fresh.matches(self._identities[number], self._cluster)
            if gained:
                self._matches[number] |= gained
                self._moved_identities.add(number)

    def _disturb(self, target: Target) -> None:
        """Note that a target comes or goes that may mean addresses."""
        if target.entity in WIDTH_OF_FAMILY:
            self._moved_blocks |= _EVERYWHERE
        if target.blocks:
            self._moved_blocks.update(block.prefix for block in target.blocks)
            self._wanted = None

    def forget(self, numbers: set[int]) -> None:
        """Forget selectors; their numbers are never given out again."""
        gone = numbers & self._targets.keys()
        if not gone:
            return
        self._peers = self._peers.copy()
        for number in gone:
            del self._numbers[self._peers.pop(number)]
            target = self._targets.pop(number)
            self._disturb(target)
            self._index.remove(number, target)
        for number, matched in self._matches.items():
            if not matched.isdisjoint(gone):
                self._matches[number] = matched.difference(gone)
                self._moved_identities.add(number)

    def set_resources(self, resources: Iterable[Resource]) -> None:
        """Replace the CIDR groups, services and backends; selectors that name one follow."""
        resources = tuple(resources)
        if resources == self._resources:
            return
        self._resources = resources
        changed = False
        for peer, number in self._numbers.items():
            if isinstance(peer, CidrGroupPeer | ServicePeer):
                target = self._target(peer)
                changed |= target != self._targets[number]
                self._targets[number] = target
        if changed:
            self._rebuild()

    def _rebuild(self) -> None:
        self._index = SelectorIndex()
        for number, target in self._targets.items():
            self._index.add(number, target)
        self._moved_blocks |= _EVERYWHERE
        self._wanted = None
        for number, identity in self._identities.items():
            matched = frozenset(self._index.matches(identity, self._cluster))
            if matched != self._matches[number]:
                self._matches[number] = matched
                self._moved_identities.add(number)

    def upsert_identity(self, number: int, labels: LabelSet) -> None:
        """Add an identity, or replace the labels of one (reserved numbers may gain labels)."""
        old = self._identities.get(number)
        if old is not None and old.labels == labels:
            return
        identity = known(number, labels)
        if old is not None:
            self._carriers.remove(old)
        self._carriers.add(identity)
        self._identities[number] = identity
        self._matches[number] = frozenset(self._index.matches(identity, self._cluster))
        self._moved_identities.add(number)

    def remove_identity(self, number: int) -> None:
        """Forget an identity; unknown numbers are ignored."""
        identity = self._identities.pop(number, None)
        if identity is not None:
            self._carriers.remove(identity)
            self._moved_identities.add(number)
        self._matches.pop(number, None)

    def labels(self, number: int) -> LabelSet | None:
        """Return the labels of an identity, None if it is unknown."""
        identity = self._identities.get(number)
        return None if identity is None else identity.labels

    def identities(self) -> Iterator[int]:
        """Yield the known identity numbers in order."""
        return iter(sorted(self._identities))

    def matched(self, number: int) -> frozenset[int]:
        """Return the selectors that an identity matches; none if it is unknown."""
        return self._matches.get(number, frozenset())

    @property
    def moved(self) -> Moved:
        """What may match otherwise than at the last `settle`."""
        return Moved(self._moved_identities, self._moved_blocks)

    def settle(self) -> None:
        """Count what moved as followed."""
        self._moved_identities, self._moved_blocks = set(), set()

    def matched_by_row(self, prefix: Prefix, number: int) -> tuple[int, ...]:
        """Return the selectors, ascending, that an ipcache row matches beyond its identity."""
        identity = self._identities.get(number)
        outside = is_world(number) or (identity is not None and identity.is_world)
        by_address = outside or (
            self._cidr_matches_nodes and identity is not None and identity.is_node
        )
        found = {
            selector
            for selector, everywhere in self._index.blocks(prefix)
            if everywhere or by_address
        }
        if outside:
            found.update(self._index.families(len(prefix.network)))
        return tuple(sorted(found - self.matched(number)))

    def prefixes(self) -> set[Prefix]:
        """Return every prefix, excepts included, that must have an ipcache row of its own.

        Prefixes of length 0 are the world itself and need no identity. The same set object comes
        again as long as no prefix came or went; it must not be changed.
        """
        if self._wanted is None:
            self._wanted = {
                prefix
                for target in self._targets.values()
                for block in target.blocks
                for prefix in (block.prefix, *block.excepts)
                if prefix.length
            }
        return self._wanted

    def texts(self) -> set[str]:
        """Return the FQDN selector texts in use."""
        return {text for peer in self._numbers for text in _texts(peer)}

    def named(self, texts: Iterable[str]) -> tuple[int, ...]:
        """Return the numbers of the FQDN peers with these texts, ascending."""
        peers = (peer for text in texts for peer in (FqdnPeer(text, None), FqdnPeer(None, text)))
        return tuple(sorted(self._numbers[peer] for peer in peers if peer in self._numbers))

    def peers(self) -> Mapping[int, Peer]:
        """Return what every number in use means."""
        return self._peers

    def _target(self, peer: Peer) -> Target:
        match peer:
            case LabelPeer(selector):
                return Target(labels=(selector,))
            case NodePeer(selector):
                return Target(nodes=(_of_nodes(selector),))
            case EntityPeer(entity):
                return Target(entity=entity)
            case CidrPeer(prefix, excepts, match_endpoints):
                return Target(blocks=(Block(prefix, excepts),), everywhere=match_endpoints)
            case FqdnPeer():
                return Target(texts=_texts(peer)) if self._names_by_identity else Target()
            case CidrGroupPeer():
                return Target(blocks=tuple(self._group_blocks(peer)))
            case ServicePeer():
                return self._service_target(peer)
            case _:
                assert_never(peer)

    def _group_blocks(self, peer: CidrGroupPeer) -> Iterator[Block]:
        for group in self._resources:
            if isinstance(group, CidrGroupObject) and (
                peer.name == group.name if peer.name else _matches(peer.selector, group.labels)
            ):
                for prefix in group.prefixes:
                    yield Block(prefix, peer.excepts)

    def _service_target(self, peer: ServicePeer) -> Target:
        selectors: list[Selector] = []
        blocks: list[Block] = []
        for service in self._resources:
            if (
                not isinstance(service, ServiceObject)
                or peer.namespace not in ("", service.namespace)
                or (
                    peer.name != service.name
                    if peer.name
                    else not _matches(peer.selector, service.labels)
                )
            ):
                continue
            if service.selector is not None:
                selectors.append(_pods_of(service.selector, service.namespace))
            else:
                blocks += self._backends(service)
        return Target(labels=tuple(selectors), blocks=tuple(blocks))

    def _backends(self, service: ServiceObject) -> Iterator[Block]:
        for one in self._resources:
            if (
                isinstance(one, BackendsObject)
                and one.namespace == service.namespace
                and one.service == service.name
            ):
                for address in one.addresses:
                    yield Block(Prefix(address, 8 * len(address)))


def _texts(peer: Peer) -> tuple[str, ...]:
    """Return what the `fqdn:` labels of a peer say."""
    if not isinstance(peer, FqdnPeer):
        return ()
    return tuple(text for text in (peer.match_name, peer.match_pattern) if text)


def _of_nodes(selector: Selector) -> Selector:
    """Let Kubernetes keys mean a node's labels, whose source is `node` on other nodes."""
    return Selector(
        tuple(
            requirement._replace(key=Key(ANY, requirement.key.name))
            if requirement.key.source == K8S
            else requirement
            for requirement in selector.requirements
        )
    )


def _pods_of(pairs: tuple[tuple[str, str], ...], namespace: str) -> Selector:
    selector = Selector().with_label(K8S, POD_NAMESPACE, namespace)
    for key, value in pairs:
        selector = selector.with_label(K8S, key, value)
    return selector


def _matches(selector: Selector | None, labels: LabelSet) -> bool:
    return selector is not None and selector.matches(labels)


def describe(peer: Peer) -> str:
    """Say in one line whom a peer means, in the words of the policy."""
    match peer:
        case LabelPeer(selector):
            return f"endpoints with {selector.describe()}"
        case NodePeer(selector):
            return f"nodes with {selector.describe()}"
        case EntityPeer(entity):
            return f"entity {entity}"
        case CidrPeer(prefix, excepts, _):
            holes = f" except {', '.join(map(str, excepts))}" if excepts else ""
            return f"{prefix}{holes}"
        case FqdnPeer(match_name, match_pattern):
            return f"name {match_name or match_pattern}"
        case CidrGroupPeer(name, selector, _):
            return f"CIDR group {name or (selector.describe() if selector else '')}"
        case ServicePeer(name, namespace, selector):
            chosen = name or (selector.describe() if selector else "")
            return f"service {namespace}/{chosen}" if namespace else f"service {chosen}"
        case _:
            assert_never(peer)
