"""Which identities each peer of a policy means.

Rules do not hold peers: they hold the number of a selector, and every identity holds the numbers of
the selectors that it matches. A new identity therefore costs one row, whatever the number of rules
and endpoints, and a new rule costs nothing where its peers are already known. Number 0 stands for
everyone, unknown addresses included.

Three things can be matched: the labels of an identity (label, entity, node, FQDN, service), the
prefix that a CIDR identity stands for (its longest `cidr:` label), and the prefix of an ipcache
row. The last is needed twice: Kubernetes' ipBlock means pod addresses too, and the world identities
have no prefix of their own.

Matching is indexed in the direction identity -> selectors: by the label values that a selector
demands together, else by a key, and by covering prefix. Adding many selectors at once builds a
small index of the new ones and asks it once per identity, so that neither direction multiplies
identities by selectors.

Sources: Cilium pkg/policy/selectorcache.go (the idea), pkg/policy/api/{entity,cidr,fqdn}.go.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import NamedTuple, assert_never

from conntrack.address import Prefix, parse_prefix, prefix_contains
from firewall.identities.ipcache import LongestPrefixMap
from firewall.identities.labels import ANY, CLUSTER, K8S, POD_NAMESPACE, RESERVED, LabelSet
from firewall.identities.reserved import CLUSTER_MIN, LOCAL_MIN, is_world
from firewall.identities.selector import Key, Operator, Selector
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
from firewall.policy.snapshot import ANY_SELECTOR

CIDR_SOURCE = "cidr"
FQDN_SOURCE = "fqdn"

_CLUSTER_ENTITIES = frozenset(
    {"host", "remote-node", "init", "ingress", "health", "unmanaged", "kube-apiserver"}
)
"""Reserved labels inside the entity `cluster` (Cilium pkg/policy/api/entity.go)."""

_WORLD_ENTITIES = frozenset({"world", "world-ipv4", "world-ipv6"})

_WIDTH_OF_FAMILY = {"world-ipv4": 4, "world-ipv6": 16}
"""Bytes of an address for the entities that name one family."""


class Block(NamedTuple):
    """Addresses inside `prefix` and outside every `excepts`."""

    prefix: Prefix
    excepts: tuple[Prefix, ...] = ()

    def holds(self, inner: Prefix) -> bool:
        """Say whether the whole of `inner` is meant."""
        return prefix_contains(self.prefix, inner) and not any(
            prefix_contains(hole, inner) for hole in self.excepts
        )


class Known(NamedTuple):
    """What matching needs to know of one identity; `prefix` only for CIDR identities."""

    number: int
    labels: LabelSet
    prefix: Prefix | None
    reserved: frozenset[str]

    @property
    def is_node(self) -> bool:
        """Whether the identity is a host, this one or another."""
        return bool(self.reserved & {"host", "remote-node"})

    @property
    def is_world(self) -> bool:
        """Whether the identity lies outside: world, CIDR and FQDN identities."""
        return bool(self.reserved & _WORLD_ENTITIES)


def known(number: int, labels: LabelSet) -> Known:
    """Read the parts of a label set that peers ask about.

    A CIDR identity may carry a label for every prefix around its own (Cilium keeps the parents);
    the longest one is what it stands for.
    """
    prefixes = [
        _label_prefix(label.key) for label in labels if label.source == CIDR_SOURCE and label.key
    ]
    longest = max(prefixes, key=lambda prefix: prefix.length) if prefixes else None
    reserved = frozenset(label.key for label in labels if label.source == RESERVED)
    return Known(number, labels, longest, reserved)


def _label_prefix(key: str) -> Prefix:
    # Cilium writes "-" for ":" in the labels of IPv6 prefixes, which selectors could not hold.
    return parse_prefix(key.replace("-", ":"))


class Target(NamedTuple):
    """What a selector means after groups and services are looked up: any of these.

    `entity` "" = none. `texts` are FQDN selector texts. `everywhere`: blocks match every address
    that lies in them, endpoints too.
    """

    labels: tuple[Selector, ...] = ()
    blocks: tuple[Block, ...] = ()
    entity: str = ""
    texts: tuple[str, ...] = ()
    nodes: tuple[Selector, ...] = ()
    everywhere: bool = False


_Row = list[tuple[int, Selector]]

_Shape = tuple[str, ...]
"""Keys of which a selector demands values, ascending, whatever their source."""

_Values = tuple[str, ...]

_PLACES = 64
"""Combinations of values under which one selector is kept at most; further keys are left out."""


def _demands(selector: Selector) -> tuple[_Shape, Iterable[_Values]]:
    """Return keys and the combinations of their values, one of which every match has."""
    wanted: dict[str, tuple[str, ...]] = {}
    for key, operator, values in selector.requirements:
        if operator is Operator.IN:
            earlier = wanted.get(key.name)
            if earlier is None or len(values) < len(earlier):
                wanted[key.name] = values
    chosen: list[str] = []
    places = 1
    for name in sorted(wanted, key=lambda name: (len(wanted[name]), name)):
        places *= len(wanted[name])
        if chosen and places > _PLACES:
            break
        chosen.append(name)
    shape = tuple(sorted(chosen))
    return shape, product(*(wanted[name] for name in shape))


def _needed_key(selector: Selector) -> str:
    """Return a key that every match has, "" if none is demanded."""
    for requirement in selector.requirements:
        if requirement.operator is Operator.EXISTS:
            return requirement.key.name
    return ""


def _left(row: _Row, number: int) -> _Row:
    return [kept for kept in row if kept[0] != number]


class _Index:
    """Selectors arranged so that one identity or prefix finds those that may match it."""

    def __init__(self) -> None:
        self._by_values: dict[str, dict[_Shape, dict[_Values, _Row]]] = {}
        self._by_key: dict[str, _Row] = {}
        self._any_labels: _Row = []
        self._nodes: list[tuple[int, Selector]] = []
        self._entities: list[tuple[int, str]] = []
        self._texts: dict[str, list[int]] = {}
        self._blocks: LongestPrefixMap[list[tuple[int, Block, bool]]] = LongestPrefixMap()

    def add(self, number: int, target: Target) -> None:
        for selector in target.labels:
            self._place(number, selector)
        for selector in target.nodes:
            self._nodes.append((number, selector))
        if target.entity:
            self._entities.append((number, target.entity))
        for text in target.texts:
            self._texts.setdefault(text, []).append(number)
        for block in target.blocks:
            row = self._blocks.get(block.prefix)
            if row is None:
                row = []
                self._blocks.insert(block.prefix, row)
            row.append((number, block, target.everywhere))

    def _place(self, number: int, selector: Selector) -> None:
        """Keep a selector under what it demands of every match."""
        shape, demanded = _demands(selector)
        if shape:
            table = self._by_values.setdefault(shape[0], {}).setdefault(shape, {})
            for values in demanded:
                table.setdefault(values, []).append((number, selector))
        elif key := _needed_key(selector):
            self._by_key.setdefault(key, []).append((number, selector))
        else:
            self._any_labels.append((number, selector))

    def _displace(self, number: int, selector: Selector) -> None:
        shape, demanded = _demands(selector)
        if shape:
            shapes = self._by_values[shape[0]]
            table = shapes[shape]
            for values in demanded:
                table[values] = _left(table[values], number)
                if not table[values]:
                    del table[values]
            if not table:
                del shapes[shape]
        elif key := _needed_key(selector):
            self._by_key[key] = _left(self._by_key[key], number)
        else:
            self._any_labels = _left(self._any_labels, number)

    def remove(self, number: int, target: Target) -> None:
        for selector in target.labels:
            self._displace(number, selector)
        self._nodes = [kept for kept in self._nodes if kept[0] != number]
        self._entities = [kept for kept in self._entities if kept[0] != number]
        for text in target.texts:
            self._texts[text].remove(number)
        for block in target.blocks:
            row_of_block = self._blocks.get(block.prefix)
            if row_of_block is not None:
                row_of_block[:] = [kept for kept in row_of_block if kept[0] != number]
                if not row_of_block:
                    self._blocks.remove(block.prefix)

    def matches(self, identity: Known, cluster: str) -> set[int]:
        """Return the numbers of the selectors that this identity matches by itself."""
        found: set[int] = set()
        labels = identity.labels
        candidates = [self._any_labels]
        for label in labels:
            candidates.append(self._by_key.get(label.key, []))
            candidates += self._demanding(label.key, labels)
            if label.source == FQDN_SOURCE:
                found.update(self._texts.get(label.key, ()))
        for row in candidates:
            found.update(number for number, selector in row if selector.matches(labels))
        if identity.is_node:
            found.update(number for number, sel in self._nodes if sel.matches(labels))
        for number, entity in self._entities:
            if is_entity(entity, identity, cluster):
                found.add(number)
        if identity.prefix is not None:
            found.update(number for number, _ in self.blocks(identity.prefix))
        return found

    def _demanding(self, first: str, labels: LabelSet) -> Iterator[_Row]:
        """Yield the rows whose shape begins with a key and whose values are those of the labels."""
        for shape, table in self._by_values.get(first, {}).items():
            had = [[label.value for label in labels.named(key)] for key in shape]
            for values in product(*had):
                row = table.get(values)
                if row is not None:
                    yield row

    def blocks(self, prefix: Prefix) -> Iterator[tuple[int, bool]]:
        """Yield number and `everywhere` of the selectors whose blocks hold the prefix."""
        for _, row in self._blocks.covering(prefix):
            for number, block, everywhere in row:
                if block.holds(prefix):
                    yield number, everywhere

    def families(self, width: int) -> Iterator[int]:
        """Yield the selectors that mean the world of one address family."""
        for number, entity in self._entities:
            if _WIDTH_OF_FAMILY.get(entity) == width:
                yield number


def is_entity(entity: str, identity: Known, cluster: str) -> bool:
    """Say whether an identity belongs to one of Cilium's entities.

    An endpoint without a cluster label counts as one of the own cluster: on plain Linux nobody
    need write that label.
    """
    reserved = identity.reserved
    if entity == "all":
        return True
    if entity == "world":
        return identity.is_world
    if entity in _WIDTH_OF_FAMILY and "world" in reserved and identity.prefix is not None:
        return len(identity.prefix.network) == _WIDTH_OF_FAMILY[entity]
    if entity not in ("cluster", "cluster-mesh"):
        return entity in reserved
    if reserved & _CLUSTER_ENTITIES:
        return True
    name = identity.labels.get(K8S, CLUSTER)
    if name is None:
        return CLUSTER_MIN <= identity.number < LOCAL_MIN and not reserved
    return entity == "cluster-mesh" or name == cluster


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
    """

    def __init__(self, *, cluster: str = "default", cidr_matches_nodes: bool = False) -> None:
        self._cluster = cluster
        self._cidr_matches_nodes = cidr_matches_nodes
        self._numbers: dict[Peer, int] = {}
        self._peers: dict[int, Peer] = {}
        self._targets: dict[int, Target] = {}
        self._index = _Index()
        self._last = ANY_SELECTOR
        self._identities: dict[int, Known] = {}
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
        fresh = _Index()
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
        for number, identity in self._identities.items():
            gained = fresh.matches(identity, self._cluster)
            if gained:
                self._matches[number] |= gained
                self._moved_identities.add(number)

    def _disturb(self, target: Target) -> None:
        """Note that a target comes or goes that may mean addresses."""
        if target.entity in _WIDTH_OF_FAMILY:
            self._moved_blocks |= _EVERYWHERE
        if target.blocks:
            self._moved_blocks.update(block.prefix for block in target.blocks)
            self._wanted = None

    def forget(self, numbers: set[int]) -> None:
        """Forget selectors; their numbers are never given out again."""
        gone = numbers & self._targets.keys()
        if not gone:
            return
        self._peers = {number: peer for number, peer in self._peers.items() if number not in gone}
        for number in gone:
            target = self._targets.pop(number)
            self._disturb(target)
            self._index.remove(number, target)
        self._numbers = {peer: number for number, peer in self._peers.items()}
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
        self._index = _Index()
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
        self._identities[number] = identity
        self._matches[number] = frozenset(self._index.matches(identity, self._cluster))
        self._moved_identities.add(number)

    def remove_identity(self, number: int) -> None:
        """Forget an identity; unknown numbers are ignored."""
        if self._identities.pop(number, None) is not None:
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
        return {text for target in self._targets.values() for text in target.texts}

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
            case FqdnPeer(match_name, match_pattern):
                return Target(texts=tuple(t for t in (match_name, match_pattern) if t))
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
