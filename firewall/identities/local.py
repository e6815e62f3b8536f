"""Numbers that this node gives for itself: the label sets of CIDR and FQDN peers.

They never leave the node, so no store is asked and no other node waits. A released number keeps its
labels for a grace period, like a shared one: flow records and cached decisions may still name it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from conntrack.address import Prefix, format_prefix
from firewall.identities.labels import RESERVED, Label, LabelSet
from firewall.identities.reserved import LOCAL_MAX, LOCAL_MIN, Reserved, reserved_label

GRACE_S = 900.0
"""How long an unused number keeps its labels: 15 min (Cilium identity-gc-interval)."""

FQDN = "fqdn"
"""Source of the labels of addresses that DNS answered for a selected name."""

_LOCAL_SOURCES = frozenset({"cidr", FQDN, "cidrgroup", RESERVED})


class IdentityError(RuntimeError):
    """No number could be given, although the store answers."""


@dataclass(slots=True)
class Known:
    """A numbered label set; `unused_since` is monotonic seconds, set once nobody uses it."""

    labels: LabelSet
    refcount: int = 0
    unused_since: float | None = None


class LocalNumbers:
    """Numbers for label sets that only this node needs; no store involved.

    Args:
        low: the first number.
        high: the last number.
        grace_s: how long a released number waits before another label set may get it.
    """

    def __init__(
        self, low: int = LOCAL_MIN, high: int = LOCAL_MAX, grace_s: float = GRACE_S
    ) -> None:
        self._low = low
        self._high = high
        self._grace_s = grace_s
        self._next = low
        self._known: dict[int, Known] = {}
        self._numbers: dict[LabelSet, int] = {}

    def allocate(self, labels: LabelSet, *, preferred: int | None = None) -> int:
        """Return the number of a label set, taking one more reference to it.

        Args:
            labels: any label set.
            preferred: the number it had before a restart; taken if it is free.

        Raises:
            IdentityError: every number is taken.
        """
        number = self._numbers.get(labels)
        if number is None:
            number = self._free(preferred)
            self._known[number] = Known(labels)
            self._numbers[labels] = number
        known = self._known[number]
        known.refcount += 1
        known.unused_since = None
        return number

    def _free(self, preferred: int | None) -> int:
        wanted = preferred is not None and self._low <= preferred <= self._high
        if wanted and preferred is not None and preferred not in self._known:
            return preferred
        for _ in range(self._high - self._low + 1):
            number = self._next
            self._next = self._low if number == self._high else number + 1
            if number not in self._known:
                return number
        raise IdentityError(f"all local identities {self._low}-{self._high} are in use")

    def release(self, number: int) -> bool:
        """Give one reference back; say whether it was the last one."""
        known = self._known.get(number)
        if known is None or not known.refcount:
            raise IdentityError(f"identity {number} was released more often than allocated")
        known.refcount -= 1
        return not known.refcount

    def collect(self, now: float) -> tuple[int, ...]:
        """Forget the numbers that have been unused for the grace period; return them."""
        ended = []
        for number, known in self._known.items():
            if known.refcount:
                continue
            if known.unused_since is None:
                known.unused_since = now
            elif now - known.unused_since >= self._grace_s:
                ended.append(number)
        for number in ended:
            del self._numbers[self._known.pop(number).labels]
        return tuple(ended)

    def lookup(self, number: int) -> LabelSet | None:
        """Return the labels of a number."""
        known = self._known.get(number)
        return None if known is None else known.labels

    def refcount(self, number: int) -> int:
        """Return how many references a number has."""
        known = self._known.get(number)
        return 0 if known is None else known.refcount

    def items(self) -> Iterator[tuple[int, LabelSet]]:
        """Yield every number with its labels, ascending."""
        for number in sorted(self._known):
            yield number, self._known[number].labels


def is_local_set(labels: LabelSet) -> bool:
    """Say whether a label set is numbered by each node for itself (Cilium ScopeForLabels)."""
    return bool(labels) and all(label.source in _LOCAL_SOURCES for label in labels)


def prefix_labels(prefix: Prefix) -> LabelSet:
    """Return the labels of a prefix's identity; Cilium writes "-" for ":" in IPv6 ones."""
    text = format_prefix(prefix).replace(":", "-")
    return LabelSet([Label("cidr", text), reserved_label(Reserved.WORLD.label)])


@lru_cache(maxsize=4096)
def fqdn_labels(texts: tuple[str, ...]) -> LabelSet:
    """Return the labels of the addresses that these FQDN selectors mean."""
    return LabelSet([*(Label(FQDN, text) for text in texts), reserved_label(Reserved.WORLD.label)])
