"""Who leaves: the chains and buckets against the obvious search through everything."""

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from conntrack.chain import Chain, Link
from conntrack.entry import Entry
from conntrack.eviction import Limits, Rank, source_of
from conntrack.flow import TCP, UDP
from conntrack.tcp_states import TcpState

ASSURED_STATES = (TcpState.ESTABLISHED, TcpState.FIN_WAIT, TcpState.TIME_WAIT)
RANKS = tuple(rank for rank in Rank if rank >= 0)


def entry_of(source: int, number: int) -> Entry:
    key = bytes((10, 0, 0, source, 10, 0, 0, 99, number >> 8, number & 255, 0, 80))
    entry = Entry(key, TCP, float(number))
    entry.state = TcpState.SYN_SENT
    return entry


class Obvious:
    """Everything in one list, in the order in which entries came to their rank."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def victims(self) -> list[Entry]:
        """Whoever may leave next: the oldest of any source with the most in the first rank."""
        for rank in RANKS:
            here = [entry for entry in self.entries if entry.rank == rank]
            if here:
                counts = Counter(source_of(entry.key) for entry in here)
                most = max(counts.values())
                return [self.oldest(here, source) for source, n in counts.items() if n == most]
        return []

    @staticmethod
    def oldest(entries: list[Entry], source: bytes) -> Entry:
        return next(entry for entry in entries if source_of(entry.key) == source)

    def moved(self, entry: Entry) -> None:
        self.entries.remove(entry)
        self.entries.append(entry)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_victim_is_the_oldest_of_who_has_the_most(data: Any) -> None:
    """Insertions, changes of rank and removals in any order."""
    limits, obvious = Limits(1000, 3), Obvious()
    for number in range(data.draw(st.integers(1, 60))):
        present = obvious.entries
        match data.draw(st.sampled_from("iiiirrx" if present else "i")):
            case "i":
                entry = entry_of(data.draw(st.integers(1, 4)), number)
                limits.inserted(entry)
                present.append(entry)
            case "r":
                entry = data.draw(st.sampled_from(present))
                before = entry.rank
                entry.assured, entry.state = True, data.draw(st.sampled_from(ASSURED_STATES))
                limits.ranked(entry)
                if entry.rank != before:
                    obvious.moved(entry)
            case _:
                entry = data.draw(st.sampled_from(present))
                limits.removed(entry)
                present.remove(entry)
        victim, victims = limits.victim(), obvious.victims()
        assert (victim in victims) if victims else victim is None
        for source in range(1, 5):
            key = entry_of(source, 0).key
            mine = [entry for entry in present if source_of(entry.key) == source_of(key)]
            assert limits.is_crowding(key) == (len(mine) >= 3)
            best = min((entry.rank for entry in mine if entry.rank >= 0), default=None)
            own = limits.own_victim(key)
            expected = next((entry for entry in mine if entry.rank == best), None)
            assert own is expected


def test_among_equals_the_oldest_leaves() -> None:
    """A source that once had two is not worse off than one that has always had one."""
    limits = Limits(10, None)
    first, second, third = entry_of(1, 1), entry_of(1, 2), entry_of(2, 3)
    for entry in (first, second, third):
        limits.inserted(entry)
    limits.removed(first)
    assert limits.victim() is second
    limits.removed(second)
    assert limits.victim() is third


def test_what_has_no_states_is_kept_once_assured() -> None:
    """A stream of datagrams is never closed."""
    limits = Limits(10, None)
    entry = Entry(entry_of(1, 1).key + b"\x11", UDP, 0.0)
    limits.inserted(entry)
    assert limits.victim() is entry
    entry.assured = True
    limits.ranked(entry)
    assert limits.victim() is None


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40))
def test_a_chain_is_a_list_that_anything_can_leave(steps: list[int]) -> None:
    """Appending and taking, compared with a list."""
    chain, plain = Chain(), []
    links = [Link() for _ in range(6)]
    for step in steps:
        link = links[step]
        if link in plain:
            chain.take(link)
            plain.remove(link)
        else:
            chain.append(link)
            plain.append(link)
        found, at = [], chain.oldest
        while at is not None:
            found.append(at)
            at = at.newer
        assert found == plain
        assert (chain.count, chain.newest) == (len(plain), plain[-1] if plain else None)
