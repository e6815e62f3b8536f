"""Http rules from requests that were seen: valid, and as narrow as they."""

import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_reading import read_text

from firewall.policy.http_match import HttpMatcher
from firewall.policy.learn import Party, Seen, pattern, policies, rules
from firewall.policy.snapshot import HttpRuleRow

A = Party(("k8s:app=a", "k8s:io.kubernetes.pod.namespace=default"), "default")
B = Party(("k8s:app=b", "k8s:io.kubernetes.pod.namespace=default"), "default")
ELSEWHERE = Party(("k8s:app=c", "k8s:io.kubernetes.pod.namespace=other"), "other")
WORLD = Party(("reserved:world",), "")

METHODS = st.sampled_from(["GET", "POST", "PUT", "M-SEARCH", "a.b", "x|y", "*"])
TARGETS = st.builds(
    lambda segments, query: "/" + "/".join(segments) + query,
    st.lists(
        st.text("ab1.*+?()|[]{}^$-_~%", max_size=5).filter(lambda s: "?" not in s), max_size=3
    ),
    st.sampled_from(["", "?", "?a=1", "?id=7&x=a.b", "?q[]=2"]),
)
REQUESTS = st.sets(st.tuples(METHODS, TARGETS), min_size=1, max_size=8)


def matcher(document):
    (port,) = document["spec"]["ingress"][0]["toPorts"]
    return HttpMatcher(tuple(HttpRuleRow(**rule) for rule in port["rules"]["http"]))


def allows(http, method, path):
    return http.match(method.encode(), path.encode(), b"h", ()) is not None


@given(REQUESTS, REQUESTS)
def test_exact_rules_allow_what_was_seen_and_nothing_else(seen, others):
    (document,) = policies((Seen(A, B, 80, *one) for one in seen), exact=True)
    http = matcher(document)
    for request in seen | others:
        assert allows(http, *request) is (request in seen)


@given(REQUESTS, REQUESTS)
def test_general_rules_allow_what_was_seen_and_what_differs_in_identifiers_only(seen, others):
    """Two targets that are written as the same pattern differ in identifiers only."""
    (document,) = policies(Seen(A, B, 80, *one) for one in seen)
    http = matcher(document)
    shapes = {(method, pattern(path)) for method, path in seen}
    for method, path in seen | others:
        assert allows(http, method, path) is ((method, pattern(path)) in shapes)


@given(REQUESTS)
@settings(max_examples=30)
def test_what_is_written_is_a_valid_policy(seen):
    found = policies(Seen(*ends, 80, *one) for one in seen for ends in ((A, B), (WORLD, B)))
    result = read_text(yaml.safe_dump_all(found))
    assert result.errors == ()


@pytest.mark.parametrize(
    ("target", "written"),
    [
        ("/", "/"),
        ("/users/42", "/users/[0-9]+"),
        ("/v1/a.b(c)", r"/v1/a\.b\(c\)"),
        ("/o/9f86d081884c7d65", "/o/[0-9a-f]{16}"),
        ("/deadbeef", "/deadbeef"),
        (
            "/u/123e4567-e89b-12d3-a456-426614174000/x",
            "/u/[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}/x",
        ),
        ("/s?id=7&sort=name.asc", r"/s\?id=[0-9]+&sort=name\.asc"),
    ],
)
def test_only_identifiers_become_classes(target, written):
    assert pattern(target) == written
    assert ".*" not in pattern(target)
    assert re.fullmatch(written, target)


def test_methods_of_one_path_share_a_rule():
    assert rules([("GET", "/a"), ("HEAD", "/a"), ("GET", "/b")]) == [
        {"method": "GET|HEAD", "path": "/a"},
        {"method": "GET", "path": "/b"},
    ]


def test_each_destination_has_a_policy_that_names_its_peers():
    found = policies(
        [Seen(A, B, 80, "GET", "/"), Seen(ELSEWHERE, B, 80, "GET", "/"),
         Seen(WORLD, B, 8080, "PUT", "/x"), Seen(A, ELSEWHERE, 80, "GET", "/"),
         Seen(A, WORLD, 80, "GET", "/")]
    )  # fmt: skip
    assert [one["metadata"]["namespace"] for one in found] == ["default", "other"]
    ingress = found[0]["spec"]["ingress"]
    assert ingress[0]["fromEndpoints"] == [{"matchLabels": {"app": "a"}}]
    assert ingress[1]["fromEndpoints"][0]["matchLabels"] == {
        "app": "c", "k8s:io.kubernetes.pod.namespace": "other",
    }  # fmt: skip
    assert ingress[2]["fromEntities"] == ["world"]
    assert ingress[2]["toPorts"][0]["ports"] == [{"port": "8080", "protocol": "TCP"}]
