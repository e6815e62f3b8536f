"""The examples of docs/why.md print what the page says."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from firewall.cli import main

PAGE = (Path(__file__).resolve().parents[2] / "docs/why.md").read_text()

FILES = dict(re.findall(r"^```yaml (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
EXAMPLES = re.findall(r"^```console\n\$ bartizan (.*?)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_has_examples():
    assert len(EXAMPLES) >= 5
    assert {"rule1.yaml", "endpoints.yaml"} <= FILES.keys()


@pytest.mark.parametrize(("command", "printed"), EXAMPLES)
def test_examples_print_what_the_page_says(command, printed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    assert CliRunner().invoke(main, shlex.split(command)).output == printed
