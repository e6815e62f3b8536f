"""Which rules apply to which form, and that no mixture of rules and sides leaves a hole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firewall.policy.course import (
    CLEAR,
    Course,
    Form,
    Restriction,
    looks,
    named,
    passes_unread,
    plan,
)
from firewall.policy.snapshot import HttpRuleRow, L7Row, TlsContextRow

RULE, OTHER_RULE = HttpRuleRow(path="/a"), HttpRuleRow(path="/b")
INSIDE, OUTSIDE = TlsContextRow("n", "inside"), TlsContextRow("n", "outside")
A, B, NOBODY = Form(True, "a.example"), Form(True, "b.example"), Form(True)

HTTP = L7Row("http", http=(RULE,))
NAMES = L7Row("tls", server_names=("a.example",))
ENDS = L7Row("http", http=(RULE,), terminating_tls=INSIDE)
BOTH = L7Row("http", http=(RULE,), terminating_tls=INSIDE, originating_tls=OUTSIDE)
BEGINS = L7Row("http", http=(RULE,), originating_tls=OUTSIDE)
NAMED_ENDS = L7Row("http", http=(OTHER_RULE,), server_names=("a.example",), terminating_tls=INSIDE)
BARE_ENDS = L7Row("tls", terminating_tls=INSIDE, originating_tls=OUTSIDE)
DNS = L7Row("dns")

UNREAD, REQUESTS = Course(False), Course(True)


def side(*rows, free=False, audit=False):
    return Restriction(rows, free, audit)


NO_PROXY = Restriction(None, True)


@pytest.mark.parametrize(
    ("rows", "form", "course"),
    [
        ((HTTP,), CLEAR, REQUESTS),
        ((HTTP,), A, None),
        ((NAMES,), A, UNREAD),
        ((NAMES,), B, None),
        ((NAMES,), NOBODY, None),
        ((NAMES,), CLEAR, None),
        ((ENDS,), A, Course(True, INSIDE)),
        ((ENDS,), NOBODY, Course(True, INSIDE)),
        ((ENDS,), CLEAR, None),
        ((BOTH,), B, Course(True, INSIDE, OUTSIDE)),
        ((BEGINS,), CLEAR, Course(True, None, OUTSIDE)),
        ((BEGINS,), A, None),
        ((NAMED_ENDS,), A, Course(True, INSIDE)),
        ((NAMED_ENDS,), B, None),
        ((NAMED_ENDS,), NOBODY, None),
        ((BARE_ENDS,), A, Course(False, INSIDE, OUTSIDE)),
        ((DNS,), CLEAR, None),
        ((DNS,), A, None),
        ((HTTP, NAMES), CLEAR, REQUESTS),
        ((HTTP, NAMES), A, UNREAD),
        ((HTTP, NAMES), B, None),
        ((NAMES, NAMED_ENDS), A, Course(True, INSIDE)),
    ],
)
def test_what_one_side_makes_of_a_form(rows, form, course):
    assert plan([side(*rows)], form)[0] == course


def test_where_tls_ends_http_rules_without_a_context_judge_inside_too():
    _, (leg,) = plan([side(NAMED_ENDS, HTTP)], A)
    assert leg.http == (OTHER_RULE, RULE)
    assert not leg.unread


def test_a_context_without_http_rules_lets_every_byte_pass_inside():
    _, (leg,) = plan([side(BARE_ENDS, ENDS)], A)
    assert leg.unread


@pytest.mark.parametrize("form", [CLEAR, A, B, NOBODY])
def test_a_side_that_lets_everything_pass_refuses_no_form(form):
    assert plan([side(NAMES, free=True)], form)[0] == UNREAD
    assert plan([side(NAMES, audit=True)], form)[0] == UNREAD
    assert plan([side(NAMES, audit=True)], form)[1][0].audited is (form != A)


@pytest.mark.parametrize(
    ("egress", "ingress", "form", "course"),
    [
        ((NAMES,), (BOTH,), A, Course(True, INSIDE, OUTSIDE)),
        ((NAMES,), (BOTH,), B, None),
        ((BOTH,), (NAMES,), A, Course(True, INSIDE, OUTSIDE)),
        ((BOTH,), (NAMES,), B, None),
        ((BOTH,), (HTTP,), A, None),  # TLS leaves the first, the second reads none
        ((ENDS,), (NAMES,), A, None),  # clear text leaves the first
        ((ENDS,), (HTTP,), A, Course(True, INSIDE)),
        ((ENDS,), (BEGINS,), A, Course(True, INSIDE, OUTSIDE)),
        ((BOTH,), (ENDS,), A, Course(True, INSIDE)),
        ((BEGINS,), (ENDS,), CLEAR, Course(True)),
        ((BEGINS,), (NAMES,), CLEAR, None),
        ((HTTP,), (BEGINS,), CLEAR, Course(True, None, OUTSIDE)),
        ((BARE_ENDS,), (BOTH,), A, Course(True, INSIDE, OUTSIDE)),
    ],
)
def test_each_side_sees_what_the_one_before_made(egress, ingress, form, course):
    assert plan([side(*egress), side(*ingress)], form)[0] == course


def test_the_last_leg_is_the_one_that_refuses():
    assert len(plan([side(NAMES), side(HTTP)], B)[1]) == 1
    assert len(plan([side(NAMES), side(HTTP)], A)[1]) == 2


ROWS = [HTTP, NAMES, ENDS, BOTH, BEGINS, NAMED_ENDS, BARE_ENDS, DNS]
sides = st.one_of(
    st.just(NO_PROXY),
    st.builds(
        Restriction,
        st.lists(st.sampled_from(ROWS), min_size=1, max_size=4, unique=True).map(tuple),
        st.booleans(),
    ),
)
forms = st.sampled_from([CLEAR, A, B, NOBODY])


@given(sides, sides, forms)
def test_nothing_passes_unread_that_a_side_must_read(egress, ingress, form):
    """The hole to be excluded: bytes of a form to which only http rules, or none, apply."""
    course, legs = plan([egress, ingress], form)
    if course is None:
        assert not legs[-1].allowed
        return
    for leg in legs:
        assert leg.allowed
        if not leg.unread:
            assert leg.http
            assert course.http
    if not course.http:
        assert all(leg.unread for leg in legs)
    if form.tls and course.terminate is None:
        assert not course.http, "TLS that nobody ends cannot be judged"
        assert course.originate is None
    if not form.tls:
        assert course.terminate is None


@given(sides, sides, forms)
def test_a_second_side_only_takes_away(egress, ingress, form):
    alone = plan([egress], form)[0]
    if alone is None:
        assert plan([egress, ingress], form)[0] is None


@given(sides, sides)
def test_what_need_not_be_looked_at_passes_in_every_form(egress, ingress):
    if passes_unread([egress, ingress]):
        for form in (CLEAR, A, B, NOBODY):
            assert plan([egress, ingress], form)[0] == UNREAD


@given(st.lists(st.sampled_from(ROWS), max_size=4).map(tuple))
def test_a_port_is_looked_at_as_soon_as_one_rule_speaks_of_tls(rows):
    speaks = any(row not in (HTTP, DNS) for row in rows)
    assert looks([NO_PROXY, side(*rows)]) is speaks


@pytest.mark.parametrize(
    ("pattern", "name", "meant"),
    [
        ("a.example", "a.example", True),
        ("A.example", "a.example", True),
        ("*.example", "a.example", True),
        ("*.example", "example", False),
        ("*.example", "a.b.example", False),
        ("**.example", "a.b.example", True),
        ("*", "a.b.example", True),
        ("*", "", False),
        ("**.", "", False),
        ("a*b.example", "axxb.example", True),
        ("a*b.example", "a.b.example", False),
    ],
)
def test_patterns_are_ciliums_and_mean_no_nobody(pattern, name, meant):
    assert named((pattern,), name) is meant
