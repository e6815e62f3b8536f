"""Values of a document as a reader asks for them: one cursor that knows its place.

A `Value` is a node, its path inside the object and the report that collects problems. Each question
(`fields`, `items`, `text`, `integer`, ...) answers None after reporting when the node is of another
kind, so a reader goes on and finds every problem of a file at once. `null` counts as missing
everywhere, as in Kubernetes' JSON.

A plain scalar is what kubectl makes of it (YAML 1.1 as go.yaml.in/yaml/v2 reads it, resolve.go): an
unquoted `yes` or `1.10` is no string, and the API server refuses it where one belongs. So do we, or
a policy that works here would not in a cluster. Dates and `22:22` are strings there, and here.
"""

import re
from collections.abc import Iterable
from collections.abc import Mapping as MappingType
from typing import NamedTuple

from firewall.policy.problem import Problem, did_you_mean
from firewall.policy.readers.composition import Mapping, Mark, Node, Scalar, Sequence

_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"})
_SHORT_TRUTHS = frozenset("yYnN")  # a warning only: PyYAML and others write them without quotes
_FALSE = frozenset({"false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"})
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(  # without underscores, which count for nothing behind the first character
    r"[-+]?(0[bB][01]+|0[oO][0-7]+|0[xX][0-9a-fA-F]+)"
    r"|[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_PATH_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_SHOWN = 60  # characters of a wrong value that a message repeats


class Report:
    """Collects the problems of one file. The only mutable value of the readers.

    Args:
        file: the name that problems carry.
        as_written: the format is our own: a string field takes a plain scalar as it stands.
    """

    def __init__(self, file: str, *, as_written: bool = False) -> None:
        self.file = file
        self.as_written = as_written
        self.problems: list[Problem] = []
        self.error_count = 0

    def error(self, mark: Mark, path: str, message: str) -> None:
        """Note what refuses the object at hand."""
        self.error_count += 1
        self.problems.append(Problem.error(self.file, *mark, path, message))

    def warning(self, mark: Mark, path: str, message: str) -> None:
        """Note what the author should know, without refusing."""
        self.problems.append(Problem.warning(self.file, *mark, path, message))


class Value(NamedTuple):
    """A node with its place inside the object and the report for its problems."""

    node: Node
    path: str
    report: Report

    @property
    def mark(self) -> Mark:
        """Where the value stands in its file."""
        return self.node.mark

    def error(self, message: str) -> None:
        """Refuse the object because of this value."""
        self.report.error(self.mark, self.path, message)

    def warning(self, message: str) -> None:
        """Tell the author about this value."""
        self.report.warning(self.mark, self.path, message)

    @property
    def is_null(self) -> bool:
        """Whether this is YAML's null, which every format treats as a missing key."""
        return isinstance(self.node, Scalar) and self.node.plain and self.node.text in _NULLS

    @property
    def is_mapping(self) -> bool:
        """Whether this is a mapping."""
        return isinstance(self.node, Mapping)

    def child(self, name: str) -> "Value | None":
        """Return a mapping's value by key without judging anything; None if missing or null."""
        if not isinstance(self.node, Mapping):
            return None
        pair = self.node.pairs.get(name)
        if pair is None:
            return None
        value = Value(pair.value, join(self.path, name), self.report)
        return None if value.is_null else value

    def pairs(self) -> "dict[str, Value]":
        """Return a free mapping (labels) with every key allowed; nulls stay; {} after a report."""
        if not isinstance(self.node, Mapping):
            self.error(f"must be a mapping, not {describe(self.node)}")
            return {}
        return {
            name: Value(pair.value, join(self.path, name), self.report)
            for name, pair in self.node.pairs.items()
        }

    def fields(
        self, known: Iterable[str], refused: MappingType[str, str] | None = None
    ) -> "dict[str, Value]":
        """Return a structure's fields; unknown ones are errors, nulls are left out.

        Args:
            known: the names that the structure has.
            refused: names that exist or existed in the format, with the reason they are refused.
        """
        if not isinstance(self.node, Mapping):
            self.error(f"must be a mapping, not {describe(self.node)}")
            return {}
        names = tuple(known)
        found: dict[str, Value] = {}
        for name, pair in self.node.pairs.items():
            value = Value(pair.value, join(self.path, name), self.report)
            if name in names:
                if not value.is_null:
                    found[name] = value
            elif refused and name in refused:
                self.report.error(pair.mark, value.path, refused[name])
            else:
                hint = did_you_mean(name, names)
                self.report.error(pair.mark, value.path, f'unknown field "{name}"{hint}')
        return found

    def items(self) -> "list[Value]":
        """Return a list's items; [] after a report. A null item is an error of its own."""
        if not isinstance(self.node, Sequence):
            self.error(f"must be a list, not {describe(self.node)}")
            return []
        listed = [
            Value(item, f"{self.path}[{at}]", self.report)
            for at, item in enumerate(self.node.items)
        ]
        for item in listed:
            if item.is_null:
                item.error("is empty; write {} if everything is meant, or remove the item")
        return [item for item in listed if not item.is_null]

    def text(self, *, or_integer: bool = False) -> str | None:
        """Return a string; a plain scalar that kubectl reads as something else is none.

        Args:
            or_integer: a whole number will do as well (Kubernetes' int-or-string).
        """
        if not isinstance(self.node, Scalar) or self.is_null:
            self.error(f"must be a string, not {describe(self.node)}")
            return None
        text = self.node.text
        if not self.node.plain or self.report.as_written:
            return text
        kind = not_text(text)
        if not kind or (or_integer and _INTEGER.fullmatch(text)):
            return text
        if text in _SHORT_TRUTHS:
            self.warning(f'kubectl reads {text} as {kind}; write "{text}"')
            return text
        shown = shorten(text)
        self.error(f'must be a string, and kubectl reads {shown} as {kind}; write "{shown}"')
        return None

    def integer(self, low: int, high: int) -> int | None:
        """Return a whole number between two bounds, both included."""
        if not isinstance(self.node, Scalar) or not self.node.plain:
            self.error(f"must be a number, not {describe(self.node)}")
            return None
        text = self.node.text
        if not _INTEGER.fullmatch(text):
            if _is_number(text):
                self.error(f"write the number in plain decimal digits, not {text}")
            else:
                self.error(f"must be a number, not {describe(self.node)}")
            return None
        # Bounded before int(): Python refuses, and takes long for, thousands of digits.
        number = int(text) if len(text) <= len(str(high)) + 1 else high + 1
        if not low <= number <= high:
            self.error(f"must be between {low} and {high}, not {shorten(text)}")
            return None
        return number

    def boolean(self) -> bool | None:
        """Return a truth value in any of the words of YAML 1.1."""
        if isinstance(self.node, Scalar) and self.node.plain:
            if self.node.text in _TRUE:
                return True
            if self.node.text in _FALSE:
                return False
        self.error(f"must be true or false, not {describe(self.node)}")
        return None

    def word(self, words: Iterable[str]) -> str | None:
        """Return one of a closed list of words."""
        text = self.text()
        listed = tuple(words)
        if text is None or text in listed:
            return text
        hint = did_you_mean(text, listed)
        self.error(f'"{shorten(text)}" is none of {", ".join(listed)}{hint}')
        return None

    def plain(self) -> object:
        """Return the value as JSON would hold it; read again, it says the same in every field."""
        return _plain(self.node)


def document_of(root: Value) -> dict[str, object]:
    """Return a whole object as plain values, for showing it again."""
    plain = root.plain()
    return plain if isinstance(plain, dict) else {}


def _plain(node: Node) -> object:
    match node:
        case Mapping():
            return {name: _plain(pair.value) for name, pair in node.pairs.items()}
        case Sequence():
            return [_plain(item) for item in node.items]
        case Scalar(text=text, plain=is_plain):
            return _plain_scalar(text) if is_plain else text


def _plain_scalar(text: str) -> object:
    """Return what JSON holds for an unquoted word: a number or null only if it comes back so."""
    if text in _NULLS:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INTEGER.fullmatch(text) and len(text) < 20 and str(int(text)) == text:
        return int(text)
    return text


def not_text(text: str) -> str:
    """Name what kubectl makes of an unquoted text other than null, "" if that is a string."""
    if text in _SHORT_TRUTHS or text in _TRUE or text in _FALSE:
        return "true or false"
    return "a number" if _is_number(text) else ""


def _is_number(text: str) -> bool:
    return text[:1] != "_" and _NUMBER.fullmatch(text.replace("_", "")) is not None


def describe(node: Node) -> str:
    """Say what a node is, for "must be X, not Y"."""
    match node:
        case Mapping():
            return "a mapping"
        case Sequence():
            return "a list"
        case Scalar(text=text, plain=True) if text in _NULLS:
            return "empty"
        case Scalar(text=text, plain=False):
            return f'the string "{shorten(text)}"'
        case Scalar(text=text):
            return shorten(text)


def shorten(text: str) -> str:
    """Cut a wrong value to what a message can carry."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def join(path: str, name: str) -> str:
    """Append a key to a path: `spec.ingress`, `matchLabels["k8s:app"]`."""
    if not _PATH_WORD.fullmatch(name):
        return f'{path}["{shorten(name)}"]'
    return f"{path}.{name}" if path else name
