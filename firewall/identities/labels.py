"""Labels: what is known about an endpoint, and which part of it makes its identity.

A label is `source:key=value`. The source says who vouches for it: `k8s:` comes from the workload's
declaration, `reserved:` from us, `cidr:` and `fqdn:` from the address. A label set is kept in one
canonical order so that equal sets have equal texts, equal hashes and, later, equal identity
numbers on every node. Only the security-relevant part of an endpoint's labels makes its identity:
a label that differs for every replica (a pod-template hash) would give every replica a number of
its own, so `LabelFilter` leaves it out.

Sources: Cilium pkg/labels (form, order, sources), pkg/labelsfilter (the filter and its defaults).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

ANY = "any"
"""In selectors: a label of every source. On a label: nobody in particular vouches for it."""

UNSPEC = "unspec"
"""The source of a label that was written without one."""

K8S = "k8s"
"""The source of workload labels, Cilium's and Kubernetes' policies mean this one."""

RESERVED = "reserved"
"""The source of the labels that only we give (host, world, init, ...)."""

SOURCES = frozenset(
    {
        ANY,
        UNSPEC,
        K8S,
        RESERVED,
        "cidr",
        "cidrgroup",
        "cilium-generated",
        "cni",
        "container",
        "directory",
        "fqdn",
        "gen",
        "ingress",
        "mesos",
        "node",
    }
)
"""Every source that exists (Cilium pkg/labels LabelSource*)."""

POD_NAMESPACE = "io.kubernetes.pod.namespace"
"""Key of the label that holds the namespace; policies match it implicitly."""

NAMESPACE_LABELS = "io.cilium.k8s.namespace.labels"
"""Prefix of the keys that hold the namespace's own labels; a dot and the key follow."""

CLUSTER = "io.cilium.k8s.policy.cluster"
"""Key of the label that holds the cluster's name."""

_FORBIDDEN = re.compile(r"[;\x00-\x20\x7f-\x9f]")


class LabelError(ValueError):
    """The text is no label, selector key or filter; the message says what is wrong with it."""


class Label(NamedTuple):
    """One `source:key=value`; an empty value is printed without the equals sign."""

    source: str
    key: str
    value: str = ""

    def __str__(self) -> str:
        """Render as Cilium and Hubble do: `k8s:app=web`, `reserved:host`."""
        return f"{self.source}:{self.key}={self.value}" if self.value else self.name

    @property
    def name(self) -> str:
        """The label without its value, `source:key`: what must be unique in a set."""
        return f"{self.source}:{self.key}"


def split_source(text: str, default_source: str) -> tuple[str, str]:
    """Separate the source from a key.

    `$x` is short for `reserved:x`, and so is the dotted form `reserved.x` (Cilium's parseSource).

    Args:
        text: `source:key`, `key`, `:key`, `$key`.
        default_source: what a key without source gets.

    Returns:
        (source, key); the key may be empty.

    Raises:
        LabelError: the source does not exist.
    """
    if text.startswith("$"):
        return RESERVED, text[1:]
    source, colon, key = text.partition(":")
    if not colon:
        if text.startswith("reserved."):
            return RESERVED, text.removeprefix("reserved.")
        return default_source, text
    if not source:
        return default_source, key
    if source not in SOURCES:
        raise LabelError(
            f"unknown label source {source!r} in {text!r}; sources are {', '.join(sorted(SOURCES))}"
        )
    return source, key


def parse_label(text: str, default_source: str = UNSPEC) -> Label:
    """Read one label as people write it.

    Args:
        text: `source:key=value`, `key=value`, `source:key`, `$host`.
        default_source: the source of a label written without one.

    Raises:
        LabelError: no key, an unknown source, or a character that would break the canonical text
            (semicolon, white space, control characters).
    """
    name, _, value = text.partition("=")
    source, key = split_source(name, default_source)
    if not key and source == RESERVED:
        key, value = value, ""  # "reserved:=host", which Cilium reads as reserved:host
    if not key:
        raise LabelError(f"label {text!r} has no key; write source:key=value")
    found = _FORBIDDEN.search(text)
    if found:
        raise LabelError(f"label {text!r} holds {found.group()!r}, which no label may hold")
    return Label(source, key, value)


class LabelSet:
    """An immutable set of labels with at most one value per source and key.

    Equal sets are equal, hash equally and have the same `text`, whatever order they came in.

    Raises:
        LabelError: one key has two values, or a label holds what would end it in `text`.
    """

    __slots__ = ("_by_key", "_hash", "labels", "text")

    labels: tuple[Label, ...]
    """Ordered by key, then source, as Cilium's SortedList orders them."""

    text: str
    """`k8s:a=b;k8s:c=d;`: the value that the identity store keeps per number."""

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        ordered = tuple(
            sorted(set(labels), key=lambda label: (label.key, label.source, label.value))
        )
        by_key: dict[str, tuple[Label, ...]] = {}
        for label in ordered:
            if _FORBIDDEN.search(label.key) or _FORBIDDEN.search(label.value):
                raise LabelError(f"label {str(label)!r} would tear the text of its set")
            others = by_key.get(label.key, ())
            for other in others:
                if other.source == label.source:
                    raise LabelError(
                        f"label {label.name} has two values: {other.value!r} and {label.value!r}"
                    )
            by_key[label.key] = (*others, label)
        self.labels = ordered
        self.text = "".join(f"{source}:{key}={value};" for source, key, value in ordered)
        self._by_key = by_key
        self._hash = hash(self.text)

    @classmethod
    def parse(cls, texts: Iterable[str], default_source: str = UNSPEC) -> "LabelSet":
        """Read labels written as in `parse_label`.

        Raises:
            LabelError: one of them is no label, or two give one key different values.
        """
        return cls(parse_label(text, default_source) for text in texts)

    @classmethod
    def from_text(cls, text: str) -> "LabelSet":
        """Read the canonical text back (`k8s:a=b;k8s:c=d;`).

        Raises:
            LabelError: the text is not what `text` writes.
        """
        if text and not text.endswith(";"):
            raise LabelError(f"label text {text!r} is cut short: it must end with ';'")
        return cls.parse(text.split(";")[:-1])

    def named(self, key: str) -> tuple[Label, ...]:
        """Return the labels with this key, of whatever source; usually none or one."""
        return self._by_key.get(key, ())

    def get(self, source: str, key: str) -> str | None:
        """Return the value of a label, None if it is missing. Source `any` takes the first."""
        for label in self._by_key.get(key, ()):
            if source in (ANY, label.source):
                return label.value
        return None

    def with_labels(self, labels: Iterable[Label]) -> "LabelSet":
        """Return a set with these added; equal source and key is replaced."""
        added = {label.name: label for label in labels}
        kept = (label for label in self.labels if label.name not in added)
        return LabelSet((*kept, *added.values()))

    def without(self, names: Iterable[str]) -> "LabelSet":
        """Return a set without the labels called `source:key` in `names`."""
        gone = set(names)
        return LabelSet(label for label in self.labels if label.name not in gone)

    def strings(self) -> tuple[str, ...]:
        """Return `source:key=value` of each, sorted as text: the form in flows and listings."""
        return tuple(sorted(map(str, self.labels)))

    def __iter__(self) -> Iterator[Label]:
        return iter(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __contains__(self, label: object) -> bool:
        return label in self.labels

    def __eq__(self, other: object) -> bool:
        return self.text == other.text if isinstance(other, LabelSet) else NotImplemented

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"LabelSet({self.text!r})"

    def __str__(self) -> str:
        return " ".join(self.strings())


NO_LABELS = LabelSet()
"""The empty set."""

DEFAULT_FILTER: tuple[str, ...] = (
    r"reserved:.*",
    r"io\.kubernetes\.pod\.namespace",
    r"io\.cilium\.k8s\.namespace\.labels",
    r"app\.kubernetes\.io",
    r"io\.cilium\.k8s\.policy\.cluster",
    r"io\.cilium\.k8s\.policy\.serviceaccount",
    r"!io\.kubernetes",
    r"!kubernetes\.io",
    r"!statefulset\.kubernetes\.io/pod-name",
    r"!apps\.kubernetes\.io/pod-index",
    r"!batch\.kubernetes\.io/job-completion-index",
    r"!batch\.kubernetes\.io/controller-uid",
    r"!.*beta\.kubernetes\.io",
    r"!k8s\.io",
    r"!pod-template-generation",
    r"!pod-template-hash",
    r"!controller-revision-hash",
    r"!controller-uid",
    r"!annotation.*",
    r"!etcd_node",
    r"!topology\.kubernetes\.io",
)
"""Cilium's default list of security-relevant labels (pkg/labelsfilter/filter.go), in its order."""


class _FilterRule(NamedTuple):
    exclude: bool
    source: str
    pattern: re.Pattern[str]


@dataclass(frozen=True, slots=True)
class LabelFilter:
    """Decides which labels are security-relevant.

    Args:
        options: additional `source:regex` items, `!` first excludes, as Cilium's `--labels` takes
            them; a regex without source applies to every source and matches at the key's start.
        defaults: the list that `options` are added to.

    Raises:
        LabelError: a source that does not exist or a regex that does not compile.
    """

    options: tuple[str, ...] = ()
    defaults: tuple[str, ...] = DEFAULT_FILTER
    _rules: tuple[_FilterRule, ...] = field(init=False, repr=False, compare=False)
    _whitelist: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rules = tuple(map(_parse_filter_rule, (*self.defaults, *self.options)))
        object.__setattr__(self, "_rules", rules)
        # Cilium: one include from the user turns the list into a whitelist; the defaults do not.
        asked = rules[len(self.defaults) :]
        object.__setattr__(self, "_whitelist", any(not rule.exclude for rule in asked))

    def keeps(self, label: Label) -> bool:
        """Say whether a label belongs to the identity.

        An include wins over an exclude if it matches more of the key. A label that nothing matches
        is kept, unless the operator wrote an include.
        """
        longest_include = 0
        shortest_exclude = 0
        for exclude, source, pattern in self._rules:
            if source not in (ANY, label.source):
                continue
            found = pattern.match(label.key)
            if found is None:
                continue
            length = found.end()
            if exclude:
                shortest_exclude = min(shortest_exclude or length, length)
            else:
                longest_include = max(longest_include, length)
        return (not self._whitelist and not shortest_exclude) or longest_include > shortest_exclude

    def split(self, labels: LabelSet) -> tuple[LabelSet, LabelSet]:
        """Divide an endpoint's labels into (security-relevant, informational)."""
        kept = LabelSet(filter(self.keeps, labels))
        return kept, LabelSet(label for label in labels if label not in kept)


def _parse_filter_rule(text: str) -> _FilterRule:
    exclude = text.startswith("!")
    source, expression = split_source(text.removeprefix("!"), ANY)
    if not expression:
        raise LabelError(f"label filter {text!r} has no expression")
    try:
        return _FilterRule(exclude, source, re.compile(expression))
    except re.error as error:
        raise LabelError(f"label filter {text!r} is no regular expression: {error}") from error
