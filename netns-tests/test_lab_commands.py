"""`bartizan lab up | exec | list` from two terminals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from traffic import DEADLINE_S, eventually

from lab import commands
from lab.daemon import command
from lab.enclosure import LAB_RUN
from lab.namespaces import NAMED

ROOT = Path(__file__).resolve().parents[1]

FILE = """
name: pair
hosts:
  a: {labels: {app: a}}
  b: {labels: {app: b}}
"""

UP = (
    "import sys; from pathlib import Path; from lab import commands;"
    "sys.exit(commands.up(Path(sys.argv[1]), sys.argv[2:]))"
)


@pytest.fixture
def terminal(tmp_path, monkeypatch):
    """Start `lab up` elsewhere; its notes are in a folder of this test."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    file = tmp_path / "pair.yaml"
    file.write_text(FILE)
    started = []

    def up(*command: str) -> subprocess.Popen:
        child = subprocess.Popen(
            [sys.executable, "-c", UP, str(file), *command],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=os.environ,
        )  # fmt: skip
        started.append(child)
        return child

    yield up
    for child in started:
        child.kill()
        child.communicate()


def _run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; from lab import commands; {code}"],
        check=False, cwd=ROOT, capture_output=True, text=True, timeout=60, env=os.environ,
    )  # fmt: skip


def test_the_other_terminal_lists_the_lab_and_runs_commands_in_its_hosts(terminal):
    """With the exit code of the command, in the folder where one was."""
    first = terminal("sh", "-c", "echo ready; read line; exit 6")
    assert first.stdout.readline() == "ready\n"
    assert "pair" in _run("commands.list_()").stdout
    inside = _run("sys.exit(commands.exec_('a', ['sh', '-c', 'ping -c1 -W5 b && pwd && exit 9']))")
    assert inside.returncode == 9
    assert "1 received" in inside.stdout
    assert inside.stdout.endswith(f"{ROOT}\n")
    first.stdin.write("\n")
    first.stdin.flush()
    assert first.wait(DEADLINE_S) == 6
    assert "pair" not in _run("commands.list_()").stdout


def test_what_a_daemon_of_the_lab_keeps_goes_with_the_lab(terminal):
    """/run is private in there, /var/lib is not: the state directory is the lab's own."""
    inside = terminal(*command(), "config", "view", "-o", "json")
    settings = {
        row["setting"]: row for row in json.loads(inside.communicate(timeout=DEADLINE_S)[0])
    }
    assert settings["state_dir"]["value"] == str(LAB_RUN / "pair" / "state")


def test_the_command_is_found_in_a_lab(terminal, monkeypatch):
    """Also by who called it by its path: the shell says that `bartizan run` works there."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    inside = terminal("bartizan", "--version")
    said, complaint = inside.communicate(timeout=DEADLINE_S)
    assert inside.returncode == 0, complaint
    assert said.startswith("bartizan")


def test_an_unknown_host_is_refused_with_those_that_exist(terminal):
    """Exit 1 and one line."""
    first = terminal("sh", "-c", "echo ready; read line")
    first.stdout.readline()
    done = _run("sys.exit(commands.exec_('z', ['true']))")
    assert done.returncode == 1
    assert done.stderr == "no host 'z' in lab pair: node, a, b\n"


def test_a_lab_whose_terminal_was_killed_is_gone_and_forgotten(terminal):
    """kill -9 of `lab up`: its namespaces end, its note is taken away by the next look."""
    first = terminal("sh", "-c", "echo ready; sleep 1000")
    first.stdout.readline()
    first.kill()
    first.wait()
    eventually(lambda: "pair" not in _run("commands.list_()").stdout, "it is forgotten")
    assert not list(commands._folder().glob("*.json"))
    assert _run("sys.exit(commands.exec_('a', ['true']))").returncode == 1


def test_a_lab_of_the_same_name_is_refused_while_the_first_is_up(terminal):
    """Two could not be told apart."""
    first = terminal("sh", "-c", "echo ready; read line")
    first.stdout.readline()
    second = terminal("true")
    said = second.communicate(timeout=DEADLINE_S)[1]
    assert second.returncode == 1
    assert "pair is up already" in said


def test_a_broken_file_is_refused_with_its_mistakes(terminal, tmp_path):
    """Exit 4, nothing is made."""
    (tmp_path / "pair.yaml").write_text("hosts: {a: {labelz: {}}}")
    done = terminal("true")
    said = done.communicate(timeout=DEADLINE_S)[1]
    assert done.returncode == 4
    assert "pair.yaml:1:13: hosts.a.labelz: unknown field" in said
    assert not list(NAMED.iterdir())
