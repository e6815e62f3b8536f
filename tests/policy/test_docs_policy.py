"""The examples of docs/policy.md do what the page says."""

import re
from pathlib import Path

import pytest

from firewall.policy.readers import CAPABILITIES, ENFORCED, SWITCHED, ReaderSettings, read
from firewall.policy.readers.kinds import KINDS

PAGE = Path(__file__).resolve().parents[2] / "docs/policy.md"
TEXT = PAGE.read_text()

ACCEPTED = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
REFUSED = re.findall(
    r"^```yaml refused\n(.*?)^```\n\n```text\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL
)
SWITCHED_ON = re.findall(r"^```yaml host_firewall\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
TABLE_ROW = re.compile(r"^\| `([a-z-]+)` \| .* \| (yes|no|with `[a-z_.]+: on`) \|$", re.MULTILINE)


def test_the_page_has_examples():
    assert len(ACCEPTED) >= 3
    assert len(REFUSED) == TEXT.count("```yaml refused") >= 2


@pytest.mark.parametrize("example", ACCEPTED)
def test_examples_are_accepted(example):
    result = read(example, "p.yaml")
    assert [str(p) for p in result.problems] == []
    assert result.objects


@pytest.mark.parametrize("example", SWITCHED_ON)
def test_examples_for_the_node_need_the_host_firewall(example):
    (error,) = read(example, "p.yaml").errors
    assert error.message.startswith("needs `host_firewall: on`")
    settings = ReaderSettings(enforceable=ENFORCED | {"host-policy"})
    result = read(example, "p.yaml", settings=settings)
    assert [str(p) for p in result.problems] == []
    assert result.objects


@pytest.mark.parametrize(("example", "told"), REFUSED)
def test_refused_examples_say_what_the_page_says(example, told):
    name = told.partition(":")[0]
    result = read(example, name)
    assert result.objects == ()
    assert [str(p) for p in result.errors] == told.splitlines()


def test_the_page_lists_every_capability_as_it_is():
    rows = dict(TABLE_ROW.findall(TEXT))
    known = {name: "yes" if name in ENFORCED else "no" for name in CAPABILITIES}
    switched = {name: f"with `{setting}: on`" for name, setting in SWITCHED.items()}
    assert rows == known | switched


def test_the_page_lists_every_kind_with_its_versions():
    head = TEXT.partition("A file may hold")[0]
    for kind, found in KINDS.items():
        (row,) = [line for line in head.splitlines() if f"`{kind}`" in line]
        assert all(f"`{version}`" in row for version in found.versions)
