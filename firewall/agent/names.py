"""The names that DNS answered: learnt from the proxy, labelled for policy, kept over restarts.

A lesson changes the cache; the labels of the addresses it touched are worked out at the next
publication, and only theirs. Each set of labels has one node-local identity. The file is written
before a held answer goes out, so that neither a crash nor `kill -9` forgets what a client was told.

A file that cannot be read is kept aside and reported: what was in it must be asked for again, and
until then less is allowed, not more.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from conntrack.address import Prefix, format_address, parse_address
from firewall.agent import statefile
from firewall.agent.precache import PrecacheError, read_precache
from firewall.control.journal import fields
from firewall.fqdn.cache import Bounds, Connection, Entry, NameCache
from firewall.fqdn.reach import Reach
from firewall.fqdn.selected import SelectedNames
from firewall.identities.labels import LabelSet
from firewall.identities.local import LocalNumbers, fqdn_labels
from firewall.policy.name_match import NameMatcher

_FILE = "names"

log = logging.getLogger(__name__)


class StoredName(msgspec.Struct, omit_defaults=True):
    """An entry of the cache as it is persisted; times are wall-clock seconds."""

    endpoint: int
    name: str
    address: str
    ttl_s: int
    expires_at: float
    zombie_since: float | None = None
    connected_at: float = 0.0


class StoredNames(msgspec.Struct):
    """The file: entries, and the number of each set of selectors."""

    entries: list[StoredName]
    numbers: dict[str, int]


class NameBook:
    """What DNS answered, and the identities that follow from it.

    Args:
        state_dir: where it is persisted.
        local: gives numbers.
        bounds: how much is kept and how long.

    Attributes:
        cache: names and addresses.
        urgent: an address or who knows it is new and not in the file yet; a longer life can wait.
        problem: what is wrong with the file, "" = nothing.
    """

    def __init__(self, state_dir: Path, local: LocalNumbers, bounds: Bounds) -> None:
        self.cache = NameCache(bounds)
        self.problem = ""
        self.urgent = False
        self.refused: dict[bytes, str] = {}
        self._path = state_dir / _FILE
        self._local = local
        self._selected = SelectedNames(self.cache)
        self._reach: Reach | None = None
        self._numbers: dict[bytes, int] = {}
        self._texts: dict[bytes, tuple[str, ...]] = {}
        self._before: dict[str, int] = {}
        self._dirty = False
        self._writing = asyncio.Lock()

    # --- what is known ------------------------------------------------------------------------

    def learn(self, endpoint: int, name: str, addresses: Iterable[bytes], ttl_s: int) -> bool:
        """Note an answer; say whether a label may have changed, and so a snapshot is due."""
        if self.cache.learn(endpoint, name, addresses, ttl_s, time.time()):
            self._dirty = True
        if self.cache.changed:
            self.urgent = True
        return bool(self.cache.changed)

    def forget_endpoint(self, endpoint: int) -> None:
        """Forget what an endpoint learnt."""
        self.cache.forget_endpoint(endpoint)
        self._dirty = True

    def forget(self, pattern: str, endpoint: int | None = None) -> int:
        """Forget the names that a pattern means; return how many entries went."""
        entries = list(self.find(pattern, endpoint))
        self.cache.forget(entries)
        self._dirty |= bool(entries)
        return len(entries)

    def find(self, pattern: str, endpoint: int | None = None) -> Iterator[Entry]:
        """Yield the entries whose name a pattern means ("" = all), of one endpoint or all."""
        matcher = NameMatcher((pattern,)) if pattern else None
        for entry in self.cache.entries():
            if endpoint not in (None, entry.endpoint):
                continue
            if matcher is None or matcher.matches(entry.name):
                yield entry

    def collect(self, alive: set[Connection], now: float) -> int:
        """Forget what has expired and is not in use; return how many entries went."""
        gone = self.cache.collect(alive, now)
        self._dirty |= bool(gone)
        return gone

    def names(self, address: bytes) -> tuple[str, ...]:
        """Return the names of an address without their trailing dot, as Hubble shows them."""
        return tuple(name.removesuffix(".") or name for name in self.cache.names(address))

    def addresses(self) -> dict[str, tuple[bytes, ...]]:
        """Return the addresses of every name."""
        found: dict[str, set[bytes]] = {}
        for entry in self.cache.entries():
            found.setdefault(entry.name, set()).add(entry.address)
        return {name: tuple(sorted(held, key=len)) for name, held in found.items()}

    # --- what follows from it -----------------------------------------------------------------

    def follow(self, texts: Iterable[str], reach: Reach) -> None:
        """Bring the identities of addresses in line with selectors and cache.

        Args:
            texts: the FQDN selectors of all rules.
            reach: which addresses names may lead to; the same object again if nothing changed.

        Raises:
            IdentityError: every local number is taken.
        """
        everything = self._selected.select(texts) or reach is not self._reach
        self._reach = reach
        touched = (
            {*self.cache.addresses(), *self._numbers} if everything else set(self.cache.changed)
        )
        for address in touched:
            self._relabel(address, reach)
        self.cache.changed.clear()

    def _relabel(self, address: bytes, reach: Reach) -> None:
        texts = self._selected.texts(address)
        refusal = reach.refusal(address) if texts else ""
        if refusal:
            if address not in self.refused:
                log.warning(
                    "no name leads inside",
                    extra=fields(
                        address=format_address(address),
                        names=",".join(self.names(address)),
                        reason=refusal,
                    ),
                )
            self.refused[address] = refusal
            texts = ()
        else:
            self.refused.pop(address, None)
        if texts == self._texts.get(address, ()):
            return
        old = self._numbers.pop(address, None)
        self._texts.pop(address, None)
        if texts:
            labels = fqdn_labels(texts)
            preferred = self._before.get(_key(labels))
            self._numbers[address] = self._local.allocate(labels, preferred=preferred)
            self._texts[address] = texts
        if old is not None:
            self._local.release(old)

    def items(self) -> Iterator[tuple[Prefix, int]]:
        """Yield every address that selectors mean, with its identity."""
        for address, number in self._numbers.items():
            yield Prefix(address, 8 * len(address)), number

    def sights(self) -> Iterator[tuple[int, bytes, tuple[str, ...]]]:
        """Yield for every endpoint and address the selectors that mean a name it was told."""
        found: dict[tuple[int, bytes], set[str]] = {}
        for entry in self.cache.entries():
            if entry.address in self._numbers:
                texts = found.setdefault((entry.endpoint, entry.address), set())
                texts.update(self._selected.of_name(entry.name))
        for (endpoint, address), texts in found.items():
            yield endpoint, address, tuple(sorted(texts))

    def texts(self, address: bytes) -> tuple[str, ...]:
        """Return the selectors that mean an address."""
        return self._texts.get(address, ())

    def of_name(self, name: str) -> tuple[str, ...]:
        """Return the selectors that mean a name."""
        return self._selected.of_name(name)

    # --- the file -----------------------------------------------------------------------------

    def restore(self) -> None:
        """Read what an earlier life knew; a file that cannot be used is kept aside."""
        try:
            stored = statefile.read(self._path, "names", StoredNames)
            entries = [_entry(row) for row in stored.entries] if stored is not None else []
        except (statefile.StateError, ValueError) as error:
            aside = self._path.with_name(f"{_FILE}.unusable")
            self._path.rename(aside)
            self.problem = f"{error}; kept as {aside.name}, names are learnt anew"
            log.error("names are learnt anew", extra=fields(error=error, kept=aside))  # noqa: TRY400 - the text says it all
            return
        if stored is not None:
            self._before = stored.numbers
            self.cache.restore(entries)

    def preload(self, path: Path) -> None:
        """Take over the answers of a file; one that cannot be used is reported, not taken."""
        try:
            self.cache.restore(read_precache(path.read_text(encoding="utf-8"), time.time()))
        except (OSError, UnicodeDecodeError, PrecacheError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            self.problem = f"{path}: {said}; names are learnt as they are asked for"
            log.error(  # noqa: TRY400 - the user's mistake, and the text names it
                "fqdn.pre_cache is not used", extra=fields(file=path, error=said)
            )

    async def save(self) -> None:
        """Write the file if something changed since it was written.

        Raises:
            OSError: the disk refuses.
        """
        async with self._writing:
            if not self._dirty:
                return
            self._dirty = self.urgent = False
            value = StoredNames(list(map(_stored, self.cache.entries())), self._numbered())
            try:
                await asyncio.to_thread(statefile.write, self._path, "names", value)
            except OSError:
                self._dirty = self.urgent = True
                raise

    def _numbered(self) -> dict[str, int]:
        return {
            _key(fqdn_labels(texts)): self._numbers[address]
            for address, texts in self._texts.items()
        }


def _key(labels: LabelSet) -> str:
    return ";".join(labels.strings())


def _entry(row: StoredName) -> Entry:
    return Entry(
        row.endpoint,
        row.name,
        parse_address(row.address),
        row.ttl_s,
        row.expires_at,
        row.zombie_since,
        row.connected_at,
    )


def _stored(entry: Entry) -> StoredName:
    return StoredName(
        entry.endpoint,
        entry.name,
        format_address(entry.address),
        entry.ttl_s,
        entry.expires_at,
        entry.zombie_since,
        entry.connected_at,
    )
