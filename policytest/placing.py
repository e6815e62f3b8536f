"""A part of a YAML document as a text of its own, with every value in its old line.

Policies may stand inside a test file. What reads them, here or in a daemon, must see only them and
still name the right places; so the part is written anew in YAML's flow style, and line feeds and
spaces are put before each value until it stands where it stood. A value that cannot (its anchor is
elsewhere) is written where the text has arrived.
"""

import json
import re

from firewall.policy.readers.composition import Mapping, Mark, Node, Scalar, Sequence

_SAFE_PLAIN = re.compile(r"[A-Za-z0-9_+./~-]+")
"""Plain scalars that mean the same in flow style, whatever stands around them."""


class _Writer:
    def __init__(self) -> None:
        self.parts: list[str] = []
        self.line = 1
        self.column = 1

    def put(self, text: str) -> None:
        self.parts.append(text)
        self.column += len(text)

    def go(self, mark: Mark) -> None:
        """Move forward to a place; backward there is no way."""
        if mark.line > self.line:
            self.parts.append("\n" * (mark.line - self.line))
            self.line, self.column = mark.line, 1
        if mark.line == self.line and mark.column > self.column:
            self.put(" " * (mark.column - self.column))

    def node(self, node: Node) -> None:
        self.go(node.mark)
        match node:
            case Scalar():
                self.put(_scalar(node))
            case Sequence(items=items):
                self.put("[")
                for at, item in enumerate(items):
                    self.put(", " if at else "")
                    self.node(item)
                self.put("]")
            case Mapping(pairs=pairs):
                self.put("{")
                for at, (key, pair) in enumerate(pairs.items()):
                    self.put(", " if at else "")
                    self.go(pair.mark)
                    self.put(f"{key if _SAFE_PLAIN.fullmatch(key) else _quoted(key)}: ")
                    self.node(pair.value)
                self.put("}")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _scalar(node: Scalar) -> str:
    if not node.plain:
        return _quoted(node.text)
    if not node.text:
        return "~"
    return node.text if _SAFE_PLAIN.fullmatch(node.text) else _quoted(node.text)


def text_of(node: Node) -> str:
    """Return a document that holds just this node, at its place."""
    writer = _Writer()
    writer.node(node)
    return "".join([*writer.parts, "\n"])
