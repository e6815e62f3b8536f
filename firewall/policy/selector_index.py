"""Selectors and identities, each arranged to find the other.

An identity finds the selectors that may match it by the label values that a selector demands
together, else by a key, and by covering prefix. A selector finds the identities that it may match
by the rarest label value that it demands. Whichever is new asks; neither direction multiplies
identities by selectors.

Sources: Cilium pkg/policy/api/{entity,cidr,fqdn}.go.
"""

from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple

from conntrack.address import Prefix, parse_prefix, prefix_contains
from firewall.identities.ipcache import LongestPrefixMap
from firewall.identities.labels import CLUSTER, K8S, RESERVED, LabelSet
from firewall.identities.reserved import CLUSTER_MIN, LOCAL_MIN
from firewall.identities.selector import Operator, Selector

CIDR_SOURCE = "cidr"
FQDN_SOURCE = "fqdn"

_CLUSTER_ENTITIES = frozenset(
    {"host", "remote-node", "init", "ingress", "health", "unmanaged", "kube-apiserver"}
)
"""Reserved labels inside the entity `cluster` (Cilium pkg/policy/api/entity.go)."""

_WORLD_ENTITIES = frozenset({"world", "world-ipv4", "world-ipv6"})

WIDTH_OF_FAMILY = {"world-ipv4": 4, "world-ipv6": 16}
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


class SelectorIndex:
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
        """Keep a selector under its number."""
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
        """Forget a selector; `target` is what it was added with."""
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
            if WIDTH_OF_FAMILY.get(entity) == width:
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
    if entity in WIDTH_OF_FAMILY and "world" in reserved and identity.prefix is not None:
        return len(identity.prefix.network) == WIDTH_OF_FAMILY[entity]
    if entity not in ("cluster", "cluster-mesh"):
        return entity in reserved
    if reserved & _CLUSTER_ENTITIES:
        return True
    name = identity.labels.get(K8S, CLUSTER)
    if name is None:
        return CLUSTER_MIN <= identity.number < LOCAL_MIN and not reserved
    return entity == "cluster-mesh" or name == cluster


class IdentityIndex:
    """Identities by label value and kind, to find those that a new selector may match."""

    def __init__(self) -> None:
        self._by_value: dict[tuple[str, str], set[int]] = {}
        self._with_prefix: set[int] = set()

    def add(self, identity: Known) -> None:
        """Keep an identity."""
        for label in identity.labels:
            self._by_value.setdefault((label.key, label.value), set()).add(identity.number)
        if identity.prefix is not None:
            self._with_prefix.add(identity.number)

    def remove(self, identity: Known) -> None:
        """Forget an identity, with the labels that it was added with."""
        for label in identity.labels:
            place = label.key, label.value
            found = self._by_value[place]
            found.discard(identity.number)
            if not found:
                del self._by_value[place]
        self._with_prefix.discard(identity.number)

    def candidates(self, targets: Iterable[Target]) -> set[int] | None:
        """Return every identity that one of the targets may match; None: it may be any."""
        found: set[int] = set()
        for target in targets:
            if target.entity or target.nodes or target.texts:
                return None
            if target.blocks:
                found |= self._with_prefix
            for selector in target.labels:
                rarest = self._rarest(selector)
                if rarest is None:
                    return None
                found.update(*rarest)
        return found

    def _rarest(self, selector: Selector) -> list[set[int]] | None:
        """Return the smallest group of identities in which every match is."""
        groups = [
            [self._by_value.get((key.name, value), set()) for value in values]
            for key, operator, values in selector.requirements
            if operator is Operator.IN
        ]
        return min(groups, key=lambda group: sum(map(len, group)), default=None)
