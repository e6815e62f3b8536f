"""`policy trace` and `policy suggest` without a daemon: options, last line, exit code, patches."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from firewall.cli import main
from firewall.cli.exits import ExitCode

POLICY = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: guard, namespace: x}
spec:
  endpointSelector: {matchLabels: {app: b}}
  ingress:
  - fromEndpoints:
    - matchLabels: {app: a}
    toPorts:
    - ports: [{port: "80", protocol: TCP}]
      rules:
        http:
        - {method: GET, path: "/v1/.*"}
    - ports: [{port: "443", protocol: TCP}]
"""
ENDPOINTS = """\
- {name: a, namespace: x, addresses: [10.0.0.1], labels: [app=a]}
- {name: b, namespace: x, addresses: [10.0.0.2], labels: [app=b], ports: [web:80]}
- {name: c, namespace: y, addresses: [10.0.0.3], labels: [app=a]}
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "guard.yaml").write_text(POLICY)
    (tmp_path / "endpoints.txt").write_text(ENDPOINTS)
    monkeypatch.chdir(tmp_path)
    return ["-f", "guard.yaml", "--endpoints", "endpoints.txt"]


def _policy(*arguments: str):
    return CliRunner().invoke(main, ["policy", *arguments])


@pytest.mark.parametrize(
    ("ends", "verdict", "code"),
    [
        (["--from", "x/a", "--to", "x/b:443/TCP"], "ALLOWED", 0),
        (["--from", "x/a", "--to", "x/b:web"], "REDIRECTED", 0),
        (["--from", "x/a", "--to", "x/b:80", "--http", "GET /v1/z"], "REDIRECTED", 0),
        (["--from", "x/a", "--to", "x/b:80", "--http", "PUT /v1/z"], "DENIED", 1),
        (["--from", "y/c", "--to", "x/b:443/TCP"], "DENIED", 1),
        (["--src-k8s-pod", "x:a", "--dst-k8s-pod", "x:b", "--dport", "443"], "ALLOWED", 0),
        (["-s", "app=a,k8s:io.kubernetes.pod.namespace=x", "-d", "k8s:app=b", "-d",
          "k8s:io.kubernetes.pod.namespace=x", "--dport", "443/tcp"], "ALLOWED", 0),
        (["--from", "x/a", "--to", "x/b:EchoRequest/ICMP"], "DENIED", 1),
        (["--from", "world", "--to", "10.0.0.2:443"], "DENIED", 1),
    ],
)  # fmt: skip
def test_the_last_line_is_the_verdict_and_the_exit_code_follows(files, ends, verdict, code):
    """As Cilium's trace ended, for scripts and for people."""
    done = _policy("trace", *files, *ends)
    assert done.output.splitlines()[-1] == f"Final verdict: {verdict}", done.output
    assert done.exit_code == code


@pytest.mark.parametrize(
    ("request_", "note", "verdict"),
    [
        ("GET /v1/../admin", "note: the proxy makes /admin of /v1/../admin", "DENIED"),
        ("/x/%2e%2e//v1/a?b=/../", "note: the proxy makes /v1/a?b=/../ of /x/%2e%2e//v1/a?b=/../",
         "REDIRECTED"),
        ("GET http://h/v1/./a", "note: the proxy makes /v1/a of /v1/./a", "REDIRECTED"),
        ("GET /v1/..%2fadmin", "400 path_with_escaped_slashes_rejected", "REDIRECTED"),
        ("GET /v1/a", "", "REDIRECTED"),
    ],
)  # fmt: skip
def test_a_path_is_judged_as_the_proxy_judges_it(files, request_, note, verdict):
    done = _policy("trace", *files, "--from", "x/a", "--to", "x/b:80", "--http", request_)
    assert done.stdout.splitlines()[-1] == f"Final verdict: {verdict}", done.output
    assert note in done.stderr
    assert bool(done.stderr) == bool(note)


def test_the_deciding_rule_is_named_with_its_line(files):
    """file:line:column."""
    done = _policy("trace", *files, "--from", "x/a", "--to", "x/b:443")
    decided = [line for line in done.output.splitlines() if "decided by" in line]
    assert decided
    assert decided[0].endswith("guard.yaml:14:7")


def test_json_holds_both_sides_and_every_rule(files):
    """What is printed is data first."""
    done = _policy("trace", *files, "--from", "y/c", "--to", "x/b:443", "-o", "json")
    document = json.loads(done.stdout)
    assert document["verdict"] == "DENIED"
    side = document["explanation"]["ingress"]
    assert {step["rule"]["line"] for step in side["steps"]} == {10, 14}
    assert side["failed"]["what"] == "peer"


@pytest.mark.parametrize(
    "ends",
    [
        ["--from", "x/a"],
        ["--from", "x/a", "--to", "x/nobody:80"],
        ["--from", "x/a", "--to", "x/b"],
        ["--from", "x/a", "-s", "app=a", "--to", "x/b:80"],
        ["--from", "x/a", "--to", "x/b:80/XTP"],
        ["--from", "x/a", "--to", "[fd00::1:80"],
    ],
)
def test_a_question_that_cannot_be_asked_is_a_usage_error(files, ends):
    """Exit code 2: never mistaken for a verdict."""
    done = _policy("trace", *files, *ends)
    assert done.exit_code == ExitCode.USAGE, done.output


def test_an_invalid_policy_file_is_no_verdict_either(files):
    """Exit code 4, with the place."""
    Path("guard.yaml").write_text(POLICY.replace("fromEndpoints", "fromEndpoint"))
    done = _policy("trace", *files, "--from", "x/a", "--to", "x/b:80")
    assert done.exit_code == ExitCode.INVALID
    assert "guard.yaml:7:" in done.output


def test_a_suggestion_is_a_patch_of_the_file(files):
    """Only the new line, with the name as seen from here."""
    done = _policy("suggest", *files, "--from", "y/c", "--to", "x/b:443")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith("# CiliumNetworkPolicy x/guard")
    assert lines[1:3] == ["--- a/guard.yaml", "+++ b/guard.yaml"]
    assert [line for line in lines[3:] if line[0] in "+-"] == [
        "+    - matchLabels: {app: a, 'k8s:io.kubernetes.pod.namespace': 'y'}"
    ]


def test_a_suggestion_can_be_applied_whole(files):
    """-o yaml is what `policy apply -f -` takes."""
    done = _policy("suggest", *files, "--from", "y/c", "--to", "x/b:443", "-o", "yaml")
    Path("guard.yaml").write_text(done.output)
    assert _policy("trace", *files, "--from", "y/c", "--to", "x/b:443").exit_code == 0


def test_nothing_is_suggested_for_what_is_allowed(files):
    """A comment, so that piping it into patch does no harm."""
    done = _policy("suggest", *files, "--from", "x/a", "--to", "x/b:443")
    assert (done.exit_code, done.output) == (0, "# nothing to change: the traffic is allowed\n")


def test_why_wants_one_flow():
    """By id or the last drop."""
    assert CliRunner().invoke(main, ["why"]).exit_code == ExitCode.USAGE
    assert CliRunner().invoke(main, ["why", "x", "--last-drop"]).exit_code == ExitCode.USAGE


def test_an_object_in_two_files_is_refused_by_validate(files):
    """Which of them would count would depend on the order."""
    Path("again.yaml").write_text(POLICY.replace("443", "444"))
    done = _policy("validate", "-f", "guard.yaml", "-f", "again.yaml")
    assert done.exit_code == ExitCode.INVALID
    assert "given more than once: in guard.yaml and again.yaml" in done.output


def test_validate_knows_which_rules_select_nobody(files):
    """Only if endpoints are given: without them nothing is known about them."""
    Path("guard.yaml").write_text(POLICY.replace("app: b", "app: bb"))
    assert "selects no endpoint" not in _policy("validate", "-f", "guard.yaml").output
    done = _policy("validate", *files)
    assert done.exit_code == 0
    assert "warning: guard.yaml:10:7: " in done.output
    assert "selects no endpoint" in done.output


def test_endpoints_of_a_policy_test_need_no_addresses(files):
    """They get those that the test would choose."""
    Path("t.yaml").write_text(
        "kind: PolicyTest\nendpoints:\n"
        "- {name: a, namespace: x, labels: {app: a}}\n- {name: b, namespace: x, labels: {app: b}}\n"
    )
    asked = ("--from", "x/a", "--to", "x/b:443", "--endpoints", "t.yaml")
    assert _policy("trace", "-f", "guard.yaml", *asked).exit_code == 0


def test_two_endpoints_with_one_name_or_address_are_refused(files):
    """Which of them a question means would be a guess."""
    with Path("endpoints.txt").open("a") as file:
        file.write("- {name: d, namespace: x, addresses: [10.0.0.1]}\n")
    Path("more.txt").write_text("- {name: a, namespace: x, addresses: [10.0.0.9]}\n")
    done = _policy("trace", *files, "--endpoints", "more.txt", "--from", "x/a", "--to", "x/b:80")
    assert done.exit_code == ExitCode.INVALID
    assert "endpoints.txt:4:3: [3]: 10.0.0.1 belongs to endpoint a already (line 1)" in done.output
    assert "more.txt:1:3: [0]: endpoint x/a is given twice; first at endpoints.txt:1" in (
        done.output
    )


FETCH = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: fetch, namespace: x}
spec:
  endpointSelector: {matchLabels: {app: a}}
  egress:
  - toFQDNs: [{matchPattern: "*.example"}]
    toPorts: [{ports: [{port: "80", protocol: TCP}]}]
"""


@pytest.mark.parametrize(
    ("names", "end", "verdict"),
    [
        (["api.example=203.0.113.7,2001:db8::7"], "api.example:80", "ALLOWED"),
        (["API.example.=203.0.113.7"], "203.0.113.7:80", "ALLOWED"),
        (["api.example=203.0.113.7"], "203.0.113.8:80", "DENIED"),
        (["api.other=203.0.113.7"], "api.other:80", "DENIED"),
        (["api.example=127.0.0.1"], "127.0.0.1:80", "DENIED"),
        (["api.other=203.0.113.7", "api.example=203.0.113.7"], "api.other:80", "ALLOWED"),
    ],
)
def test_names_are_asked_about_with_what_dns_answers(tmp_path, names, end, verdict):
    policy = tmp_path / "fetch.yaml"
    policy.write_text(FETCH, encoding="utf-8")
    options = [part for name in names for part in ("--dns", name)]
    done = _policy("trace", "-f", str(policy), "-s", "app=a,k8s:io.kubernetes.pod.namespace=x",
                   "--to", end, *options)  # fmt: skip
    assert done.output.endswith(f"Final verdict: {verdict}\n"), done.output


@pytest.mark.parametrize("text", ["api.example", "api.example=", "=203.0.113.7", "*.x=203.0.113.7"])
def test_what_is_no_answer_of_dns_is_said(tmp_path, text):
    policy = tmp_path / "fetch.yaml"
    policy.write_text(FETCH, encoding="utf-8")
    done = _policy("trace", "-f", str(policy), "-s", "app=a", "--to", "world:80", "--dns", text)
    assert done.exit_code == 2
    assert f"--dns {text}" in done.output
