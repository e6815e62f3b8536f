"""Identity numbers for the prefixes of rules, the same after a restart.

Each prefix that a rule names gets a node-local identity with the labels `cidr:<prefix>` and
`reserved:world`. The numbers are persisted: workers that outlived the agent, and flow records, know
them. A file that cannot be read costs nothing but the numbers, so it is only reported.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from conntrack.address import Prefix, format_prefix, parse_prefix
from firewall.agent import statefile
from firewall.control.journal import fields
from firewall.identities.local import prefix_labels
from firewall.identities.registry import LocalNumbers

_FILE = "prefixes"

log = logging.getLogger(__name__)


class PrefixNumbers:
    """The prefixes that have a number now; each holds one reference."""

    def __init__(self, state_dir: Path, local: LocalNumbers) -> None:
        self._path = state_dir / _FILE
        self._local = local
        self._numbers: dict[Prefix, int] = {}
        self._before: dict[Prefix, int] = {}
        self._followed: set[Prefix] | None = None

    def restore(self) -> None:
        """Read which number each prefix had."""
        try:
            stored = statefile.read(self._path, "prefixes", dict[str, int])
            self._before = {parse_prefix(text): n for text, n in (stored or {}).items()}
        except (statefile.StateError, ValueError) as error:
            aside = self._path.with_name(f"{_FILE}.unusable")
            self._path.rename(aside)
            log.warning("prefixes are numbered anew", extra=fields(error=error, kept=aside))

    def follow(self, prefixes: set[Prefix]) -> bool:
        """Number exactly these; return whether anything changed.

        A set that was followed last must not have been changed since.

        Raises:
            IdentityError: every local number is taken.
            OSError: the numbers could not be persisted.
        """
        if prefixes is self._followed:
            return False
        gone = self._numbers.keys() - prefixes
        fresh = prefixes - self._numbers.keys()
        for prefix in gone:
            self._local.release(self._numbers.pop(prefix))
        for prefix in sorted(fresh):
            self._numbers[prefix] = self._local.allocate(
                prefix_labels(prefix), preferred=self._before.get(prefix)
            )
        if gone or fresh:
            self._before = dict(self._numbers)
            rows = {format_prefix(prefix): number for prefix, number in sorted(self.items())}
            statefile.write(self._path, "prefixes", rows)
        self._followed = prefixes
        return bool(gone or fresh)

    def items(self) -> Iterator[tuple[Prefix, int]]:
        """Yield every prefix with its number."""
        return iter(self._numbers.items())
