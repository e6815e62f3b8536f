"""Which http rule allows a request: whole-string RE2, Cilium's header forms, repeated headers."""

import pytest

from firewall.policy.http_match import EditKind, HeaderEdit, HttpMatcher
from firewall.policy.snapshot import HeaderMatchRow, HttpRuleRow


def allowed(row, method=b"GET", path=b"/", host=b"a", headers=()):
    return HttpMatcher((row,)).match(method, path, host, headers) is row


def test_a_rule_without_fields_allows_every_request():
    assert allowed(HttpRuleRow(), b"\xff", b"\x00", b"", [(b"a", b"b")])


def test_no_rules_allow_nothing():
    assert HttpMatcher(()).match(b"GET", b"/", b"a", ()) is None


@pytest.mark.parametrize(
    ("pattern", "path", "verdict"),
    [
        ("/public", b"/public", True),
        ("/public", b"/public/", False),
        ("/public", b"/publi", False),
        ("/public$", b"/public", True),
        ("/public", b"/public?x=1", False),  # :path carries the query (research a.8)
        ("/public.*", b"/public?x=1", True),
        ("/public.*", b"/a/public", False),
        ("/a|/b", b"/b", True),
        ("/a|/b", b"/a/b", False),
        ("/Public", b"/public", False),
        ("/.*", b"/\xff\xfe", True),  # bytes that are no UTF-8 match too
        ("/[^x]*", b"/\xe9", True),
        ("/é", "/é".encode(), True),
        ("/.*", b"/a\nb", False),
        ("", b"/anything", True),
        ("/a.c", b"/abc", True),
    ],
)
def test_a_path_pattern_must_match_the_whole_target(pattern, path, verdict):
    assert allowed(HttpRuleRow(path=pattern), path=path) is verdict


def test_all_fields_of_a_rule_must_match():
    row = HttpRuleRow(method="PUT", path="/v1/.*", host="db:8080", headers=("X-Key: 1",))
    good = {
        "method": b"PUT",
        "path": b"/v1/a",
        "host": b"db:8080",
        "headers": [(b"x-key", b"1")],
    }
    assert allowed(row, **good)
    bad = (("method", b"GET"), ("path", b"/v2"), ("host", b"db"), ("headers", ()))
    for field, value in bad:
        assert not allowed(row, **(good | {field: value})), field


def test_the_first_allowing_rule_is_named():
    rows = (HttpRuleRow(method="PUT"), HttpRuleRow(path="/a"), HttpRuleRow())
    assert HttpMatcher(rows).match(b"GET", b"/a", b"", ()) is rows[1]
    assert HttpMatcher(rows).match(b"GET", b"/b", b"", ()) is rows[2]


@pytest.mark.parametrize(
    ("rule", "headers", "verdict"),
    [
        ("X-Key: v", [(b"x-key", b"v")], True),
        ("X-Key: v", [(b"X-KEY", b"v")], True),
        ("X-Key: v", [(b"x-key", b"V")], False),
        ("X-Key: v", [], False),
        ("X-Key", [(b"x-key", b"anything")], True),
        ("X-Key", [], False),
        ("X-Key v", [(b"x-key", b"v")], True),  # the colon is stripped, not demanded
        ("X-Key:v", [(b"x-key", b"v")], False),  # no space: presence of "x-key:v"
        ("X-Key: a b", [(b"x-key", b"a b")], True),
        ("X-Role: user", [(b"x-role", b"user"), (b"x-role", b"admin")], False),
        ("X-Role: user", [(b"x-role", b"admin"), (b"x-role", b"user")], False),
        ("X-Role: user", [(b"x-role", b"user"), (b"x-role", b"user")], False),
        ("X-Role: a,b", [(b"x-role", b"a"), (b"x-role", b"b")], True),
    ],
)
def test_header_rules_follow_ciliums_split_and_its_joined_value(rule, headers, verdict):
    assert allowed(HttpRuleRow(headers=(rule,)), headers=headers) is verdict


def test_a_pattern_that_re2_refuses_allows_nothing_and_is_reported():
    matcher = HttpMatcher((HttpRuleRow(host="*"), HttpRuleRow(path="/ok")))
    assert matcher.match(b"GET", b"/", b"a", ()) is None
    assert matcher.match(b"GET", b"/ok", b"a", ()) is not None
    assert matcher.errors == ("no argument for repetition operator: *",)


def edits(mismatch, headers, value="v"):
    row = HttpRuleRow(header_matches=(HeaderMatchRow(name="X-A", mismatch=mismatch, value=value),))
    found = HttpMatcher((row,)).evaluate(b"GET", b"/", b"", headers)
    return found.rule is row, found.edits


@pytest.mark.parametrize("mismatch", ["LOG", "ADD", "DELETE", "REPLACE"])
def test_a_mismatch_action_keeps_the_rule_matching(mismatch):
    """BEH-15."""
    expected = (HeaderEdit(EditKind[mismatch], b"x-a", b"v"),)
    assert edits(mismatch, [(b"x-a", b"other")]) == (True, expected)
    assert edits(mismatch, [(b"x-a", b"v")]) == (True, ())


def test_without_an_action_a_mismatch_fails_the_rule():
    assert edits("", [(b"x-a", b"other")]) == (False, ())
    assert edits("", [(b"x-a", b"v")]) == (True, ())


def test_no_value_demands_presence():
    assert edits("", [(b"x-a", b"x")], value=None) == (True, ())
    assert edits("", [], value=None) == (False, ())


def test_every_rule_with_header_matches_is_evaluated():
    """Edits of a rule that does not allow, or comes after the allowing one, apply too."""
    refused = HttpRuleRow(
        header_matches=(
            HeaderMatchRow(name="a", mismatch="ADD", value="1"),
            HeaderMatchRow(name="b", value="2"),
        )
    )
    plain = HttpRuleRow(path="/")
    after = HttpRuleRow(header_matches=(HeaderMatchRow(name="c", mismatch="DELETE", value="3"),))
    other = HttpRuleRow(
        path="/other", header_matches=(HeaderMatchRow(name="d", mismatch="ADD", value="4"),)
    )
    found = HttpMatcher((refused, plain, after, other)).evaluate(b"GET", b"/", b"", ())
    assert found.rule is plain
    assert [edit.name for edit in found.edits] == [b"a", b"c"]


def test_a_missing_secret_fails_even_with_an_action():
    """Research a.8: missing secret and no value = the rule never matches."""
    match = HeaderMatchRow(name="a", mismatch="ADD", secret_namespace="n", secret_name="s")
    row = HttpRuleRow(header_matches=(match,))
    assert HttpMatcher((row,)).match(b"GET", b"/", b"", ()) is None
    known = HttpMatcher((row,), secrets=lambda _namespace, _name: b"1")
    assert known.evaluate(b"GET", b"/", b"", ()).edits == (HeaderEdit(EditKind.ADD, b"a", b"1"),)
    inline = HttpRuleRow(
        header_matches=(HeaderMatchRow(name="a", value="2", secret_name="s", mismatch=""),)
    )
    assert HttpMatcher((inline,)).match(b"GET", b"/", b"", [(b"a", b"2")]) is inline


def test_conditions_name_each_field_that_failed():
    row = HttpRuleRow(method="POST", path="/v1/request-landing")
    [conditions] = HttpMatcher((row,)).conditions(b"PUT", b"/v1/request-landing", b"d", ())
    assert [(c.field, c.expected, c.actual, c.held) for c in conditions] == [
        ("method", "POST", "PUT", False),
        ("path", "/v1/request-landing", "/v1/request-landing", True),
    ]


def header_matches(*items):
    return tuple(HeaderMatchRow(name, mismatch=how, value=value) for name, how, value in items)


@pytest.mark.parametrize(
    ("rules", "headers", "allowed", "edits"),
    [
        # An item sees what an earlier one did, in one rule and in the next.
        ([[("x", "REPLACE", "1"), ("x", "", "1")]], [(b"x", b"2")], 0, [("REPLACE", "1")]),
        ([[("x", "REPLACE", "1")], [("x", "", "2")]], [(b"x", b"2")], 0, [("REPLACE", "1")]),
        ([[("y", "", "1"), ("x", "DELETE", "1")], [("x", "", None)]], [(b"x", b"2")], None,
         [("DELETE", "1")]),
        ([[("x", "ADD", "1")], [("x", "", "1")]], [], 0, [("ADD", "1")]),
        # The same change is made once.
        ([[("x", "ADD", "1"), ("x", "ADD", "1")]], [(b"x", b"2")], 0, [("ADD", "1")]),
        ([[("x", "REPLACE", "1")], [("x", "REPLACE", "1")]], [], 0, [("REPLACE", "1")]),
        ([[("x", "LOG", "1")], [("x", "LOG", "1")]], [], 0, [("LOG", "1")]),
    ],
)  # fmt: skip
def test_later_items_see_the_request_as_changed(rules, headers, allowed, edits):
    """cilium/proxy changes the head while it matches; what is matched is what the server gets."""
    rows = tuple(HttpRuleRow(header_matches=header_matches(*items)) for items in rules)
    found = HttpMatcher(rows).evaluate(b"GET", b"/", b"", headers)
    assert found.rule == (None if allowed is None else rows[allowed])
    assert [(edit.kind.name, edit.value.decode()) for edit in found.edits] == edits


def test_plain_header_rules_see_the_request_as_changed_too():
    first = HttpRuleRow(method="PUT", header_matches=header_matches(("role", "REPLACE", "user")))
    late = HttpRuleRow(headers=("role: admin",))
    rows = (
        HttpRuleRow(header_matches=header_matches(("no", "", "1"), ("role", "REPLACE", "u"))),
        late,
    )
    assert HttpMatcher((first, late)).match(b"GET", b"/", b"", [(b"role", b"admin")]) is late
    assert HttpMatcher(rows).match(b"GET", b"/", b"", [(b"role", b"admin")]) is None
