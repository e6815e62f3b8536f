"""Which files are tests, and which of their checks are meant."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from firewall.policy.files import files_of
from policytest.case import Check, Step
from policytest.report import title_of

_MARK = re.compile(rb"""^\s*["']?kind["']?\s*:\s*["']?PolicyTest\b""", re.MULTILINE)


def files_meant(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the test files that are meant: files as given, of folders those that say they are."""
    for path in paths:
        if path.is_dir():
            yield from (file for file in files_of(path) if _MARK.search(file.read_bytes()))
        else:
            yield path


def filtered(patterns: Sequence[str]) -> Callable[[Step, Check], bool]:
    """Return the choice that `--filter` makes: checks whose title holds one of the texts.

    A title is `step: x/a -> x/b 80/TCP GET /`; `*` in a pattern stands for any text.
    """
    if not patterns:
        return lambda _step, _check: True
    parts = "|".join(".*".join(map(re.escape, pattern.split("*"))) for pattern in patterns)
    wanted = re.compile(parts, re.DOTALL)
    return lambda step, check: wanted.search(title_of(step.name, check)) is not None
