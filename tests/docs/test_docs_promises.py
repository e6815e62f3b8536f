"""Tables of promises name tests, and every test that they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("conntrack", "datapath", "l7")
HEADING = "\n## What was promised, and what shows it\n"
FILES = [file for folder in ("tests", "netns-tests") for file in (ROOT / folder).rglob("test_*.py")]
DEFINED = {
    name
    for file in FILES
    for name in re.findall(r"^(?:async )?def (test_\w+)\(", file.read_text(), re.MULTILINE)
}
NAMES = {file.name for file in FILES}


def rows(page):
    """The cells of each promise."""
    table = (ROOT / f"docs/{page}.md").read_text().partition(HEADING)[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in cells] for cells in lines][1:]


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_a_table_names_exist(page):
    found = rows(page)
    assert len(found) > 10
    for row in found:
        for name in re.findall(r"(test_\w+)(?!\w|\.py)", row[-1]):
            assert name in DEFINED, f"{page}: {name}"
        for name in re.findall(r"(test_\w+\.py)", row[-1]):
            assert name in NAMES, f"{page}: {name}"


def test_whatever_is_promised_of_the_proxy_is_shown_by_something():
    for row in rows("l7"):
        assert len(row) == 3, row
        assert re.search(r"test_\w+|`bench|`make", row[2]), row
