"""How long an answer counts, for whom, and what gives way when there is too much."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conntrack.address import parse_address
from firewall.fqdn import cache as under_test
from firewall.fqdn.cache import Bounds, NameCache

A, B, C = (parse_address(f"192.0.2.{n}") for n in (1, 2, 3))
NAME = "www.example."


def cache(**bounds) -> NameCache:
    return NameCache(Bounds(**bounds))


def held(known: NameCache) -> set[tuple[int, str, bytes, str]]:
    return {(e.endpoint, e.name, e.address, e.source) for e in known.entries()}


def test_an_answer_counts_for_its_ttl_and_until_somebody_has_looked_twice():
    """With the first look it may have been told a moment ago."""
    known = cache()
    assert known.learn(1, NAME, [A], 30, 100.0)
    assert known.doubtful(129.9) == set()
    assert known.doubtful(130.0) == {(1, A)}
    assert known.collect(set(), 130.0) == 0
    assert held(known) == {(1, NAME, A, "connection")}
    assert known.doubtful(190.0) == {(1, A)}
    assert known.collect(set(), 190.0) == 1
    assert known.names(A) == ()


@pytest.mark.parametrize("told_at", [100.0, 159.0, 159.999])
def test_an_answer_that_lives_for_no_time_is_good_for_a_connection(told_at):
    known = cache()
    known.collect(set(), 100.0)
    known.learn(1, NAME, [A], 0, told_at)
    known.collect(set(), 160.0)
    assert known.names(A) == (NAME,)
    known.collect({(1, A)}, 220.0)
    assert known.names(A) == (NAME,)
    known.collect(set(), 280.0)
    assert known.names(A) == ()


def test_a_floor_lengthens_short_lives():
    known = cache(min_ttl_s=60)
    known.learn(1, NAME, [A], 0, 100.0)
    assert known.doubtful(159.0) == set()
    assert known.doubtful(160.0) == {(1, A)}


def test_the_same_answer_again_is_news_only_if_it_lives_longer():
    known = cache()
    known.learn(1, NAME, [A], 30, 100.0)
    known.changed.clear()
    assert not known.learn(1, NAME, [A], 10, 110.0)
    assert known.learn(1, NAME, [A], 30, 110.0)
    assert known.changed == set()
    known.learn(2, NAME, [A, B], 30, 110.0)
    assert known.changed == {A, B}
    assert known.sizes() == {1: (1, 1), 2: (1, 2)}


def test_what_has_expired_stays_while_a_connection_lives():
    known = cache()
    known.learn(1, NAME, [A, B], 30, 100.0)
    known.collect({(1, A)}, 140.0)
    known.collect({(1, A)}, 150.0)
    assert held(known) == {(1, NAME, A, "connection")}
    known.collect({(1, A)}, 200.0)
    assert known.zombie_count == 1
    known.collect({(2, A)}, 260.0)
    assert held(known) == set()


def test_a_grace_period_begins_with_the_last_connection():
    known = cache(grace_s=100)
    known.learn(1, NAME, [A], 30, 100.0)
    known.collect({(1, A)}, 200.0)
    known.collect(set(), 299.0)
    assert known.zombie_count == 1
    known.collect(set(), 300.0)
    assert known.count == 0


def test_an_answer_brings_a_zombie_back_to_life():
    known = cache()
    known.learn(1, NAME, [A], 30, 100.0)
    known.collect({(1, A)}, 200.0)
    known.learn(1, NAME, [A], 30, 201.0)
    assert held(known) == {(1, NAME, A, "lookup")}
    assert known.zombie_count == 0


def test_of_too_many_addresses_those_that_expire_first_become_zombies():
    known = cache(per_name=2)
    known.learn(1, NAME, [A], 10, 100.0)
    known.learn(1, NAME, [B, C], 30, 100.0)
    assert held(known) == {
        (1, NAME, A, "connection"),
        (1, NAME, B, "lookup"),
        (1, NAME, C, "lookup"),
    }
    known.collect(set(), 101.0)
    known.collect(set(), 102.0)
    assert {address for _, _, address, _ in held(known)} == {B, C}


def test_of_one_answer_the_last_addresses_give_way():
    """Clients begin with the first; an earlier answer that lives as long gives way before."""
    known = cache(per_name=2)
    known.learn(1, NAME, [C, A, B], 30, 100.0)
    assert held(known) == {
        (1, NAME, C, "lookup"),
        (1, NAME, A, "lookup"),
        (1, NAME, B, "connection"),
    }
    known.learn(1, NAME, [B], 30, 100.0)
    assert {e.address for e in known.entries() if e.source == "lookup"} == {A, B}


def test_of_too_many_zombies_the_oldest_go():
    known = cache(zombie_count=1)
    known.learn(1, NAME, [A], 10, 100.0)
    known.learn(1, NAME, [B], 20, 100.0)
    known.collect({(1, A)}, 110.0)
    known.collect({(1, A), (1, B)}, 120.0)
    assert {address for _, _, address, _ in held(known)} == {B}
    assert known.forgotten_count == 1
    known.learn(1, NAME, [C], 1, 121.0)
    known.collect({(1, B)}, 130.0)
    assert {address for _, _, address, _ in held(known)} == {B}  # a newer one without a connection
    assert known.forgotten_count == 2


def test_names_of_one_endpoint_are_bounded():
    """A tunnel that asks for a new name each time fills its own table only."""
    known = cache()
    known.learn(2, NAME, [A], 30, 0.0)
    for number in range(10_001):
        known.learn(1, f"n{number}.example.", [B], 30, float(number) / 1e6)
    assert known.count == 10_001
    assert "n0.example." not in known.names(B)
    assert known.names(A) == (NAME,)


def test_an_endpoint_that_goes_takes_only_its_own_with_it():
    known = cache()
    known.learn(1, NAME, [A], 30, 0.0)
    known.learn(2, NAME, [A], 30, 0.0)
    known.forget_endpoint(1)
    assert held(known) == {(2, NAME, A, "lookup")}
    known.forget(list(known.entries()))
    assert (known.count, known.names(A)) == (0, ())


LESSONS = st.tuples(
    st.integers(1, 3),
    st.sampled_from(["a.", "b.", "c."]),
    st.lists(st.sampled_from([A, B, C]), max_size=3),
    st.integers(0, 50),
)


@given(st.lists(LESSONS, max_size=30), st.integers(1, 3), st.integers(0, 4))
def test_both_ways_of_asking_agree_whatever_happens(lessons, per_name, zombies):
    """Names by address are what the entries say, and the bounds hold."""
    known = cache(per_name=per_name, zombie_count=zombies)
    for now, (endpoint, name, addresses, ttl) in enumerate(lessons):
        known.learn(endpoint, name, addresses, ttl, float(now * 5))
        if now % 3 == 0:
            known.collect({(1, A), (2, B)}, float(now * 5))
        entries = list(known.entries())
        for address in (A, B, C):
            assert known.names(address) == tuple(
                sorted({e.name for e in entries if e.address == address})
            )
        assert known.zombie_count == sum(e.zombie_since is not None for e in entries)
        assert known.zombie_count <= zombies
        alive = [(e.endpoint, e.name) for e in entries if e.zombie_since is None]
        assert all(alive.count(key) <= per_name for key in alive)
    again = NameCache(known.bounds)
    again.restore(known.entries())
    assert set(again.entries()) == set(known.entries())


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 50), st.booleans()), min_size=1, max_size=60
    )
)
def test_of_too_many_names_the_one_that_expires_first_gives_way(lessons):
    """Also where a name was told again, for longer, or forgotten and told anew."""
    known, lives = cache(), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(under_test, "NAMES_PER_ENDPOINT", 4)
        for number, ttl_s, forgotten in lessons:
            name = f"n{number}.example."
            if forgotten and name in lives:
                known.forget([e for e in known.entries() if e.name == name])
                del lives[name]
                continue
            if name not in lives and len(lives) == 4:
                soonest = min(lives.values())
                gone = {one for one, life in lives.items() if life == soonest}
            else:
                gone = set()
            known.learn(1, name, [A], ttl_s, 100.0)
            now = {entry.name for entry in known.entries()}
            lost = lives.keys() - now
            assert len(lost) == bool(gone)
            assert lost <= gone
            lives = {one: life for one, life in lives.items() if one in now}
            lives[name] = max(ttl_s, lives.get(name, 0))


def test_an_endpoint_that_asks_for_ever_new_names_does_not_make_each_answer_dear(monkeypatch):
    """The names are gone over once, not with every answer."""
    looks = []
    last = under_test._last
    monkeypatch.setattr(under_test, "_last", lambda held: looks.append(1) or last(held))
    monkeypatch.setattr(under_test, "NAMES_PER_ENDPOINT", 100)
    known = cache()
    for number in range(1000):
        known.learn(1, f"n{number}.example.", [A], 60 + number % 7, 100.0)
    assert len({entry.name for entry in known.entries()}) == 100
    assert len(looks) < 100 + 2 * 900
