"""How full the kernel's own table of flows is, and what it has lost.

Every flow that passes has an entry there, and what finds it full is dropped before any worker sees
it ("nf_conntrack: table full, dropping packet").
"""

from pathlib import Path
from typing import NamedTuple

_STATISTICS = Path("/proc/self/net/stat/nf_conntrack")
_SETTINGS = Path("/proc/sys/net/netfilter")

FULL = 0.95
"""Share of the limit from which on the kernel gives up flows early (nf_conntrack_core.c, gc)."""


class TableCounters(NamedTuple):
    """The kernel's table of this network namespace.

    Attributes:
        entries: flows in it now.
        limit: how many fit; one number for all namespaces.
        dropped: packets that found no room.
        early_dropped: flows that left for newer ones.
        clashed: packets that came second to confirm the flow that another had confirmed.
    """

    entries: int
    limit: int
    dropped: int
    early_dropped: int
    clashed: int

    @property
    def is_full(self) -> bool:
        """Whether newcomers find no room, or nearly."""
        return self.entries >= FULL * self.limit


def read_table(statistics: Path = _STATISTICS, settings: Path = _SETTINGS) -> TableCounters | None:
    """Return the counters; None where the kernel does not show them.

    The statistics have a row of hexadecimal numbers for each processor, under one row of names.
    """
    try:
        names, *rows = (line.split() for line in statistics.read_text("ascii").splitlines())
        entries, limit = (
            int((settings / f"nf_conntrack_{name}").read_text("ascii")) for name in ("count", "max")
        )
        columns = [names.index(name) for name in ("drop", "early_drop", "insert_failed")]
        sums = [sum(int(row[column], 16) for row in rows) for column in columns]
    except (OSError, ValueError, IndexError):
        return None
    return TableCounters(entries, limit, *sums)
