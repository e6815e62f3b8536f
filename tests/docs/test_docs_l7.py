"""The examples of docs/l7.md are accepted and mean what the page says."""

import re
import textwrap
from pathlib import Path

import pytest
from http_transcript import Script, snapshot

from firewall.agent.loading import read as read_config
from firewall.policy.compile import make_l7_row
from firewall.policy.readers import read
from l7proxy.commands import SendUpstream

TEXT = (Path(__file__).resolve().parents[2] / "docs/l7.md").read_text()
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
RULES = [text for text in EXAMPLES if text.startswith("rules:")]
CONFIGURATIONS = [text for text in EXAMPLES if text.startswith("proxy:")]
POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: example}
spec:
  endpointSelector: {}
  ingress:
  - toPorts:
    - ports: [{port: "80", protocol: TCP}]
"""


def sent(rules: str, request: bytes, secret: bytes | None = None) -> bytes:
    """What a server gets of a request, b"" if these rules refuse it."""
    result = read(POLICY + textwrap.indent(rules, "      "), "example.yaml")
    assert [str(problem) for problem in result.problems] == []
    row = make_l7_row(result.objects[0].entries[0])
    script = Script(snapshot(row.http), secrets=lambda *_: secret)
    commands = script.perform("client_data", request) + script.perform("upstream_opened")
    return b"".join(command.data for command in commands if isinstance(command, SendUpstream))


def test_every_example_is_looked_at():
    assert len(RULES) == len(CONFIGURATIONS) == 2
    assert len(EXAMPLES) == 4


def test_grpc_methods_are_paths():
    for path, passes in (("GetName", True), ("GetLocation", True), ("RequestDoorAccess", False)):
        line = f"/cloudcity.DoorManager/{path} HTTP/1.1\r\nHost: s\r\n\r\n".encode()
        assert bool(sent(RULES[0], b"POST " + line)) is passes, path
        assert not sent(RULES[0], b"GET " + line)


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        (b"X-Squadron: black\r\n", True),
        (b"", False),
        (b"X-Squadron: red\r\n", False),
        (b"X-Squadron: black\r\nX-Squadron: red\r\n", False),
    ],
)
def test_header_rules_are_about_the_only_value_and_a_wrong_code_is_replaced(fields, passes):
    request = b"GET /dock HTTP/1.1\r\nHost: s\r\nX-Docking-Code: guess\r\n%b\r\n" % fields
    got = sent(RULES[1], request, secret=b"thx-1138")
    assert (b"x-docking-code: thx-1138\r\n" in got.lower(), b"guess" in got) == (passes, False)
    assert not sent(RULES[1], request, secret=None)


@pytest.mark.parametrize("text", CONFIGURATIONS)
def test_configurations_are_read(text):
    loaded = read_config(text, "bartizan.yaml")
    assert loaded.config.proxy != read_config("").config.proxy
