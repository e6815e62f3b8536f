"""A table of the snapshot of which few rows change at a time."""

from typing import Generic, TypeVar

from firewall.policy.difference import PrefixKey

K = TypeVar("K", int, PrefixKey)
R = TypeVar("R")


class Rows(Generic[K, R]):
    """Rows by key. Those that are put again as they were stay the same objects."""

    __slots__ = ("_changed", "_rows", "_table", "_unordered")

    def __init__(self) -> None:
        self._rows: dict[K, R] = {}
        self._table: tuple[R, ...] = ()
        self._changed = False
        self._unordered = False

    def put(self, key: K, row: R) -> None:
        """Add a row, or replace the one with this key."""
        before = self._rows.get(key)
        if before is None:
            self._unordered = True
        if before != row:
            self._rows[key] = row
            self._changed = True

    def drop(self, key: K) -> None:
        """Take the row with this key out, if there is one."""
        if self._rows.pop(key, None) is not None:
            self._changed = True

    def table(self) -> tuple[R, ...]:
        """Return all rows in the order of their keys, the same tuple until one changes."""
        if self._unordered:
            self._rows = {key: self._rows[key] for key in sorted(self._rows)}
        if self._changed:
            self._table = tuple(self._rows.values())
        self._changed = self._unordered = False
        return self._table
