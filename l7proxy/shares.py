"""How many of something there may be at a time, for all sources and for each. Pure."""

from collections import Counter


class Shares:
    """Counts what the sources have now.

    Args:
        most: of all sources together.
        most_of_one: of one source.

    Attributes:
        count: what there is now.
    """

    __slots__ = ("_by_source", "_most", "_most_of_one", "count")

    def __init__(self, most: int, most_of_one: int) -> None:
        self._most = most
        self._most_of_one = most_of_one
        self._by_source: Counter[bytes] = Counter()
        self.count = 0

    def has_room(self, source: bytes) -> bool:
        """Say whether a source, a packed address, may have one more."""
        return self.count < self._most and self._by_source[source] < self._most_of_one

    def add(self, source: bytes) -> None:
        """Count one more, whether there is room or not."""
        self.count += 1
        self._by_source[source] += 1

    def take(self, source: bytes) -> bool:
        """Count one more if there is room; say whether there was."""
        room = self.has_room(source)
        if room:
            self.add(source)
        return room

    def give_back(self, source: bytes) -> None:
        """Count one less of what was counted."""
        self.count -= 1
        self._by_source[source] -= 1
        if not self._by_source[source]:
            del self._by_source[source]
