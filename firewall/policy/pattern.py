"""Patterns of http rules: RE2 over bytes, whole values, one by one and many in one pass.

Latin-1 mode, so that no byte of a request is unmatchable (CVE-2026-73552 is what UTF-8 mode does).
A pattern without an operator is a comparison of bytes.

`PatternSet` finds all patterns that a value matches in one pass over the value, however many there
are (`re2.Set`, one automaton for all). Why not one set over all fields of a rule: `^` and `$` hold
at the ends of each field.
"""

from collections.abc import Iterable

import re2

_OPERATORS = frozenset(b"\\.+*?()|[]{}^$")
"""Bytes that mean something to RE2; a pattern without them matches only itself."""

_SET_BYTES = 64 << 20
"""What one set may use at most; 1,000 paths take about 2 MB. The default of 8 MB fails at 2,000
patterns with counted repetitions."""


class Pattern:
    """A whole-value test of one request field; `text` None or empty accepts everything.

    Attributes:
        any: it accepts everything.
        broken: why RE2 refuses it; then it accepts nothing. Empty = it does not.
    """

    __slots__ = ("_program", "any", "broken", "literal", "raw")

    def __init__(self, text: str | None) -> None:
        self.any = not text
        self.broken = ""
        self.raw = (text or "").encode()
        self.literal: bytes | None = None
        self._program: re2._Regexp | None = None
        if not _OPERATORS.intersection(self.raw):
            self.literal = self.raw
            return
        try:
            self._program = re2.compile(self.raw, _options())
        except re2.error as error:
            self.broken = _message(error)

    def accepts(self, value: bytes) -> bool:
        """Say whether the whole value matches."""
        if self.any:
            return True
        if self.literal is not None:
            return value == self.literal
        return self._program is not None and self._program.fullmatch(value) is not None


_ANYTHING = b"(?s:.*)"
"""The last pattern of each set: if it does not match, nothing was matched, for want of memory."""


class PatternSet:
    """Which of many patterns a value matches.

    A set that cannot be built, or has no memory left for a value (it says so by matching nothing,
    not even what matches everything), is replaced by one pattern after another: slower, never
    another answer.
    """

    __slots__ = ("_always", "_literals", "_numbers", "_set", "_single")

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        self._always: list[int] = []
        self._literals: dict[bytes, list[int]] = {}
        self._single: list[tuple[int, Pattern]] = []
        for number, pattern in enumerate(patterns):
            if pattern.any:
                self._always.append(number)
            elif pattern.literal is not None:
                self._literals.setdefault(pattern.literal, []).append(number)
            elif not pattern.broken:
                self._single.append((number, pattern))
        self._numbers = [number for number, _ in self._single]
        self._set = _compiled([pattern.raw for _, pattern in self._single])

    def matches(self, value: bytes) -> list[int]:
        """Return the numbers of the patterns that the whole value matches, ascending."""
        found = [*self._always, *self._literals.get(value, ())]
        hits = (self._set.Match(value) or ()) if self._set is not None else ()
        last = len(self._numbers)
        if last in hits:
            found += [self._numbers[index] for index in hits if index < last]
        else:
            found += [number for number, pattern in self._single if pattern.accepts(value)]
        found.sort()
        return found


def _compiled(patterns: list[bytes]) -> "re2.Set | None":
    """Return one automaton for all; None if one pattern needs none, or all need too much memory."""
    if len(patterns) < 2:
        return None
    options = _options()
    options.max_mem = _SET_BYTES
    together = re2.Set.FullMatchSet(options)
    try:
        for pattern in (*patterns, _ANYTHING):
            together.Add(pattern)
        together.Compile()
    except re2.error:
        return None
    return together


def _options() -> "re2.Options":
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.log_errors = False
    return options


def _message(error: Exception) -> str:
    text = error.args[0] if error.args else error
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)
