"""Selectors: the question "does this label set belong?", as policies ask it.

A selector is a conjunction of requirements; `matchLabels` are requirements too (In with one value).
A key without source means every source, which is kept as `any`. The requirements are kept sorted
and without doubles, so two selectors that say the same are equal, hash equally and share one number
in a snapshot, whichever of the two notations wrote them.

Sources: Cilium pkg/policy/api/selector.go and pkg/labels; Kubernetes' LabelSelector for operators.
`cidr:` keys match by containment in Cilium; here they are plain keys, because a label set of a CIDR
identity holds a label for every prefix around it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, assert_never

from firewall.identities.labels import ANY, K8S, RESERVED, LabelError, LabelSet, split_source


class Operator(IntEnum):
    """How a requirement compares; the words are Kubernetes'."""

    IN = 1
    NOT_IN = 2
    EXISTS = 3
    DOES_NOT_EXIST = 4


OPERATOR_WORDS: dict[str, Operator] = {
    "In": Operator.IN,
    "NotIn": Operator.NOT_IN,
    "Exists": Operator.EXISTS,
    "DoesNotExist": Operator.DOES_NOT_EXIST,
}
"""The operators as `matchExpressions` writes them, case-sensitive."""

_WORDS = {operator: word for word, operator in OPERATOR_WORDS.items()}


class SelectorError(ValueError):
    """The selector contradicts its format; the message says where."""


class Key(NamedTuple):
    """A selector's key; source `any` stands for all of them."""

    source: str
    name: str

    def __str__(self) -> str:
        """Render as `source:key`."""
        return f"{self.source}:{self.name}"

    @property
    def dotted(self) -> str:
        """Render as Cilium stores it inside a LabelSelector, `source.key`."""
        return f"{self.source}.{self.name}"


def parse_key(text: str) -> Key:
    """Read a selector's key: `k8s:app`, `any:app`, `app`, `reserved:host`, `$host`.

    Raises:
        LabelError: an unknown source, or no key.
    """
    source, name = split_source(text, ANY)
    if not name:
        raise LabelError(f"selector key {text!r} names no label")
    return Key(source, name)


class Requirement(NamedTuple):
    """One condition. `values` sorted and distinct; empty for EXISTS and DOES_NOT_EXIST."""

    key: Key
    operator: Operator
    values: tuple[str, ...] = ()

    def matches(self, labels: LabelSet) -> bool:
        """Say whether the labels meet the condition; NOT_IN is met by a missing key."""
        source, name = self.key
        found = labels.named(name)
        if source != ANY:
            found = tuple(label for label in found if label.source == source)
        match self.operator:
            case Operator.IN:
                return any(label.value in self.values for label in found)
            case Operator.NOT_IN:
                return not any(label.value in self.values for label in found)
            case Operator.EXISTS:
                return bool(found)
            case Operator.DOES_NOT_EXIST:
                return not found
            case _:
                assert_never(self.operator)

    def __str__(self) -> str:
        """Render for people: `k8s:app=web`, `any:tier NotIn (db, cache)`."""
        match self.operator:
            case Operator.IN if len(self.values) == 1:
                return f"{self.key}={self.values[0]}" if self.values[0] else str(self.key)
            case Operator.IN | Operator.NOT_IN:
                return f"{self.key} {_WORDS[self.operator]} ({', '.join(self.values)})"
            case Operator.EXISTS | Operator.DOES_NOT_EXIST:
                return f"{self.key} {_WORDS[self.operator]}"
            case _:
                assert_never(self.operator)


def require(key: Key | str, operator: Operator, values: Iterable[str] = ()) -> Requirement:
    """Make a requirement, checked as Kubernetes checks `matchExpressions`.

    Raises:
        SelectorError: In or NotIn without values, Exists or DoesNotExist with values.
        LabelError: the key is no selector key.
    """
    parsed = parse_key(key) if isinstance(key, str) else key
    listed = tuple(sorted(set(values)))
    wants_values = operator in (Operator.IN, Operator.NOT_IN)
    if wants_values and not listed:
        raise SelectorError(f"{parsed} {_WORDS[operator]} needs at least one value")
    if not wants_values and listed:
        raise SelectorError(f"{parsed} {_WORDS[operator]} takes no values, got {list(listed)}")
    return Requirement(parsed, operator, listed)


@dataclass(frozen=True, slots=True)
class Selector:
    """A conjunction of requirements; none at all matches every label set."""

    requirements: tuple[Requirement, ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(set(self.requirements)))
        object.__setattr__(self, "requirements", ordered)
        object.__setattr__(self, "_hash", hash(ordered))

    def __hash__(self) -> int:
        return self._hash

    def matches(self, labels: LabelSet) -> bool:
        """Say whether the label set meets every requirement."""
        return all(requirement.matches(labels) for requirement in self.requirements)

    def with_requirement(self, requirement: Requirement) -> "Selector":
        """Return the narrower selector that demands this as well."""
        return Selector((*self.requirements, requirement))

    def with_label(self, source: str, key: str, value: str) -> "Selector":
        """Return a selector in which this label must be, instead of whatever it said of that key.

        Cilium does this with the namespace of a policy's subject: another value that the author
        wrote is overwritten. Requirements on the key with source `any` go too.
        """
        kept = tuple(
            requirement
            for requirement in self.requirements
            if requirement.key.name != key or requirement.key.source not in (source, ANY)
        )
        return Selector((*kept, Requirement(Key(source, key), Operator.IN, (value,))))

    def has_key(self, key: str, sources: Iterable[str] = (K8S, ANY)) -> bool:
        """Say whether a requirement concerns this key under one of the sources."""
        wanted = set(sources)
        return any(k.name == key and k.source in wanted for k in self.keys)

    def has_key_prefix(self, prefix: str, sources: Iterable[str] = (K8S, ANY)) -> bool:
        """Say whether a requirement's key begins with `prefix` under one of the sources."""
        wanted = set(sources)
        return any(k.name.startswith(prefix) and k.source in wanted for k in self.keys)

    def has_source(self, source: str) -> bool:
        """Say whether a requirement names this source, for example `reserved`."""
        return any(k.source == source for k in self.keys)

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys of the requirements, in canonical order, doubles included."""
        return tuple(requirement.key for requirement in self.requirements)

    def describe(self) -> str:
        """Render for people in one line: `k8s:app=web, any:tier NotIn (db)`; "all" if empty."""
        return ", ".join(map(str, self.requirements)) or "all"

    def __str__(self) -> str:
        """Render as `cilium-dbg policy selectors` does: Go's form of a Kubernetes LabelSelector."""
        pairs: dict[str, str] = {}
        expressions = []
        for key, operator, values in self.requirements:
            if operator is Operator.IN and len(values) == 1 and key.dotted not in pairs:
                pairs[key.dotted] = values[0]
            else:
                expressions.append(
                    f"LabelSelectorRequirement{{Key:{key.dotted},Operator:{_WORDS[operator]},"
                    f"Values:[{' '.join(values)}],}},"
                )
        labels = "".join(f"{key}: {value}," for key, value in sorted(pairs.items()))
        return (
            f"&LabelSelector{{MatchLabels:map[string]string{{{labels}}},"
            f"MatchExpressions:[]LabelSelectorRequirement{{{''.join(expressions)}}},}}"
        )


EVERYTHING = Selector()
"""The empty selector, `{}`: it matches every label set."""


def reserved(name: str) -> Selector:
    """Return the selector of one reserved label, `reserved("host")`."""
    return Selector((Requirement(Key(RESERVED, name), Operator.IN, ("",)),))


def from_labels(labels: Mapping[str, str]) -> Selector:
    """Make a selector of `matchLabels`: keys as in `parse_key`, to the value each must have.

    Raises:
        LabelError: a key is no selector key.
    """
    return Selector(
        tuple(Requirement(parse_key(key), Operator.IN, (value,)) for key, value in labels.items())
    )
