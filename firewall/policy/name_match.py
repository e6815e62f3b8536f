"""Which names a `matchName`, `matchPattern` or `serverNames` item means.

Names are compared in lower case and with their trailing dot; space around an item is not part of
it. A pattern must match the whole name:

    .                      itself
    a leading **.          one or more whole labels (two or more stars; Cilium 1.19)
    any other run of *     zero or more letters, digits, "-" and "_", never a dot
    nothing but stars      every name (with a dot behind it: if there are two or more)

Source: Cilium pkg/fqdn/matchpattern and pkg/policy/api/fqdn.go.
"""

import re2

_CHARACTER = "[-a-zA-Z0-9_]"
_LABELS = f"({_CHARACTER}+([.]{_CHARACTER}+)*)[.]"
_EVERY_NAME = f"({_CHARACTER}+[.])+|[.]"
_STAR = "*"


def normalise(name: str) -> str:
    """Return a name in lower case, with exactly one trailing dot."""
    return name.lower().removesuffix(".") + "."


def to_regex(pattern: str) -> str:
    """Return the RE2 that must match a whole normalised name."""
    text = pattern.strip().lower()
    stars = len(text) - len(text.lstrip(_STAR))
    rest = text[stars:]
    if stars and (not rest or (rest == "." and stars > 1)):
        return _EVERY_NAME
    text = normalise(text)
    prefix = ""
    if stars > 1 and rest.startswith("."):
        prefix = _LABELS
        text = text[stars + 1 :]
    return prefix + "".join(_pieces(text))


def _pieces(text: str) -> list[str]:
    found: list[str] = []
    previous = ""
    for character in text:
        if character == _STAR:
            if previous != _STAR:
                found.append(f"{_CHARACTER}*")
        else:
            found.append("[.]" if character == "." else re2.escape(character))
        previous = character
    return found


class NameMatcher:
    """The names that any of some items means; patterns and plain names are written alike."""

    def __init__(self, items: tuple[str, ...]) -> None:
        self._names = frozenset(normalise(item.strip()) for item in items if _STAR not in item)
        self._programs = [re2.compile(to_regex(item)) for item in items if _STAR in item]

    def matches(self, name: str) -> bool:
        """Say whether a name, in any case, with or without trailing dot, is meant."""
        asked = normalise(name)
        return asked in self._names or any(
            program.fullmatch(asked) is not None for program in self._programs
        )
