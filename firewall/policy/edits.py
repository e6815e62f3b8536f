"""Changes of a policy document, small enough to be shown to its author.

An edit names a place by its path and says what is added, taken away or put there. `applied` makes
edits in plain values; `firewall.policy.patch` makes the same ones in the text, so that comments and
layout survive.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any

Path = tuple[str | int, ...]
"""Keys and list indexes from the root of the object: `("spec", "ingress", 0)`."""

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


class EditError(LookupError):
    """The document has no such place."""


@dataclass(frozen=True, slots=True)
class Append:
    """Add an item at the end of a list; a list that is missing is made."""

    path: Path
    item: Any


@dataclass(frozen=True, slots=True)
class Take:
    """Take a key or a list item away."""

    path: Path


@dataclass(frozen=True, slots=True)
class Put:
    """Replace the value at a place."""

    path: Path
    value: Any


Edit = Append | Take | Put


def parse_path(text: str) -> Path:
    """Read a path as origins carry it: `spec.ingress[0].toPorts[1]`."""
    return tuple(key or int(index) for key, index in _STEP.findall(text))


def place(document: Any, path: Path) -> Any:
    """Return the value at a path.

    Raises:
        EditError: there is none.
    """
    for step in path:
        fits = isinstance(document, dict if isinstance(step, str) else list)
        try:
            if not fits:
                raise EditError(f"no {step} here")
            document = document[step]
        except (KeyError, IndexError) as error:
            raise EditError(f"no {step} here") from error
    return document


def applied(document: Any, edits: tuple[Edit, ...]) -> Any:
    """Return a copy of a document with edits made in their order.

    Raises:
        EditError: a place does not exist.
    """
    changed = copy.deepcopy(document)
    for edit in edits:
        parent, last = place(changed, edit.path[:-1]), edit.path[-1]
        match edit:
            case Append(item=item):
                if not isinstance(parent, dict):
                    parent = place(changed, edit.path)
                    parent.append(copy.deepcopy(item))
                elif parent.get(last) is None:
                    parent[last] = [copy.deepcopy(item)]
                else:
                    place(changed, edit.path).append(copy.deepcopy(item))
            case Take():
                place(changed, edit.path)
                del parent[last]
            case Put(value=value):
                place(changed, edit.path)
                parent[last] = copy.deepcopy(value)
    return changed
