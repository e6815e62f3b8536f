"""`policy suggest --l7 --from-flows FILE`: what is no flow is said with its line."""

import json

import pytest
from click.testing import CliRunner

from firewall.cli import main
from firewall.cli.exits import ExitCode

REQUEST = {
    "verdict": "FORWARDED",
    "source": {"labels": ["k8s:app=a"], "namespace": "x"},
    "destination": {"labels": ["k8s:app=b"], "namespace": "x"},
    "l4": {"TCP": {"destination_port": 80}},
    "l7": {"type": "REQUEST", "http": {"method": "GET", "url": "http://b/v1"}},
}


def suggest(tmp_path, *flows):
    file = tmp_path / "flows.json"
    file.write_text("".join(f"{json.dumps({'flow': flow})}\n" for flow in flows))
    return CliRunner().invoke(main, ["policy", "suggest", "--l7", "--from-flows", str(file)])


def test_a_request_becomes_a_rule(tmp_path):
    done = suggest(tmp_path, REQUEST)
    assert done.exit_code == 0
    assert "path: /v1" in done.output


@pytest.mark.parametrize(
    "broken",
    [
        {"l4": {}},
        {"l4": {"UDP": {}}},
        {"l7": {"type": "REQUEST", "http": {"url": "/"}}},
        {"l7": []},
    ],
    ids=["no l4", "no TCP", "no method", "l7 is a list"],
)
def test_a_broken_flow_is_said_with_its_line(tmp_path, broken):
    done = suggest(tmp_path, REQUEST, {**REQUEST, **broken})
    assert done.exit_code == ExitCode.USAGE
    assert "flows.json:2: not a flow as JSON" in done.output
