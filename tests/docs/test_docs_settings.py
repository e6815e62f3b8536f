"""Every setting that a page names is one that the configuration has."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from firewall.agent.config import Config
from firewall.agent.setting import settings
from l7proxy.limits import Limits

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS = {row.path for row in settings(Config)}
LIMITS = {f"proxy.limits.{field.name}" for field in fields(Limits)}
CILIUMS = {"log.value"}  # a field of a policy
SECTIONS = {path.rpartition(".")[0] for path in SETTINGS if "." in path}
NAMED = re.compile(rf"`((?:{'|'.join(sorted(SECTIONS))})(?:\.[a-z_0-9]+)+)(?:: [^`]*)?`")


def named():
    """Yield page and name; `policy.md` is a page, `policy.view` may be a module of ours."""
    for page in PAGES:
        for name in sorted(set(NAMED.findall(page.read_text())) - CILIUMS):
            module = ROOT / "firewall" / f"{name.replace('.', '/')}.py"
            if not name.endswith(".md") and not module.exists():
                yield page.name, name


@pytest.mark.parametrize(("page", "name"), list(named()), ids=[" ".join(one) for one in named()])
def test_a_setting_that_a_page_names_is_there(page, name):
    assert name in SETTINGS | LIMITS, page


def test_pages_name_settings():
    assert len({name for _, name in named()}) > 20
