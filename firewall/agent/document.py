"""YAML (and so JSON) as typed values, with the place of everything that is wrong.

Works on the node tree, not on loaded objects, because only nodes know line and column. A reader
notes each problem and goes on with a fallback, so that one run reports all of them; the caller
refuses the whole if any was noted. Scalars are read by the type that the setting has, from their
text: `on`, `yes`, `0755` and `1:30` never change type on their own.
"""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import yaml

_TRUE = frozenset({"true", "yes", "on"})
_FALSE = frozenset({"false", "no", "off"})


class Place(NamedTuple):
    """Where a value stands; `line` and `column` count from 1, 0 = not from a file."""

    file: str
    line: int = 0
    column: int = 0
    path: str = ""

    def __str__(self) -> str:
        """Render as `file:line:column: path`, leaving out what is not known."""
        where = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{where}: {self.path}" if self.path else where


NOWHERE = Place("")


class Problem(NamedTuple):
    """One thing that is wrong, and where."""

    place: Place
    message: str

    def __str__(self) -> str:
        """Render as `file:line:column: path: message`."""
        return f"{self.place}: {self.message}"


class DocumentError(Exception):
    """The document cannot be used; every problem found is in `problems`."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


class Value(NamedTuple):
    """A node and its place."""

    node: yaml.Node
    place: Place


@dataclass(slots=True)
class Reader:
    """Reads values and gathers problems."""

    problems: list[Problem] = field(default_factory=list)

    def note(self, place: Place, message: str) -> None:
        """Remember a problem."""
        self.problems.append(Problem(place, message))

    def finish(self) -> None:
        """Refuse the whole if anything was wrong.

        Raises:
            DocumentError: something was.
        """
        if self.problems:
            raise DocumentError(sorted(self.problems, key=lambda problem: problem.place[:3]))

    def compose(self, text: str, file: str) -> list[Value]:
        """Return the documents of a YAML text; empty ones are left out."""
        documents: list[Value] = []
        try:
            documents.extend(
                Value(node, _place(node, file, ""))
                for node in yaml.compose_all(text, Loader=yaml.CSafeLoader)
                if not is_null(node)
            )
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            message = " ".join(part for part in (error.context, error.problem) if part)
            self.note(Place(file, line, column), f"not YAML: {message}")
        except yaml.YAMLError as error:
            self.note(Place(file, 1, 1), f"not YAML: {' '.join(str(error).split())}")
        return documents

    def mapping(self, value: Value, known: Iterable[str]) -> dict[str, Value]:
        """Return the entries of a mapping; unknown and repeated keys are problems.

        A null value is the same as a missing key.
        """
        if not isinstance(value.node, yaml.MappingNode):
            self.note(value.place, f"expected a mapping, got {_kind(value.node)}")
            return {}
        names = tuple(known)
        entries: dict[str, Value] = {}
        for key_node, node in value.node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
            path = f"{value.place.path}.{key}" if value.place.path else key
            place = _place(key_node, value.place.file, path)
            if key not in names:
                self.note(place, unknown("setting", key, names))
            elif key in entries:
                self.note(place, f"{key} is given twice; first at line {entries[key].place.line}")
            elif not is_null(node):
                entries[key] = Value(node, _place(node, value.place.file, path))
        return entries

    def entry(self, value: Value, key: str) -> Value | None:
        """Return one entry of a mapping whose others are not looked at, None if it is not there."""
        if isinstance(value.node, yaml.MappingNode):
            for key_node, node in value.node.value:
                if key_node.value == key:
                    return Value(node, _place(node, value.place.file, key))
        return None

    def pairs(self, value: Value) -> Iterator[tuple[str, Value]]:
        """Yield the entries of a mapping that takes any key, placed at the keys; nulls stay."""
        if not isinstance(value.node, yaml.MappingNode):
            self.note(value.place, f"expected a mapping, got {_kind(value.node)}")
            return
        for key_node, node in value.node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
            yield key, Value(node, _place(key_node, value.place.file, f"{value.place.path}.{key}"))

    def items(self, value: Value) -> Iterator[Value]:
        """Yield the items of a sequence."""
        if not isinstance(value.node, yaml.SequenceNode):
            self.note(value.place, f"expected a list, got {_kind(value.node)}")
            return
        for number, node in enumerate(value.node.value):
            yield Value(node, _place(node, value.place.file, f"{value.place.path}[{number}]"))

    def text(self, value: Value) -> str:
        """Return a scalar as text, "" if it is none."""
        if isinstance(value.node, yaml.ScalarNode):
            return str(value.node.value)
        self.note(value.place, f"expected text, got {_kind(value.node)}")
        return ""

    def texts(self, value: Value) -> tuple[str, ...]:
        """Return a sequence of scalars as text."""
        return tuple(self.text(item) for item in self.items(value))

    def boolean(self, value: Value) -> bool:
        """Return true/yes/on or false/no/off as a bool."""
        text = self.text(value).lower()
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        if isinstance(value.node, yaml.ScalarNode):
            self.note(value.place, f"expected on or off, got {text!r}")
        return False


def scalar(text: str, place: Place) -> Value:
    """Make a value of a text that came from a flag or the environment."""
    return Value(yaml.ScalarNode("tag:yaml.org,2002:str", text), place)


def sequence(texts: Iterable[str], place: Place) -> Value:
    """Make a sequence of texts that came from a flag or the environment."""
    nodes = [yaml.ScalarNode("tag:yaml.org,2002:str", text) for text in texts]
    return Value(yaml.SequenceNode("tag:yaml.org,2002:seq", nodes), place)


def unknown(noun: str, word: str, known: Iterable[str]) -> str:
    """Say that a word is not known, and which one may have been meant."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}"
    return f"unknown {noun} {word!r}; {hint}"


def is_null(node: yaml.Node | None) -> bool:
    """Tell YAML's null (also an empty document) from a value."""
    return node is None or (
        isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"
    )


def _place(node: yaml.Node, file: str, path: str) -> Place:
    """Return where a node begins."""
    mark = node.start_mark
    return Place(file, mark.line + 1, mark.column + 1, path) if mark else Place(file, path=path)


def _kind(node: yaml.Node) -> str:
    """Name what a node is, for messages."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return f"{str(node.value)!r}"
