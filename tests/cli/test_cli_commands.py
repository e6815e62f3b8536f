"""How the command behaves before it reaches any agent."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from firewall.agent import main as agent_main
from firewall.cli import _COMMANDS, main
from firewall.cli.exits import ExitCode
from policytest.authority import Authority


def _run(*arguments: str, text: str | None = None):
    return CliRunner().invoke(main, list(arguments), input=text)


@pytest.mark.parametrize("name", sorted(_COMMANDS))
def test_every_listed_command_can_be_imported_and_explains_itself(name: str) -> None:
    """The table of lazy commands names a module and a command that exist."""
    answer = _run(name, "--help")
    assert answer.exit_code == 0
    assert "Usage:" in answer.output


def _options(command: click.Command, path: str):
    if isinstance(command, click.Group):
        for name in command.list_commands(None):
            yield from _options(command.get_command(None, name), f"{path} {name}")
    else:
        yield from ((path, one) for one in command.params if isinstance(one, click.Option))


def test_every_option_says_what_it_means() -> None:
    options = list(_options(main, "bartizan"))
    assert len(options) > 100
    assert [f"{path} --{one.name}" for path, one in options if not (one.hidden or one.help)] == []


def test_a_command_that_does_not_exist_is_answered_with_the_nearest_that_does() -> None:
    """As options and the commands of a noun are."""
    answer = _run("endpoit", "list")
    assert answer.exit_code == ExitCode.USAGE
    assert "No such command 'endpoit'; did you mean \"endpoint\"?" in answer.output
    assert "did you mean" not in _run("xyzzy").output


def test_without_an_agent_the_message_names_the_socket_and_the_next_step(tmp_path: Path) -> None:
    """Exit code 3: the machine, not the request, is the problem."""
    answer = _run("--api-socket", str(tmp_path / "none.sock"), "identity", "list")
    assert answer.exit_code == ExitCode.UNABLE
    assert "none.sock" in answer.output
    assert "bartizan run" in answer.output


def test_netns_and_interface_exclude_each_other() -> None:
    """Two ways to name one link cannot disagree if only one is accepted."""
    answer = _run("endpoint", "add", "a", "--ip", "10.0.0.1", "--netns", "a", "--interface", "b")
    assert answer.exit_code == ExitCode.USAGE


def test_deleting_every_policy_must_be_said() -> None:
    """An empty filter never means everything."""
    assert _run("policy", "delete").exit_code == ExitCode.USAGE


VALID = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: rule1, namespace: default}
spec:
  endpointSelector: {matchLabels: {org: empire}}
  ingress: [{fromEndpoints: [{matchLabels: {org: empire}}]}]
"""


def test_validate_accepts_a_valid_policy_without_an_agent() -> None:
    """Exit code 0 and the number of objects."""
    answer = _run("policy", "validate", "-f", "-", text=VALID)
    assert answer.exit_code == 0, answer.output
    assert "1 objects valid, 0 errors" in answer.output


def test_validate_names_file_line_path_and_the_likely_word() -> None:
    """A typo is an error, never ignored."""
    answer = _run(
        "policy", "validate", "-f", "-", text=VALID.replace("fromEndpoints", "fromEndpoint")
    )
    assert answer.exit_code == ExitCode.INVALID
    assert "<stdin>:7:" in answer.output
    assert "fromEndpoints" in answer.output


def test_validate_finds_secrets_that_are_not_there(tmp_path: Path) -> None:
    """A warning with the rule's place; none once the secret serves."""
    text = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: p}
spec:
  endpointSelector: {}
  ingress:
  - toPorts:
    - ports: [{port: "443", protocol: TCP}]
      terminatingTLS: {secret: {namespace: web, name: inside}}
"""
    arguments = ("policy", "validate", "-f", "-", "--secrets-dir", str(tmp_path))
    answer = _run(*arguments, text=text)
    assert answer.exit_code == 0
    assert "warning: <stdin>:9:7: spec.ingress[0].toPorts[0]: secret web/inside: " in answer.output
    Authority().secret(tmp_path / "web" / "inside", "a.example")
    assert "secret" not in _run(*arguments, text=text).output
    Authority().secret(tmp_path / "web" / "inside", "a.example", days=(-9, -2))
    assert (
        "tls.crt: a certificate is valid no longer, since 20" in _run(*arguments, text=text).output
    )


def test_validate_finds_secrets_of_headers_that_are_missing(tmp_path: Path) -> None:
    text = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: p}
spec:
  endpointSelector: {}
  ingress:
  - toPorts:
    - ports: [{port: "80", protocol: TCP}]
      rules: {http: [{headerMatches: [{name: X-Token, secret: {namespace: web, name: code}}]}]}
"""
    arguments = ("policy", "validate", "-f", "-", "--secrets-dir", str(tmp_path))
    assert "secret web/code: there is no such file" in _run(*arguments, text=text).output
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "code").write_text("x")
    assert "secret" not in _run(*arguments, text=text).output


def test_validate_answers_in_json() -> None:
    """Every problem is an object with its place."""
    broken = VALID.replace("ingress", "ingres")
    answer = _run("policy", "validate", "-f", "-", "-o", "json", text=broken)
    problems = json.loads(answer.output)
    assert problems
    assert {"severity", "file", "line", "column", "path", "message"} <= problems[0].keys()


def test_the_command_imports_nothing_heavy_before_it_must() -> None:
    """Starting is quick because the agent's and the lab's libraries stay unloaded."""
    script = (
        "import sys; from firewall.cli import main; import firewall.cli.identity;"
        "print([m for m in ('aiohttp', 'asyncio', 'pyroute2', 'yaml', 're2') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_signals_wait_while_the_daemon_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reload right after the start would end it; it is heard once there is somebody to hear."""
    blocked: list[int] = []

    def start(*_: object, **__: object) -> int:
        blocked.extend(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return 0

    monkeypatch.setattr(agent_main, "run", start)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        assert CliRunner().invoke(main, ["run"]).exit_code == 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert {signal.SIGHUP, signal.SIGUSR2} <= {*blocked}
