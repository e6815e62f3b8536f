"""From an address to its identity: the longest prefix that is known wins.

`LongestPrefixMap` keeps one dictionary per family and prefix length, keyed by the network as an
integer without its host bits. A lookup tries the lengths that occur, longest first: with the few
lengths that real policies use this is a handful of dictionary hits, and the two families cannot
meet (an IPv4-mapped IPv6 address is an IPv6 address).

`Ipcache` decides between several sources that speak about one prefix. Cilium keeps one entry and
lets only an equal or stronger source overwrite it (pkg/source); here every source keeps what it
said and the strongest one counts, so that the weaker one comes back when the stronger one leaves.
"""

from collections.abc import Iterator
from enum import IntEnum
from typing import Generic, NamedTuple, TypeVar

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


class Source(IntEnum):
    """Who says which identity an address has; the higher number wins (Cilium pkg/source)."""

    UNSPEC = 0
    RESTORED = 1
    GENERATED = 2
    API = 3
    DIRECTORY = 4
    CLUSTERMESH = 5
    K8S = 6
    CUSTOM_RESOURCE = 7
    KVSTORE = 8
    LOCAL = 9
    KUBE_APISERVER = 10

    @property
    def word(self) -> str:
        """The source as Cilium writes it: "kube-apiserver"."""
        return self.name.lower().replace("_", "-")


class IpcacheEntry(NamedTuple):
    """What counts for a prefix, and who said it."""

    identity: int
    source: Source


class Ipcache:
    """Prefix to identity number, from several sources."""

    __slots__ = ("_effective", "_said")

    def __init__(self) -> None:
        self._said: dict[Prefix, dict[Source, int]] = {}
        self._effective: LongestPrefixMap[IpcacheEntry] = LongestPrefixMap()

    def upsert(self, prefix: Prefix, identity: int, source: Source) -> bool:
        """Note what a source says; return whether what counts for the prefix has changed."""
        self._said.setdefault(prefix, {})[source] = identity
        return self._settle(prefix)

    def remove(self, prefix: Prefix, source: Source) -> bool:
        """Forget what a source said; return whether what counts for the prefix has changed."""
        said = self._said.get(prefix)
        if said is None or said.pop(source, None) is None:
            return False
        if not said:
            del self._said[prefix]
        return self._settle(prefix)

    def remove_source(self, source: Source) -> tuple[Prefix, ...]:
        """Forget everything a source said; return the prefixes for which something changed."""
        named = [prefix for prefix, said in self._said.items() if source in said]
        return tuple(prefix for prefix in named if self.remove(prefix, source))

    def _settle(self, prefix: Prefix) -> bool:
        before = self._effective.get(prefix)
        said = self._said.get(prefix)
        if not said:
            self._effective.remove(prefix)
            return before is not None
        strongest = max(said)
        now = IpcacheEntry(said[strongest], strongest)
        self._effective.insert(prefix, now)
        return before is None or before.identity != now.identity

    def lookup(self, address: bytes) -> int | None:
        """Return the identity of an address, None if no prefix holds it (then it is world)."""
        entry = self._effective.lookup(address)
        return None if entry is None else entry.identity

    def get(self, prefix: Prefix) -> IpcacheEntry | None:
        """Return what counts for exactly this prefix."""
        return self._effective.get(prefix)

    def __iter__(self) -> Iterator[tuple[Prefix, IpcacheEntry]]:
        return iter(self._effective)

    def __len__(self) -> int:
        return len(self._effective)
