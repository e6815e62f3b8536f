"""The last published snapshots, so that a flow is explained by the policy that decided it.

Snapshots share their rows, so keeping some costs little. A flow names the policy revision that
decided it; of the snapshots with that revision (endpoints and identities change too) the one that
was in force at the flow's time is meant.
"""

from collections import deque
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from firewall.policy.model import Peer
from firewall.policy.snapshot import Snapshot
from firewall.policy.view import View

KEPT_COUNT = 32
"""Snapshots kept; at 5,000 identities each adds some 200 kB of its own."""

_VIEWS_COUNT = 4  # views made of them, some MB each at 5,000 identities


class Past(NamedTuple):
    """One snapshot: since when (wall clock), and what its selector numbers mean."""

    since_ns: int
    snapshot: Snapshot
    selectors: Mapping[int, Peer]


class History:
    """The newest snapshots in the order of their publication."""

    def __init__(self, kept_count: int = KEPT_COUNT) -> None:
        self._kept: deque[Past] = deque(maxlen=kept_count)
        self._view = lru_cache(maxsize=_VIEWS_COUNT)(self._make_view)

    def note(self, snapshot: Snapshot, selectors: Mapping[int, Peer], now_ns: int) -> None:
        """Keep a snapshot that comes into force."""
        last = self._kept[-1] if self._kept else None
        if last is not None and last.selectors == selectors:
            selectors = last.selectors
        self._kept.append(Past(now_ns, snapshot, selectors))

    def latest(self) -> Past | None:
        """Return the snapshot in force, None before the first one."""
        return self._kept[-1] if self._kept else None

    def at(self, policy_revision: int, time_ns: int) -> Past | None:
        """Return the snapshot that decided a flow, None if it is kept no more.

        Args:
            policy_revision: as the flow names it, 0 = it does not: then the time alone counts.
            time_ns: wall clock of the decision.
        """
        fitting = [
            past for past in self._kept if policy_revision in (0, past.snapshot.policy_revision)
        ]
        before = [past for past in fitting if past.since_ns <= time_ns]
        if before:
            return before[-1]
        # The workers' clock may be read a moment before ours; without a revision that is a guess.
        return fitting[0] if fitting and policy_revision else None

    def view(self, past: Past) -> View:
        """Return a view of a kept snapshot."""
        return self._view(past.snapshot.revision)

    def _make_view(self, revision: int) -> View:
        return View(next(p.snapshot for p in self._kept if p.snapshot.revision == revision))
