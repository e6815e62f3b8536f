"""Problems: what is wrong with something a person wrote, and where."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, Self

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One finding about a policy file.

    `line` and `column` count from 1, 0 = unknown. `path` is the place inside the object
    ("spec.ingress[0].toPorts"), empty for the whole object. An error refuses the object.
    """

    severity: Severity
    file: str
    line: int
    column: int
    path: str
    message: str

    @classmethod
    def error(cls, file: str, line: int, column: int, path: str, message: str) -> Self:
        """Make the kind that refuses its object."""
        return cls(
            severity="error", file=file, line=line, column=column, path=path, message=message
        )

    @classmethod
    def warning(cls, file: str, line: int, column: int, path: str, message: str) -> Self:
        """Make the kind that is only told."""
        return cls(
            severity="warning", file=file, line=line, column=column, path=path, message=message
        )

    def __str__(self) -> str:
        """Render as `file:line:column: path: message`, as compilers do; an unknown line is not."""
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return ": ".join(part for part in (place, self.path, self.message) if part)


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return `; did you mean "x"?` for the nearest of the candidates, or nothing.

    Args:
        word: what was written.
        candidates: the words that exist.
    """
    by_fold = {name.casefold(): name for name in candidates}
    found = get_close_matches(word.casefold(), by_fold, n=1, cutoff=0.6)
    return f'; did you mean "{by_fold[found[0]]}"?' if found else ""
