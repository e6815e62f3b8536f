"""docs/compatibility.md names tests that exist, and leaves no part of the reference out."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/compatibility.md"
TEXT = PAGE.read_text()
REFERENCE = ROOT / "../shared/research/cilium.md"

NAMED = sorted(set(re.findall(r"`(test_\w+)::(test_\w+)`", TEXT)))
FILES = {file.stem: file for folder in ("tests", "netns-tests") for file in
         (ROOT / folder).rglob("test_*.py")}  # fmt: skip
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("|") and not line.startswith("|---")
]


def test_the_page_names_tests():
    assert len(NAMED) > 100


@pytest.mark.parametrize(("file", "name"), NAMED, ids=["::".join(one) for one in NAMED])
def test_every_test_named_there_exists(file, name):
    assert file in FILES, f"there is no {file}.py"
    defined = rf"^(async )?def {name}\("
    assert re.search(defined, FILES[file].read_text(), re.MULTILINE), f"{file}.py has no {name}"


def test_whatever_is_the_same_is_shown_by_a_test():
    """A row of the statements says what happens and names at least one test."""
    for row in ROWS:
        if len(row) != 3 or row[0] == "statement":
            continue
        assert row[1], row
        assert "::" in row[2], row


def test_whatever_differs_says_why_or_that_it_is_not_there():
    """The first table has four columns; only what does not exist needs no reason."""
    rows = [row for row in ROWS if len(row) == 4 and row[0] != "where"]
    assert len(rows) >= 10
    for row in rows:
        assert row[3] or "not there" in row[2], row


@pytest.mark.skipif(not REFERENCE.is_file(), reason="needs ../shared/research/cilium.md")
def test_every_section_of_the_reference_is_there():
    """Sections a to c of the inventory, by number."""
    sections = re.findall(r"^#+ ([abc]\.\d+|[abc]\.) ", REFERENCE.read_text(), re.MULTILINE)
    assert sections
    for section in sections:
        assert re.search(rf"^#+ .*\b{re.escape(section)}", TEXT, re.MULTILINE), section
