"""Names and patterns of DNS: research a.6."""

import pytest

from firewall.policy.name_match import NameMatcher, normalise


@pytest.mark.parametrize(
    ("pattern", "meant", "not_meant"),
    [
        ("cilium.io", ["cilium.io", "CILIUM.io.", "cilium.io."], ["a.cilium.io", "ciliumXio"]),
        ("*.cilium.io", ["a.cilium.io", "A_1-b.cilium.io"], ["cilium.io", "a.b.cilium.io"]),
        ("*cilium.io", ["cilium.io", "subcilium.io"], ["www.cilium.io", "cilium.io.evil"]),
        ("sub*.cilium.io", ["sub.cilium.io", "sub9.cilium.io"], ["sub.x.cilium.io"]),
        ("a*b*c.io", ["abc.io", "axbyc.io"], ["a.b.c.io", "abd.io"]),
        ("**.cilium.io", ["a.cilium.io", "a.b.cilium.io", "x.y.z.cilium.io"], ["cilium.io"]),
        ("****.cilium.io", ["a.b.cilium.io"], ["cilium.io", "xcilium.io"]),
        ("a.**.io", ["a.b.io", "a.xyz.io"], ["a.b.c.io"]),
        ("a**.io", ["a.io", "abc.io"], ["a.b.io"]),
        ("*", ["a", "a.b", "."], ["a b", "a..b"]),
        ("**", ["a.b.c"], []),
        ("***.", ["a.b.c", "."], []),
        ("*.", ["com", "com."], ["a.com"]),
        (" Cilium.IO ", ["cilium.io"], ["cilium.i"]),
        ("a.b", ["a.b"], ["axb", "a.b\n", "a.b.."]),
        ("special*service.api.cilium.io", ["special-region1-service.api.cilium.io"], []),
    ],
)
def test_a_pattern_means_these_names(pattern, meant, not_meant):
    matcher = NameMatcher((pattern,))
    assert [name for name in meant if not matcher.matches(name)] == []
    assert [name for name in not_meant if matcher.matches(name)] == []


def test_items_are_alternatives_and_none_mean_nothing():
    matcher = NameMatcher(("a.io", "*.b.io"))
    assert [matcher.matches(name) for name in ("a.io", "x.b.io", "b.io")] == [True, True, False]
    assert not NameMatcher(()).matches("a.io")


def test_names_are_compared_in_lower_case_with_their_dot():
    assert normalise("WWW.Cilium.IO") == normalise("www.cilium.io.") == "www.cilium.io."
