"""`bartizan test` in model mode: exit codes, files, and the command line that is said again."""

import json

import click
import pytest
from click.testing import CliRunner
from policytest_reading import WEB, case_of, results, written

from firewall.cli import main
from firewall.cli.exits import ExitCode
from firewall.cli.policytest import _arguments, _Run
from firewall.cli.policytest import test as command
from policytest.answer import Answer

GOOD = {"from": "x/a", "to": "x/b", "port": "80/TCP", "verdict": "allow", "by": "x/web"}
BAD = {"from": "x/b", "to": "x/a", "port": "80/TCP", "verdict": "deny"}


@pytest.fixture
def file(tmp_path):
    def write(name="web.test.yaml", **fields):
        path = tmp_path / name
        path.write_text(written(policies=[WEB], **fields))
        return str(path)

    return write


def run(*arguments, env=None):
    environment = {"GITHUB_ACTIONS": "", **(env or {})}
    return CliRunner().invoke(main, ["test", "--mode", "model", *arguments], env=environment)


def test_exit_codes(file, tmp_path):
    assert run(file(expect=[GOOD])).exit_code == ExitCode.OK
    assert run(file(expect=[GOOD, BAD])).exit_code == ExitCode.FAILED
    assert run(file(expect=[GOOD]), "--tap", "-o", "json").exit_code == ExitCode.USAGE
    assert run(file(expect=[{**GOOD, "to": "x/c"}])).exit_code == ExitCode.INVALID
    assert run(file(expect=[GOOD]), "--filter", "nothing").exit_code == ExitCode.NOTHING_SELECTED
    (tmp_path / "empty").mkdir()
    assert run(str(tmp_path / "empty")).exit_code == ExitCode.NOTHING_SELECTED


def test_judges_that_differ_weigh_more_than_a_failure():
    case = case_of(written(policies=[WEB], expect=[GOOD, BAD]))
    made = _Run([case], None, ())
    made.results = results(case)
    assert made.code is ExitCode.FAILED
    split = made.results[0]._replace(packets=Answer(False, ("default-deny",)))
    made.results = [split, made.results[1]]
    assert made.code is ExitCode.DISAGREEMENT


def test_a_folder_means_the_tests_in_it(file, tmp_path):
    file("one.yaml", expect=[GOOD])
    file("two.yml", expect=[GOOD])
    (tmp_path / "policy.yaml").write_text("apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\n")
    done = run(str(tmp_path))
    assert "2 files, 2 checks, all passed" in done.output


def test_json_is_one_object_per_line_and_coverage_does_not_mix_with_it(file):
    done = run(file(expect=[GOOD, BAD]), "-o", "json", "--coverage")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["passed"] for row in rows] == [True, False]
    assert "coverage: 1 of 1 rules" in done.stderr


def test_problems_become_annotations_in_github_actions(file):
    done = run(file(expect=[{**GOOD, "to": "x/c"}]), env={"GITHUB_ACTIONS": "true"})
    assert "::error file=" in done.output


def test_the_command_line_is_said_again_without_loss(file):
    """Inside the enclosure runs what was asked for outside."""
    path = file(expect=[GOOD])
    words = [
        path, "-o", "json", "--mode", "both", "--filter", "a b", "--filter", "-c",
        "--junit", "x.xml", "--coverage", "--verbose",
    ]  # fmt: skip
    context = command.make_context("test", list(words))
    again = _arguments(context)
    assert again[0] == "test"
    assert command.make_context("test", again[1:]).params == context.params
    assert isinstance(context, click.Context)


def test_the_example_of_the_project_passes():
    from pathlib import Path

    example = Path(__file__).resolve().parents[2] / "examples/shop.test.yaml"
    done = run(str(example), "--coverage")
    assert done.exit_code == ExitCode.OK, done.output
    assert "coverage: 2 of 2 rules" in done.output
