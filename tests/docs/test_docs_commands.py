"""Every command line that the pages show is one that the command takes."""

import re
import shlex
from pathlib import Path

import click
import pytest

from firewall.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"```[a-z]*\n(.*?)```", re.DOTALL)
CALLED = re.compile(r"(?:[a-z]*[$#] ?)?(?:\.venv/bin/)?bartizan (.*)")
BEHIND = re.compile(r" +#|\s\|\s|;|&&|>")


def lines():
    """Yield page and arguments of each call; cli.md is written by the command itself."""
    for page in PAGES:
        if page.name == "cli.md":
            continue
        for block in FENCED.findall(page.read_text()):
            for line in block.splitlines():
                called = CALLED.fullmatch(line.strip())
                if called and "…" not in line and "..." not in line:
                    yield page.name, BEHIND.split(called.group(1))[0]


LINES = list(dict.fromkeys(lines()))


def parse(arguments):
    """Parse a command line as click does, without running anything."""
    command, name, parent = main, "bartizan", None
    while isinstance(command, click.Group):
        # click keeps the help option of a command's first context: the one that users get.
        context = click.Context(command, info_name=name, parent=parent, **main.context_settings)
        name, found, rest = command.resolve_command(context, arguments)
        assert found is not None, f"no command {arguments[0]}"
        command, parent, arguments = found, context, rest
    command.make_context(name, arguments, parent)


def test_the_pages_show_commands():
    assert len(LINES) > 20


@pytest.mark.parametrize(("page", "line"), LINES, ids=[" ".join(one) for one in LINES])
def test_a_command_of_a_page_is_taken(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        parse(shlex.split(line))
    except click.BadParameter as error:  # a file that only the reader has
        assert "does not exist" in error.message, page
