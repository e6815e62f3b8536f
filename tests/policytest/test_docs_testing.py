"""docs/testing.md and the published schema say what the reader does."""

import json
import re
from pathlib import Path

import pytest
from policytest_reading import failures, read, text_of, written

from firewall.cli.exits import ExitCode
from policytest import reader, tables, traffic

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "testing.md").read_text()
SCHEMA = json.loads((DOCS / "policytest.schema.json").read_text())
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
REFUSED = re.findall(
    r"^```yaml refused\n(.*?)^```\n\n```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
)


def test_the_page_has_examples():
    assert len(EXAMPLES) >= 3
    assert len(REFUSED) == PAGE.count("```yaml refused") >= 1


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_passes(example):
    found = read(example)
    assert not found.problems, list(map(str, found.problems))
    assert sum(len(step.checks) for step in found.case.steps) >= 2
    assert failures(found.case) == []


@pytest.mark.parametrize(("example", "told"), REFUSED)
def test_refused_examples_say_what_the_page_says(example, told):
    name = told.partition(":")[0]
    found = reader.read_case_text(example, name, Path())
    assert [str(problem) for problem in found.errors] == told.splitlines()


def test_the_page_lists_every_exit_code():
    codes = re.findall(r"^\| (\d) \|", PAGE, re.MULTILINE)
    assert [int(code) for code in codes] == [code.value for code in ExitCode]


def _defined(name):
    return SCHEMA["$defs"][name]["properties"]


@pytest.mark.parametrize(
    ("properties", "fields"),
    [
        (SCHEMA["properties"], reader.FILE_FIELDS),
        (SCHEMA["properties"]["settings"]["properties"], reader.SETTINGS_FIELDS),
        (SCHEMA["properties"]["node"]["properties"], reader.NODE_FIELDS),
        (_defined("namespace"), reader.NAMESPACE_FIELDS),
        (_defined("endpoint"), reader.ENDPOINT_FIELDS),
        (_defined("port"), reader.PORT_FIELDS),
        (_defined("host"), reader.HOST_FIELDS),
        (_defined("step"), reader.STEP_FIELDS),
        (_defined("http"), traffic.HTTP_FIELDS),
        (SCHEMA["$defs"]["expect"]["items"]["properties"], tables.CHECK_FIELDS),
        (SCHEMA["$defs"]["matrices"]["items"]["properties"], tables.MATRIX_FIELDS),
    ],
)
def test_the_schema_knows_exactly_the_fields_that_the_reader_knows(properties, fields):
    assert set(properties) == set(fields)


def test_every_reference_of_the_schema_is_defined():
    used = set(re.findall(r'"#/\$defs/([A-Za-z]+)"', json.dumps(SCHEMA)))
    assert used == set(SCHEMA["$defs"])


def test_an_unknown_field_is_refused_everywhere():
    """`additionalProperties: false` in the schema is what the reader does."""
    odd = {"surprise": 1}
    endpoint = {"name": "a", **odd, "ports": [{"port": 1, **odd}]}
    document = {
        "settings": odd,
        "node": {"ip": "10.0.0.1", **odd},
        "namespaces": {"x": odd},
        "endpoints": [endpoint],
        "hosts": [{"name": "h", **odd}],
        "steps": [
            {
                **odd,
                "expect": [{"from": "a", "to": "a", "http": odd, "verdict": "allow", **odd}],
                "matrix": [{"port": 1, "rows": {"a": "."}, **odd}],
            }
        ],
        **odd,
    }
    unknown = [p for p in read(written(**document)).errors if "unknown field" in p.message]
    assert len(unknown) == 11, text_of(document)
