"""Which numbers of the resolver's tables are in use, counted as entries come and go.

A number may be freed when the last entry that uses it is gone. Counting costs what changes; looking
through every row would cost what exists. Rows that a contradiction keeps alive (see
`firewall.policy.resolve`) may use numbers of entries that are gone: what they hold stays doubtful
and is asked about again.
"""

from collections import Counter
from typing import NamedTuple

from firewall.policy.compile import CompiledEntry
from firewall.policy.snapshot import PolicyRow


class Unused(NamedTuple):
    """Numbers to be freed, by table."""

    origins: set[int]
    l7: set[int]
    selectors: set[int]
    subjects: set[int]


class Uses:
    """How many entries use each number, and which numbers have lost a use since the last look.

    Attributes:
        counts: uses by number, for each table in the order of `Unused`.
    """

    def __init__(self) -> None:
        self.counts: tuple[Counter[int], ...] = tuple(Counter() for _ in Unused._fields)
        self._doubtful = Unused(set(), set(), set(), set())

    @property
    def doubtful(self) -> bool:
        """Whether `unused` may find anything."""
        return any(self._doubtful)

    def take(self, compiled: CompiledEntry) -> None:
        """Count an entry."""
        for count, numbers in zip(self.counts, _numbers(compiled), strict=True):
            count.update(numbers)

    def take_row(self, row: PolicyRow) -> None:
        """Count the rows of an identity's policy."""
        origins, l7, selectors, _ = self.counts
        for direction in (row.ingress, row.egress):
            origins.update(direction.isolated_by)
            origins.update(entry.origin for entry in direction.entries)
            l7.update(entry.l7 for entry in direction.entries)
            selectors.update(entry.selector for entry in direction.entries)

    def drop(self, compiled: CompiledEntry) -> None:
        """Count an entry no more."""
        for count, numbers, doubtful in zip(
            self.counts, _numbers(compiled), self._doubtful, strict=True
        ):
            count.subtract(numbers)
            for number in numbers:
                if not count[number]:
                    del count[number]
                    doubtful.add(number)

    def unused(self, kept: "Uses") -> Unused:
        """Return what nobody uses, `kept` neither, and forget about it."""
        found = []
        for count, other, doubtful in zip(self.counts, kept.counts, self._doubtful, strict=True):
            doubtful.difference_update([number for number in doubtful if number in count])
            free = {number for number in doubtful if number not in other}
            doubtful.difference_update(free)
            found.append(free)
        return Unused(*found)


def _numbers(compiled: CompiledEntry) -> Unused:
    """Return what an entry uses; 0 and -1 stand for no number."""
    return Unused(
        origins={compiled.origin},
        l7={row.l7 for row in compiled.rows} - {-1},
        selectors={row.selector for row in compiled.rows} - {0},
        subjects={compiled.subject},
    )
