"""When files of secrets are to be read again: they have changed, and are not being written.

A certificate and its key are seldom replaced in one step, and half of a pair serves nobody. So a
change counts when two looks, `LOOK_S` apart, have seen the same of it.
"""

from collections.abc import Callable

LOOK_S = 2.0
"""Between two looks. A look costs one stat(2) for each file that rules in force have asked for."""

News = tuple[object, ...]
"""What differs from what was read, each with its state now; empty: nothing does."""


class Renewal:
    """Asks for news from time to time.

    Args:
        look: tells what differs now.
    """

    __slots__ = ("_look", "_looks_at", "_news")

    def __init__(self, look: Callable[[], News]) -> None:
        self._look = look
        self._looks_at = 0.0
        self._news: News = ()

    def due(self, now: float) -> bool:
        """Whether to read again; `now` is monotonic seconds."""
        if now < self._looks_at:
            return False
        self._looks_at = now + LOOK_S
        before, self._news = self._news, self._look()
        return bool(self._news) and self._news == before
