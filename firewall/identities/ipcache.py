"""From an address to its identity: the longest prefix that is known wins.

`LongestPrefixMap` keeps one dictionary per family and prefix length, keyed by the network as an
integer without its host bits. A lookup tries the lengths that occur, longest first: with the few
lengths that real policies use this is a handful of dictionary hits, and the two families cannot
meet (an IPv4-mapped IPv6 address is an IPv6 address).
"""

from collections.abc import Iterator
from typing import Generic, TypeVar

from conntrack.address import Prefix

T = TypeVar("T")

_BITS = {4: 32, 16: 128}


class _Family(Generic[T]):
    """The prefixes of one family; `order` holds (shift, length, table), longest prefix first."""

    __slots__ = ("bits", "order", "size_bytes", "tables")

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.bits = _BITS[size_bytes]
        self.tables: dict[int, dict[int, T]] = {}
        self.order: tuple[tuple[int, int, dict[int, T]], ...] = ()

    def table(self, length: int) -> dict[int, T]:
        if length not in self.tables:
            self.tables[length] = {}
            self._reorder()
        return self.tables[length]

    def drop_table(self, length: int) -> None:
        del self.tables[length]
        self._reorder()

    def _reorder(self) -> None:
        lengths = sorted(self.tables, reverse=True)
        self.order = tuple((self.bits - n, n, self.tables[n]) for n in lengths)

    def copy(self) -> "_Family[T]":
        made: _Family[T] = _Family(self.size_bytes)
        made.tables = {length: table.copy() for length, table in self.tables.items()}
        made._reorder()
        return made

    def prefix(self, shift: int, length: int, key: int) -> Prefix:
        return Prefix((key << shift).to_bytes(self.size_bytes, "big"), length)


class LongestPrefixMap(Generic[T]):
    """A map from prefixes to values, asked by address. Values must not be None."""

    __slots__ = ("_ipv4", "_ipv6")

    def __init__(self) -> None:
        self._ipv4: _Family[T] = _Family(4)
        self._ipv6: _Family[T] = _Family(16)

    def copy(self) -> "LongestPrefixMap[T]":
        """Return a map with the same entries, to be changed on its own."""
        made: LongestPrefixMap[T] = LongestPrefixMap()
        made._ipv4, made._ipv6 = self._ipv4.copy(), self._ipv6.copy()
        return made

    def _family(self, network: bytes) -> _Family[T]:
        if len(network) == 4:
            return self._ipv4
        if len(network) == 16:
            return self._ipv6
        raise ValueError(f"an address has 4 or 16 bytes, not {len(network)}")

    def _place(self, prefix: Prefix) -> tuple[_Family[T], int]:
        family = self._family(prefix.network)
        if not 0 <= prefix.length <= family.bits:
            raise ValueError(f"prefix length {prefix.length} is outside 0-{family.bits}")
        return family, int.from_bytes(prefix.network, "big") >> (family.bits - prefix.length)

    def insert(self, prefix: Prefix, value: T) -> None:
        """Set the value of a prefix, replacing what was there; host bits are ignored.

        Raises:
            ValueError: the prefix is of no family, or longer than its address.
        """
        family, key = self._place(prefix)
        family.table(prefix.length)[key] = value

    def remove(self, prefix: Prefix) -> T | None:
        """Take a prefix out; return its value, None if it was not there."""
        family, key = self._place(prefix)
        table = family.tables.get(prefix.length)
        if table is None:
            return None
        value = table.pop(key, None)
        if not table:
            family.drop_table(prefix.length)
        return value

    def get(self, prefix: Prefix) -> T | None:
        """Return the value of exactly this prefix."""
        family, key = self._place(prefix)
        return family.tables.get(prefix.length, {}).get(key)

    def lookup(self, address: bytes) -> T | None:
        """Return the value of the longest prefix that holds the address, None if none does.

        Args:
            address: packed, 4 or 16 bytes, network order.
        """
        number = int.from_bytes(address, "big")
        for shift, _, table in self._family(address).order:
            value = table.get(number >> shift)
            if value is not None:
                return value
        return None

    def covering(self, prefix: Prefix) -> Iterator[tuple[Prefix, T]]:
        """Yield every entry whose prefix holds this one, itself included, longest first."""
        family, _ = self._place(prefix)
        number = int.from_bytes(prefix.network, "big")
        for shift, length, table in family.order:
            if length <= prefix.length and (value := table.get(number >> shift)) is not None:
                yield family.prefix(shift, length, number >> shift), value

    def __iter__(self) -> Iterator[tuple[Prefix, T]]:
        """Yield all entries: IPv4 first, then by length (longest first), then by address."""
        for family in (self._ipv4, self._ipv6):
            for shift, length, table in family.order:
                for key in sorted(table):
                    yield family.prefix(shift, length, key), table[key]

    def __len__(self) -> int:
        return sum(len(t) for f in (self._ipv4, self._ipv6) for t in f.tables.values())
