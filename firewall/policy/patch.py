"""Edits made in the text of a policy file, so that its author recognises it afterwards.

Each edit touches the fewest characters: an item is written below the last one in its indentation,
or into the brackets where a list is written in brackets. Where that is not possible (aliases, an
item on a line with others) the enclosing value is written anew, and so on outwards. No result is
believed: the text is read again, and counts only if it holds exactly the objects that it should.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from firewall.policy.dump import dump
from firewall.policy.edits import Append, Edit, EditError, Path, Put, Take, applied, place
from firewall.policy.model import ObjectKey
from firewall.policy.readers import ReaderSettings, read

_WIDTH = 88  # columns before a written value is folded


def patched(
    text: str, key: ObjectKey, edits: tuple[Edit, ...] | None, settings: ReaderSettings
) -> str | None:
    """Return the text with edits made in one of its objects.

    Args:
        text: a policy file.
        key: which object is meant.
        edits: what to change, in order; None = take the object out.
        settings: as the file is read.

    Returns:
        The changed text, None if it cannot be made to hold just the changed object.
    """
    if edits is None:
        return _without(text, key, settings)
    for edit in edits:
        wanted = _documents(text, settings)
        if key not in wanted:
            return None
        try:
            wanted[key] = applied(wanted[key], (edit,))
        except EditError:
            return None
        text_now = next(
            (
                attempt
                for attempt in _attempts(text, key, edit, settings, wanted[key])
                if _documents(attempt, settings) == wanted
            ),
            None,
        )
        if text_now is None:
            return None
        text = text_now
    return text


def unified(before: str, after: str, file: str) -> str:
    """Return a patch that `patch -p1` and `git apply` take; file names as they are given."""
    name = file.lstrip("/")
    lines = difflib.unified_diff(
        before.splitlines(keepends=True),
        after.splitlines(keepends=True),
        fromfile=f"a/{name}",
        tofile=f"b/{name}",
    )
    marked = (
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )
    return "".join(marked)


def _documents(text: str, settings: ReaderSettings) -> dict[ObjectKey, dict[str, object]]:
    """Return the objects of a text; none if it is not valid as a whole."""
    result = read(text, "", settings=settings)
    if result.errors:
        return {}
    return {one.key: one.document for one in result.objects}


def written(value: Any, *, flow: bool | None = None, width: float = _WIDTH) -> str:
    """Return a value as YAML, as `dump` does; innermost collections are in brackets."""
    return dump(value, flow=flow, width=width)


# --- where things stand -----------------------------------------------------------------------


def _roots(text: str) -> list[yaml.Node]:
    """Return the nodes of all objects, those of lists included."""
    found: list[yaml.Node] = []
    for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
        items = _child(node, "items")
        found += items.value if isinstance(items, yaml.SequenceNode) else [node]
    return found


def _root(text: str, key: ObjectKey, settings: ReaderSettings) -> yaml.Node | None:
    """Return the node of an object."""
    try:
        roots = _roots(text)
    except yaml.YAMLError:
        return None
    for node in roots:
        metadata = _child(node, "metadata")
        name = _scalar(metadata, "name")
        namespace = _scalar(metadata, "namespace") or settings.default_namespace
        if (_scalar(node, "kind"), name) == (key.kind, key.name) and key.namespace in (
            "",
            namespace,
        ):
            return node
    return None


def _child(node: yaml.Node | None, step: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode) and isinstance(step, str):
        return next((value for key, value in node.value if key.value == step), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        child: yaml.Node = node.value[step]
        return child
    return None


def _scalar(node: yaml.Node | None, step: str) -> str:
    child = _child(node, step)
    return str(child.value) if isinstance(child, yaml.ScalarNode) else ""


def _at(root: yaml.Node | None, path: Path) -> yaml.Node | None:
    for step in path:
        root = _child(root, step)
    return root


def _end(text: str, node: yaml.Node) -> int:
    """Return the index behind the last character of a node, comments and blank lines left out."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(text, last[1] if isinstance(last, tuple) else last)
    start, end = node.start_mark.index, node.end_mark.index
    while end > start and text[end - 1] in " \n":
        end -= 1
    return int(end)


def _line_end(text: str, index: int) -> int:
    found = text.find("\n", index)
    return len(text) if found < 0 else found


# --- attempts, the smallest first -------------------------------------------------------------


def _attempts(
    text: str,
    key: ObjectKey,
    edit: Edit,
    settings: ReaderSettings,
    document: Mapping[str, Any],
) -> Iterator[str]:
    root = _root(text, key, settings)
    if root is None:
        return
    parent = _at(root, edit.path[:-1])
    match edit:
        case Append(path=path, item=item):
            node = _at(root, path)
            if isinstance(node, yaml.SequenceNode):
                yield _with_item(text, node, item)
            elif isinstance(parent, yaml.MappingNode) and node is None:
                yield _with_key(text, parent, str(path[-1]), [item])
        case Take(path=path):
            yield from _taken(text, parent, path[-1])
        case Put(path=path, value=value):
            node = _at(root, path)
            if node is not None:
                yield _replaced(text, node, value)
    for length in range(len(edit.path) - 1, -1, -1):
        node = _at(root, edit.path[:length])
        if node is not None:
            yield _replaced(text, node, place(document, edit.path[:length]))


def _with_item(text: str, node: yaml.SequenceNode, item: Any) -> str:
    if not node.value:
        return _replaced(text, node, [item])
    end = _end(text, node.value[-1])
    if node.flow_style:
        return f"{text[:end]}, {_flow(item)}{text[end:]}"
    end = _line_end(text, end)
    column = node.start_mark.column
    return f"{text[:end]}\n{' ' * column}- {_block(item, column + 2)}{text[end:]}"


def _with_key(text: str, node: yaml.MappingNode, key: str, value: Any) -> str:
    if not node.value:
        return _replaced(text, node, {key: value})
    end = _end(text, node)
    if node.flow_style:
        end = _end(text, node.value[-1][1])
        return f"{text[:end]}, {key}: {_flow(value)}{text[end:]}"
    end = _line_end(text, end)
    column = node.start_mark.column
    return f"{text[:end]}\n{' ' * column}{_block({key: value}, column)}{text[end:]}"


def _taken(text: str, parent: yaml.Node | None, step: str | int) -> Iterator[str]:
    """Yield the text without one child: its lines, or its part of a bracketed list."""
    if isinstance(parent, yaml.MappingNode):
        pairs = [(name, value) for name, value in parent.value if name.value == step]
        if not pairs:
            return
        start, end = pairs[0][0].start_mark.index, _end(text, pairs[0][1])
    elif isinstance(parent, yaml.SequenceNode) and isinstance(step, int):
        node = parent.value[step]
        start, end = node.start_mark.index, _end(text, node)
    else:
        return
    if parent.flow_style:
        rest = text[end:].lstrip(" \n")
        if rest.startswith(","):
            yield text[:start] + rest[1:].lstrip(" ")
        before = text[:start].rstrip(" \n")
        if before.endswith(","):
            yield before[:-1] + text[end:]
        return
    line = text.rfind("\n", 0, start) + 1
    if set(text[line:start]) <= {" ", "-"}:
        yield text[:line] + text[_line_end(text, end) + 1 :]


def _replaced(text: str, node: yaml.Node, value: Any) -> str:
    """Return the text with a node written anew, in the style that it has."""
    start, end = node.start_mark.index, _end(text, node)
    flow = not isinstance(node, yaml.CollectionNode) or node.flow_style or not value
    new = _flow(value) if flow else _block(value, node.start_mark.column)
    return text[:start] + new + text[end:]


def _flow(value: Any) -> str:
    """Write a value on one line, as it may stand inside brackets."""
    return written([value], flow=True, width=float("inf")).strip()[1:-1]


def _block(value: Any, column: int) -> str:
    """Write a value from a column on; inner collections without further ones on one line."""
    lines = written(value).removesuffix("...\n").rstrip("\n").split("\n")
    return f"\n{' ' * column}".join(lines)


def _without(text: str, key: ObjectKey, settings: ReaderSettings) -> str | None:
    """Return the text without an object."""
    wanted = _documents(text, settings)
    node = _root(text, key, settings)
    if node is None or wanted.pop(key, None) is None:
        return None
    start, end = node.start_mark.index, _line_end(text, _end(text, node))
    line = text.rfind("\n", 0, start) + 1
    attempt = text[:line] + text[end + 1 :]
    result = read(attempt, "", settings=settings)
    if result.errors or {one.key: one.document for one in result.objects} != wanted:
        return None
    return attempt
