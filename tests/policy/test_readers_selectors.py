"""Selectors as policies write them: which label sets they mean, and what is refused."""

import json

import pytest

from firewall.identities.labels import LabelSet
from firewall.policy.readers.composition import compose
from firewall.policy.readers.document import Report, Value
from firewall.policy.readers.selectors import read_selector

DEATHSTAR = LabelSet.parse(
    ["k8s:class=deathstar", "k8s:org=empire", "k8s:io.kubernetes.pod.namespace=default"]
)


def parsed(document):
    """The selector that a document means, and what is wrong with it."""
    report = Report("p.yaml")
    (found,) = compose(json.dumps(document), report.file, report.problems)
    selector = read_selector(Value(found.root, "", report))
    return selector, [str(problem) for problem in report.problems]


@pytest.mark.parametrize(
    ("document", "matches"),
    [
        ({"matchLabels": {"class": "deathstar"}}, True),
        ({"matchLabels": {"k8s:class": "deathstar"}}, True),
        ({"matchLabels": {"container:class": "deathstar"}}, False),
        ({"matchLabels": {"class": "deathstar", "org": "alliance"}}, False),
        ({}, True),
        ({"matchLabels": {"class": ""}}, False),
        ({"matchExpressions": [{"key": "org", "operator": "In", "values": ["a", "empire"]}]}, True),
        ({"matchExpressions": [{"key": "org", "operator": "NotIn", "values": ["empire"]}]}, False),
        ({"matchExpressions": [{"key": "none", "operator": "NotIn", "values": ["x"]}]}, True),
        ({"matchExpressions": [{"key": "container:org", "operator": "NotIn",
                                "values": ["empire"]}]}, True),
        ({"matchExpressions": [{"key": "org", "operator": "Exists"}]}, True),
        ({"matchExpressions": [{"key": "none", "operator": "Exists"}]}, False),
        ({"matchExpressions": [{"key": "none", "operator": "DoesNotExist"}]}, True),
        ({"matchExpressions": [{"key": "k8s:org", "operator": "DoesNotExist"}]}, False),
        ({"matchLabels": {"class": "deathstar"},
          "matchExpressions": [{"key": "org", "operator": "NotIn", "values": ["empire"]}]}, False),
    ],
)  # fmt: skip
def test_labels_and_expressions_must_all_hold(document, matches):
    """Kubernetes LabelSelector; NotIn is true for a missing key."""
    selector, problems = parsed(document)
    assert not problems
    assert selector.matches(DEATHSTAR) is matches


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"matchLabel": {}}, "matchLabel"),
        ({"matchLabels": ["a"]}, "matchLabels"),
        ({"matchExpressions": {"key": "a"}}, "matchExpressions"),
        ({"matchExpressions": [{"key": "a", "operator": "in", "values": ["x"]}]}, '"in"'),
        ({"matchExpressions": [{"key": "a", "operator": "In"}]}, "needs at least one value"),
        ({"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["x"]}]}, "no values"),
        ({"matchExpressions": [{"operator": "Exists"}]}, "needs key"),
        ({"matchExpressions": [{"key": "a", "operator": "Exists", "x": 1}]}, '"x"'),
    ],
)
def test_a_malformed_selector_is_refused_with_its_place(document, problem):
    _, problems = parsed(document)
    assert any(problem in text for text in problems), problems
