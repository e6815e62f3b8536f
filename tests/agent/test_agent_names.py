"""Names in the agent: identities that follow from them, and what a restart leaves."""

import asyncio
import json

import pytest

from conntrack.address import Prefix, parse_address
from firewall.agent.names import NameBook
from firewall.fqdn.cache import Bounds
from firewall.fqdn.reach import Reach
from firewall.identities.registry import LocalNumbers

A, B, HOME = map(parse_address, ("192.0.2.1", "2001:db8::1", "10.0.0.9"))
EXACT, PATTERN = "www.example", "*.example"
OUTSIDE = Reach([HOME])


class Book(NameBook):
    """A book with its numbers at hand."""

    def __init__(self, tmp_path):
        self.local = LocalNumbers()
        super().__init__(tmp_path, self.local, Bounds())
        self.restore()

    def labels(self) -> dict[bytes, tuple[str, ...]]:
        return {
            prefix.network: self.local.lookup(number).strings() for prefix, number in self.items()
        }


@pytest.fixture
def book(tmp_path):
    return Book(tmp_path)


def test_addresses_with_the_same_selectors_share_an_identity(book):
    book.learn(1, "www.example.", [A], 30)
    book.learn(2, "www.example.", [B], 30)
    book.follow({EXACT}, OUTSIDE)
    assert book.labels() == dict.fromkeys((A, B), ("fqdn:www.example", "reserved:world"))
    assert len(dict(book.items()).values()) == 2
    assert len(set(dict(book.items()).values())) == 1


def test_names_that_no_selector_means_are_known_and_open_nothing(book):
    book.learn(1, "other.org.", [A], 30)
    book.follow({EXACT}, OUTSIDE)
    assert book.labels() == {}
    assert book.names(A) == ("other.org",)


def test_a_new_selector_finds_names_that_were_answered_before(book):
    book.learn(1, "www.example.", [A], 30)
    book.follow({EXACT}, OUTSIDE)
    book.follow({EXACT, PATTERN}, OUTSIDE)
    assert book.labels()[A] == ("fqdn:*.example", "fqdn:www.example", "reserved:world")
    book.follow(set(), OUTSIDE)
    assert book.labels() == {}


def test_only_addresses_that_a_lesson_touched_are_looked_at(book, monkeypatch):
    for number in range(50):
        book.learn(1, f"n{number}.example.", [parse_address(f"192.0.2.{number + 100}")], 30)
    book.follow({PATTERN}, OUTSIDE)
    looked_at = []
    relabel = book._relabel
    monkeypatch.setattr(book, "_relabel", lambda a, r: (looked_at.append(a), relabel(a, r)))
    assert book.learn(1, "www.example.", [A], 30)
    book.follow({PATTERN}, OUTSIDE)
    assert looked_at == [A]
    book.learn(1, "www.example.", [A], 60)
    book.follow({PATTERN}, OUTSIDE)
    assert looked_at == [A]


def test_no_name_leads_to_an_endpoint_also_if_it_came_later(book):
    book.learn(1, "www.example.", [HOME, A], 30)
    book.follow({EXACT}, OUTSIDE)
    assert set(book.labels()) == {A}
    assert book.refused == {HOME: "an endpoint or a node"}
    book.follow({EXACT}, Reach([HOME, A]))
    assert book.labels() == {}
    book.follow({EXACT}, Reach([A]))
    assert set(book.labels()) == {HOME}


def test_names_and_numbers_outlive_the_agent(book, tmp_path):
    book.learn(1, "www.example.", [A], 300)
    book.learn(1, "x.example.", [B], 300)
    book.follow({EXACT, PATTERN}, OUTSIDE)
    asyncio.run(book.save())
    again = Book(tmp_path)
    again.follow({EXACT, PATTERN}, OUTSIDE)
    assert dict(again.items()) == dict(book.items())
    assert set(again.cache.entries()) == set(book.cache.entries())


@pytest.mark.parametrize("damage", ["cut", "version", "garbage"])
def test_a_file_that_cannot_be_used_is_kept_and_reported(book, tmp_path, damage):
    """Names are learnt anew; nothing else depends on the file."""
    book.learn(1, "www.example.", [A], 300)
    asyncio.run(book.save())
    path = tmp_path / "names"
    good = path.read_bytes()
    path.write_bytes(
        {"cut": good[:-5], "version": good.replace(b"names 1 ", b"names 9 ", 1), "garbage": b"x"}[
            damage
        ]
    )
    broken = path.read_bytes()
    again = Book(tmp_path)
    assert again.cache.count == 0
    assert str(path) in again.problem
    assert "left as it is" not in again.problem
    assert (tmp_path / "names.unusable").read_bytes() == broken
    again.learn(1, "www.example.", [A], 300)
    asyncio.run(again.save())
    assert Book(tmp_path).problem == ""


def test_patterns_choose_what_is_shown_and_forgotten(book):
    book.learn(1, "a.example.", [A], 30)
    book.learn(2, "b.example.", [A], 30)
    book.learn(2, "b.org.", [A], 30)
    assert {e.name for e in book.find("*.example")} == {"a.example.", "b.example."}
    assert {e.name for e in book.find("", 2)} == {"b.example.", "b.org."}
    assert book.forget("*.example", 2) == 1
    assert book.names(A) == ("a.example", "b.org")
    book.follow({PATTERN}, OUTSIDE)
    assert dict(book.items()).keys() == {Prefix(A, 32)}


ROWS = [
    {"fqdn": "www.example.", "ips": ["192.0.2.1", "2001:db8::1"], "ttl": 60},
    {"endpoint-id": 7, "fqdn": "old.example", "ips": ["192.0.2.9"], "ttl": 60,
     "lookup-time": "2020-01-01T00:00:00Z", "expiration-time": "2020-01-01T00:01:00Z"},
    {"endpoint": 3, "source": "lookup", "fqdn": "www.example.", "ips": ["192.0.2.3"], "ttl": 5,
     "expiration_time": "2999-01-01T00:00:00.000Z"},
]  # fmt: skip


def test_names_may_be_known_from_the_start(book, tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    book.preload(path)
    book.follow({EXACT}, OUTSIDE)
    assert set(book.labels()) == {A, B, parse_address("192.0.2.3")}
    assert book.problem == ""
    book.follow({"old.example"}, OUTSIDE)
    assert book.labels() == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "no JSON"),
        ("{}", "not a list"),
        ('[{"ips": []}]', "[0]: 'fqdn' is missing"),
        ('[{"fqdn": "a.b", "ips": ["x"], "ttl": 1}]', "[0]: "),
        ('[{"fqdn": "*.b", "ips": ["192.0.2.1"], "ttl": 1}]', "is no name"),
        ('[{"fqdn": "a.b", "ips": ["192.0.2.1"]}]', "expiration_time or ttl"),
        ("[1]", "[0]: "),
    ],
)
def test_a_file_that_is_wrong_is_reported_and_nothing_of_it_counts(book, tmp_path, text, problem):
    path = tmp_path / "names.json"
    path.write_text(text, encoding="utf-8")
    book.preload(path)
    assert problem in book.problem
    assert str(path) in book.problem
    assert book.cache.count == 0


def test_a_file_that_is_not_there_is_reported(book, tmp_path):
    book.preload(tmp_path / "none")
    assert "No such file" in book.problem
