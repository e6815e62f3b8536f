"""Text to nodes: YAML (and so JSON) with the place of every value, and with bounds.

The nodes are composed from libyaml's event stream instead of by `yaml.compose`, for three reasons:
depth and size are checked while they grow (a few lines of aliases can mean a billion nodes), a
double key is refused where it stands, and what a plain scalar means stays open until a field says
which kind of value it wants (so `on` can be a label's value although YAML 1.1 calls it a boolean).

Aliases share their node; `Node.size` counts a shared node every time it is reached, so that the
bound is on what a reader will walk over, not on what is stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import yaml

from firewall.policy.problem import Problem

MAX_NODES = 1_000_000
"""Values in one document, aliases expanded: 50 times the largest policy of Cilium's scale tests."""

MAX_DEPTH = 100
"""Nested lists and mappings; the deepest field of any policy format is 14 deep."""

_TOO_DEEP = f"nested more than {MAX_DEPTH} deep"

_LIBYAML_TOO_DEEP = "exceeded maximum nesting depth"
"""Said by libyaml's scanner (PyYAML 6.0.4) at 1,000 open brackets, before the composer counts."""

_TAG = "tag:yaml.org,2002:"
_STRING_TAGS = {"!", f"{_TAG}str"}
_PLAIN_TAGS = {f"{_TAG}{name}" for name in ("int", "bool", "float", "null")}
_MERGE_KEY = "<<"


class Mark(NamedTuple):
    """A place in a file; line and column count from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True, eq=False)
class Scalar:
    """One scalar as written. `plain`: without quotes, so its kind is open."""

    mark: Mark
    text: str
    plain: bool
    size: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """A list."""

    mark: Mark
    items: tuple["Node", ...]
    size: int


class Pair(NamedTuple):
    """A key with the place where it stands, and its value."""

    mark: Mark
    value: "Node"


@dataclass(frozen=True, slots=True, eq=False)
class Mapping:
    """A mapping in the order of the file; keys are text as written, and distinct."""

    mark: Mark
    pairs: dict[str, Pair]
    size: int


Node = Scalar | Sequence | Mapping


class Document(NamedTuple):
    """One document; `spoiled`: a key stands twice in it, so nothing of it may take effect."""

    root: Node
    spoiled: bool


class CompositionError(Exception):
    """The document cannot be read as values.

    Attributes:
        mark: where, counted from 1.
        message: what is wrong.
        ends_file: whether the text is hostile rather than wrong: parsing on costs too much.
    """

    def __init__(self, mark: Mark, message: str, *, ends_file: bool = False) -> None:
        super().__init__(message)
        self.mark = mark
        self.message = message
        self.ends_file = ends_file


def compose(text: str, file: str, problems: list[Problem]) -> Iterator[Document]:
    """Yield every document that can be read.

    A double key spoils its own document only, whose other faults can still be found. Broken syntax
    ends the file, because nothing after it can be trusted, and so does an exceeded bound (libyaml's
    time grows with the square of depth).

    Args:
        text: YAML or JSON, any number of documents.
        file: the name put into problems.
        problems: receives what is wrong.
    """
    try:
        events = yaml.parse(text, Loader=yaml.CSafeLoader)
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                composer = _Composer(events)
                try:
                    root = composer.node(next(events), 0)
                except CompositionError as error:
                    problems.append(Problem.error(file, *error.mark, "", error.message))
                    if error.ends_file:
                        return
                    _skip_document(events)
                    continue
                problems += (
                    Problem.error(file, *double.mark, "", double.message)
                    for double in composer.doubles
                )
                if not (isinstance(root, Scalar) and root.plain and not root.text):
                    yield Document(root, spoiled=bool(composer.doubles))
    except yaml.MarkedYAMLError as error:
        mark = _mark(error.problem_mark or error.context_mark)
        about = ": ".join(part for part in (error.context, error.problem) if part)
        message = _TOO_DEEP if error.problem == _LIBYAML_TOO_DEEP else f"not YAML: {about}"
        problems.append(Problem.error(file, *mark, "", message))
    except yaml.reader.ReaderError as error:
        mark = _mark_of_offset(text, error.position)
        problems.append(Problem.error(file, *mark, "", f"not YAML: {error.reason}"))
    except UnicodeError as error:
        problems.append(Problem.error(file, 1, 1, "", f"not Unicode text: {error}"))


def _skip_document(events: Iterator[yaml.Event]) -> None:
    for event in events:
        if isinstance(event, yaml.DocumentEndEvent):
            return


def _mark(mark: object) -> Mark:
    return Mark(getattr(mark, "line", 0) + 1, getattr(mark, "column", 0) + 1)


def _mark_of_offset(text: str, offset: int) -> Mark:
    before = text[:offset]
    return Mark(before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1)


class _Composer:
    """Builds one document's nodes from its events."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self.events = events
        self.anchors: dict[str, Node | None] = {}
        self.doubles: list[CompositionError] = []
        self.count = 0

    def node(self, event: yaml.Event, depth: int) -> Node:
        mark = _mark(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            return self.alias(mark, str(event.anchor))
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self.anchors[anchor] = None
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            self.grow(mark, 1)
            node = Scalar(mark, event.value, _is_plain(event, mark))
        elif depth >= MAX_DEPTH:
            raise CompositionError(mark, _TOO_DEEP, ends_file=True)
        elif isinstance(event, yaml.SequenceStartEvent):
            _refuse_tag(event, mark, "seq")
            node = self.sequence(mark, depth)
        elif isinstance(event, yaml.MappingStartEvent):
            _refuse_tag(event, mark, "map")
            node = self.mapping(mark, depth)
        else:
            raise CompositionError(mark, "a value is missing")
        if anchor is not None:
            self.anchors[anchor] = node
        return node

    def grow(self, mark: Mark, size: int) -> None:
        self.count += size
        if self.count > MAX_NODES:
            raise CompositionError(
                mark,
                f"more than {MAX_NODES} values in one document (aliases count every time)",
                ends_file=True,
            )

    def alias(self, mark: Mark, anchor: str) -> Node:
        if anchor not in self.anchors:
            raise CompositionError(mark, f'alias "*{anchor}" names no anchor before it')
        node = self.anchors[anchor]
        if node is None:
            raise CompositionError(mark, f'alias "*{anchor}" contains itself')
        self.grow(mark, node.size)
        return node

    def sequence(self, mark: Mark, depth: int) -> Sequence:
        self.grow(mark, 1)
        items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, depth + 1))
        return Sequence(mark, tuple(items), 1 + sum(item.size for item in items))

    def mapping(self, mark: Mark, depth: int) -> Mapping:
        self.grow(mark, 1)
        pairs: dict[str, Pair] = {}
        merges: list[Pair] = []
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.node(event, depth + 1)
            value = self.node(next(self.events), depth + 1)
            if not isinstance(key, Scalar):
                raise CompositionError(key.mark, "a key must be a string, not a list or a mapping")
            if key.plain and key.text == _MERGE_KEY:
                merges.append(Pair(key.mark, value))
                continue
            first = pairs.get(key.text)
            if first is not None:
                message = f'key "{key.text}" given twice; first in line {first.mark.line}'
                self.doubles.append(CompositionError(key.mark, message))
                continue
            pairs[key.text] = Pair(key.mark, value)
        for merge in merges:
            self.merge(pairs, merge)
        size = 1 + sum(1 + pair.value.size for pair in pairs.values())
        return Mapping(mark, pairs, size)

    def merge(self, pairs: dict[str, Pair], merge: Pair) -> None:
        """Take over what a `<<` names; keys of the mapping itself win (yaml.org/type/merge)."""
        sources = merge.value.items if isinstance(merge.value, Sequence) else (merge.value,)
        for source in sources:
            if not isinstance(source, Mapping):
                raise CompositionError(merge.mark, '"<<" takes a mapping or a list of mappings')
            for name, pair in source.pairs.items():
                pairs.setdefault(name, pair)


def _is_plain(event: yaml.ScalarEvent, mark: Mark) -> bool:
    if event.tag is None:
        return bool(event.implicit[0])
    if event.tag in _STRING_TAGS:
        return False
    if event.tag in _PLAIN_TAGS:
        return True
    raise CompositionError(mark, f'tag "{event.tag.replace(_TAG, "!!")}" has no meaning here')


def _refuse_tag(
    event: yaml.SequenceStartEvent | yaml.MappingStartEvent, mark: Mark, name: str
) -> None:
    if event.tag not in (None, "!", f"{_TAG}{name}"):
        raise CompositionError(mark, f'tag "{event.tag.replace(_TAG, "!!")}" has no meaning here')
