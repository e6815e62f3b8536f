"""Which answers go out without asking the agent again."""

from l7proxy import dns_confirmed
from l7proxy.dns_confirmed import Confirmed
from l7proxy.dns_desk import Lesson

A, B, SIX = b"\xc0\0\2\1", b"\xc0\0\2\2", bytes(16)


def lesson(*addresses: bytes, endpoint=1, name="www.example.") -> Lesson:
    return Lesson(endpoint, name, addresses, 300)


def test_what_was_confirmed_is_known_for_as_long_and_to_whom_it_was_told():
    known = Confirmed()
    known.add(lesson(A), 1000.0)
    assert known.has(lesson(A), 1000.9)
    assert known.has(lesson(A), 400.0)
    assert not known.has(lesson(A), 1002.0)
    assert not known.has(lesson(A, B), 1000.0)
    assert not known.has(lesson(A, endpoint=2), 1000.0)
    assert not known.has(lesson(A, name="web.example."), 1000.0)
    known.clear()
    assert not known.has(lesson(A), 1000.0)


def test_answers_that_take_turns_are_known_together():
    """A and AAAA, or one address after the other."""
    known = Confirmed()
    for told in (lesson(A), lesson(SIX), lesson(B)):
        known.add(told, 1000.0)
    assert known.has(lesson(A), 1000.0)
    assert known.has(lesson(SIX), 1000.0)
    assert known.has(lesson(B, A), 1000.0)


def test_a_full_table_is_forgotten(monkeypatch):
    monkeypatch.setattr(dns_confirmed, "ADDRESS_COUNT", 2)
    known = Confirmed()
    known.add(lesson(A, B), 1000.0)
    known.add(lesson(SIX), 1000.0)
    assert known.has(lesson(SIX), 1000.0)
    assert not known.has(lesson(A), 1000.0)
