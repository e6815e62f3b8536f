"""When and how much of a tracker's table is swept: dead flows leave, and no packet waits for it.

Each round is bounded. Rounds follow each other slowly while there is little to do, and ten times as
often while many flows are dead: what is dead takes room, and holds the place of its source.

Pure: `now` is monotonic seconds.
"""

from typing import Final

from conntrack.tracker import Tracker

BUDGET_COUNT: Final = 1000
"""Entries examined per round: well under 1 ms; 262,144 entries are passed in 26 s."""

PAUSE_S: Final = 0.1
"""Between two rounds."""

BEHIND_PAUSE_S: Final = 0.01
"""The same while many entries are dead: 5,000 of them leave in a second, a tenth of its time."""

MANY_COUNT: Final = 25
"""Entries removed in one round from which on many are dead: half of its budget."""

LAG_S: Final = 60.0
"""How long the worst lag is shown: longer than most scrapers' interval."""


class Sweep:
    """Expires a tracker's flows, a part at a time.

    Attributes:
        due_at: when the next round is due.
        pause_s: between the last round and the next.
        lag_s: by how much the latest entry of the last `LAG_S` was removed too late.
    """

    def __init__(self, tracker: Tracker, now: float) -> None:
        self._tracker = tracker
        self.due_at = now
        self.pause_s = PAUSE_S
        self.lag_s = 0.0
        self._lag_at = now

    def round(self, now: float) -> bool:
        """Remove some of what is dead; return whether many were."""
        tracker = self._tracker
        self.due_at = now + PAUSE_S  # also if what follows fails
        many = tracker.expire(now, budget=BUDGET_COUNT) >= MANY_COUNT
        self.pause_s = BEHIND_PAUSE_S if many else PAUSE_S
        self.due_at = now + self.pause_s
        if tracker.counters.lag_s >= self.lag_s or now >= self._lag_at + LAG_S:
            self.lag_s, self._lag_at = tracker.counters.lag_s, now
        return many
