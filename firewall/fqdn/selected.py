"""Which FQDN selectors mean an address, kept up to date change by change. Pure.

An address carries the label `fqdn:<selector>` for every selector that means one of its names
(Cilium's scheme since 1.16: one identity per set of labels, not per address). A new address asks
the selectors about its names only, a new selector asks the names only; nothing is done twice.
"""

from collections.abc import Iterable

from firewall.fqdn.cache import NameCache
from firewall.policy.name_match import NameMatcher


class SelectedNames:
    """The selectors of each name that leads somewhere.

    Args:
        cache: what DNS answered.
    """

    def __init__(self, cache: NameCache) -> None:
        self._cache = cache
        self._matchers: dict[str, NameMatcher] = {}
        self._texts: dict[str, tuple[str, ...]] = {}

    def select(self, texts: Iterable[str]) -> bool:
        """Know exactly these selectors from now on; say whether they are others than before."""
        wanted = set(texts)
        if wanted == self._matchers.keys():
            return False
        self._matchers = {
            text: self._matchers.get(text) or NameMatcher((text,)) for text in sorted(wanted)
        }
        self._texts.clear()
        return True

    def texts(self, address: bytes) -> tuple[str, ...]:
        """Return the selectors that mean one of an address's names, ascending."""
        found: set[str] = set()
        for name in self._cache.names(address):
            found.update(self.of_name(name))
        return tuple(sorted(found))

    def of_name(self, name: str) -> tuple[str, ...]:
        """Return the selectors that mean a name."""
        found = self._texts.get(name)
        if found is None:
            if len(self._texts) > _NAMES:
                self._texts.clear()
            found = self._texts[name] = tuple(
                text for text, matcher in self._matchers.items() if matcher.matches(name)
            )
        return found


_NAMES = 65_536  # names whose selectors are remembered
