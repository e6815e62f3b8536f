"""Many patterns in one pass say what each of them says alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firewall.policy import pattern
from firewall.policy.pattern import Pattern, PatternSet

TEXTS = st.sampled_from(
    ["", "/a", "/a.*", "^/a$", "/[^x]*", "/a|/b", "(", "a{2,3}", "/\\d+", "\\Q/a.b", "/é", ".*"]
)
VALUES = st.one_of(
    st.sampled_from([b"", b"/a", b"/b", b"/a/b", b"/a.b", b"/12", b"aa", b"/\xe9", "/é".encode()]),
    st.binary(max_size=6),
)


@given(st.lists(TEXTS, max_size=8), VALUES)
def test_a_set_finds_what_its_patterns_accept_one_by_one(texts, value):
    """Literals, RE2 programs, patterns that match all, and broken ones, which match nothing."""
    patterns = [Pattern(text) for text in texts]
    alone = [number for number, one in enumerate(patterns) if one.accepts(value)]
    assert PatternSet(patterns).matches(value) == alone


def test_patterns_too_large_for_one_automaton_are_tried_one_by_one(monkeypatch):
    """RE2 refuses to compile these together; none is forgotten."""
    monkeypatch.setattr(pattern, "_SET_BYTES", 10_000)
    patterns = PatternSet([Pattern(f"/r{number}[a-z]{{3,60}}") for number in range(50)])
    assert patterns.matches(b"/r49jjj") == [49]


@pytest.mark.parametrize("text", ["(", "[a", "a**", "(?<n>"])
def test_why_a_pattern_is_refused_is_said(text):
    assert Pattern(text).broken
    assert not Pattern(text).accepts(text.encode())


class Exhausted:
    """A set that has no memory left: RE2 says so by matching nothing."""

    def Match(self, _value):  # noqa: N802 - google-re2's name
        return []


def test_a_set_without_memory_for_a_value_gives_the_same_answer():
    patterns = [Pattern("/a.*"), Pattern("/b+"), Pattern(".*b"), Pattern("(")]
    together = PatternSet(patterns)
    together._set = Exhausted()
    assert together.matches(b"/ab") == [0, 2]
    assert together.matches(b"/c") == []
