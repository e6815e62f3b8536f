"""Connections that passed directly, may no longer, and say nothing.

Only a packet of a connection shows the numbers that a RST must have, and at an idle one none comes.
So after a snapshot that takes permissions away both ends of every such connection are asked for one
(`reset.questions`), a part of the table at a time. What they answer is a packet of a severed
connection as any other.

The kernel may still carry the answer of a flow that it was given, because its rules change when all
workers have the snapshot: such flows are asked again until one of their packets has come here.

Pure: `now` is monotonic seconds.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from math import inf
from typing import Final

from conntrack.entry import Entry
from conntrack.tcp_window import unpack
from firewall.datapath.pipeline import Pipeline, Resets
from firewall.datapath.reset import questions

BUDGET_COUNT: Final = 100
"""Entries looked at in one round: well under 1 ms."""

PAUSE_S: Final = 0.01
"""Between two rounds: 262,144 entries are passed in 26 s."""

DELAY_S: Final = 0.2
"""From the snapshot to the first question, and then doubled: the rules change after some 10 ms."""

ROUND_COUNT: Final = 6
"""Times that a flow which the kernel carries is asked, over 6 s."""


class Silence:
    """Has the ends of severed connections speak.

    Attributes:
        due_at: when the next round is due, infinity: nobody is to be asked.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.due_at = inf
        self._pipeline = pipeline
        self._waiting: Iterator[Entry] = iter(())
        self._again: list[Entry] = []
        self._left_count = 0
        self._delay_s = 0.0

    def begin(self, now: float) -> None:
        """Go over the whole table: permissions were taken away."""
        if self._pipeline.settings.resets is Resets.NONE:
            return
        self._again = []
        self._left_count = ROUND_COUNT
        self._delay_s = DELAY_S
        self._wait(self._pipeline.tracker.entries(), now)

    def _wait(self, entries: Iterable[Entry], now: float) -> None:
        """Go over these, later."""
        self._waiting = iter(entries)
        self._left_count -= 1
        self.due_at = now + self._delay_s
        self._delay_s *= 2

    def round(self, now: float) -> list[bytes]:
        """Return the next questions, as whole IP packets."""
        self.due_at = now + PAUSE_S  # also if what follows fails
        found: list[bytes] = []
        looked_at = 0
        for entry in islice(self._waiting, BUDGET_COUNT):
            looked_at += 1
            if entry.serial < 0 or not self._pipeline.sever(entry):
                continue
            windows = entry.windows if entry.packed is None else unpack(entry.packed)
            found += questions(entry.original, windows)
            if entry.offloaded:
                self._again.append(entry)
        if looked_at < BUDGET_COUNT:
            self.due_at = inf
            if self._again and self._left_count:
                again, self._again = self._again, []
                self._wait(again, now)
        return found
