"""`bartizan test` as people run it: output, files, exit codes. Inside the enclosure of this run."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from policytest_reading import WEB, written

from lab.daemon import command

pytestmark = pytest.mark.needs("veth", "nfqueue", "tproxy", "socket", "ipset")

GOOD = {"from": "x/a", "to": "x/b", "port": "80/TCP", "verdict": "allow", "by": "x/web"}
BAD = {"from": "x/b", "to": "x/a", "port": "80/TCP", "verdict": "deny"}


@pytest.fixture
def file(tmp_path):
    def write(name="web.test.yaml", **fields):
        path = tmp_path / name
        path.write_text(written(policies=[WEB], **fields))
        return path

    return write


def run(*arguments, **environment):
    environment = {**os.environ, "GITHUB_ACTIONS": "", **environment}
    return subprocess.run(
        [*command(), "test", *map(str, arguments)],
        check=False, capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip


def test_both_judges_are_asked_by_default_and_all_is_well(file):
    done = run(file(expect=[GOOD]))
    assert done.returncode == 0, done.stderr
    assert "1 check, all passed (model and packets, " in done.stdout


def test_a_failure_shows_the_flow_the_reason_and_the_command_that_repeats_it(file, tmp_path):
    path = file(expect=[GOOD, BAD])
    junit = tmp_path / "out.xml"
    done = run(path, "--junit", junit, "--coverage", GITHUB_ACTIONS="true")
    assert done.returncode == 1, done.stderr
    assert "FAIL x/b -> x/a 80/TCP" in done.stdout
    assert "packets: expected deny, got allow" in done.stdout
    assert "policy-verdict:all INGRESS ALLOWED" in done.stdout
    assert f"again: bartizan test {path} --filter 'x/b -> x/a 80/TCP'" in done.stdout
    assert "coverage: 1 of 1 rules" in done.stdout
    assert f"::error file={path},line=" in done.stdout
    assert ET.parse(junit).getroot().get("failures") == "1"
    again = run(path, "--filter", "x/b -> x/a 80/TCP")
    assert again.returncode == 1
    assert "1 check, 1 failed" in again.stdout


@pytest.mark.parametrize("mode", ["model", "packets", "both"])
def test_json_has_both_answers_or_says_who_answered(file, mode):
    done = run(file(expect=[GOOD]), "--mode", mode, "-o", "json")
    [row] = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert row["passed"]
    if mode == "both":
        assert row["model"]["by"] == row["packets"]["by"] == ["x/web"]
    else:
        assert row["judge"] == mode


def test_tap(file):
    done = run(file(expect=[GOOD, BAD]), "--mode", "model", "--tap")
    assert done.returncode == 1
    assert done.stdout.startswith("TAP version 14\n1..2\nok 1 - ")


def test_an_invalid_file_is_told_and_nothing_is_run(file, tmp_path):
    file(expect=[GOOD])
    file("other.test.yaml", expect=[{**GOOD, "to": "x/c"}])
    done = run(tmp_path)
    assert done.returncode == 4
    assert done.stdout == ""


def test_nothing_selected_has_its_own_code(file, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/policy.yaml").write_text("kind: CiliumNetworkPolicy")
    assert run(tmp_path / "empty").returncode == 5
    assert run(file(expect=[GOOD]), "--filter", "no such check").returncode == 5
    assert run(file(expect=[])).returncode == 5


def test_usage_errors_have_clicks_code(file):
    path = file(expect=[GOOD])
    assert run(path, "--tap", "-o", "json").returncode == 2
    assert run("no-such-file").returncode == 2


def test_what_packets_cannot_show_is_played_in_the_model_or_refused(file):
    path = file(expect=[GOOD], settings={"assume": ["authentication"]})
    done = run(path)
    assert done.returncode == 0
    assert "model only: it assumes authentication" in done.stderr
    assert run(path, "--mode", "packets").returncode == 3


@pytest.fixture
def elsewhere():
    """A test file that is not below /run, which an enclosure hides."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = Path(folder, "web.test.yaml")
        path.write_text(written(policies=[WEB], expect=[GOOD]))
        Path(folder).chmod(0o755)
        yield path


def test_outside_of_an_enclosure_the_command_makes_its_own(elsewhere):
    """`unshare` gives the command a /run in which no marker says that it is inside."""
    path = elsewhere
    script = 'mount -t tmpfs tmpfs /run && exec "$@"'
    argv = ["unshare", "-m", "sh", "-c", script, "sh", *command(), "test", str(path)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "all passed (model and packets" in done.stdout


def test_where_no_enclosure_can_be_made_the_model_answers_alone(elsewhere):
    """An ordinary user without user namespaces; with --mode both that is exit 3."""
    path = elsewhere
    script = 'mount -t tmpfs tmpfs /run && echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"'
    argv = ["unshare", "-Urm", "sh", "-c", script, "sh", *command(), "test", str(path)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)
    if "max_net_namespaces" in done.stderr:
        pytest.skip(f"the kernel does not limit namespaces here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert "the model alone answers" in done.stderr
    assert "all passed (model, " in done.stdout
    done = subprocess.run(
        [*argv, "--mode", "both"], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3
