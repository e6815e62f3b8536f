"""Lessons that need not be told again: the agent says that every worker enforces them. Pure.

An address is remembered with the end of the life that was confirmed, whatever else its name leads
to: clients ask for A and AAAA in turn, and servers answer with other addresses each time.
"""

from l7proxy.dns_desk import Lesson

ADDRESS_COUNT = 32_768
"""Addresses that are remembered, about 7 MB; a full table is forgotten."""

_SLACK_S = 1.0  # a TTL is whole seconds: the same answer from a cache differs by less


class Confirmed:
    """What was confirmed since `clear`."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, str, bytes], float] = {}

    def add(self, lesson: Lesson, expires_at: float) -> None:
        """Remember a lesson that counts until then, monotonic seconds."""
        if len(self._ends) + len(lesson.addresses) > ADDRESS_COUNT:
            self._ends.clear()
        for address in lesson.addresses:
            self._ends[lesson.endpoint, lesson.name, address] = expires_at

    def has(self, lesson: Lesson, expires_at: float) -> bool:
        """Say whether all of a lesson was confirmed, for as long."""
        least = expires_at - _SLACK_S
        return all(
            self._ends.get((lesson.endpoint, lesson.name, address), 0.0) >= least
            for address in lesson.addresses
        )

    def clear(self) -> None:
        """Forget everything: what is in force may have changed."""
        self._ends.clear()
