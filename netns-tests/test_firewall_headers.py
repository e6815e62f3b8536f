"""Header rules: what the server is told, with every action and secrets from files."""

import sys
from contextlib import closing

import pytest
from rules import peers, policy, ports
from test_firewall_http import _client
from traffic import eventually

pytestmark = pytest.mark.needs("tproxy", "socket", "connmark")

SECRET = {"namespace": "default", "name": "code"}


def headers_matches(**match):
    http = [{"method": "GET", "headerMatches": [{"name": "X-Code", **match}]}]
    return policy("app=b", ingress=[{**peers("app=a"), **ports("80/TCP", http=http)}])


@pytest.fixture
def told(lab, bartizan):
    """What the server says that it was told about X-Code, or the status of a refusal."""
    made = lab(a="app=a", b="app=b")
    made.host("b").start([sys.executable, "-u", "-m", "lab.demo.hangar"])
    folder = made.folder / "secrets/default"
    folder.mkdir(parents=True)
    firewall = bartizan(made, {"proxy": {"secrets_dir": str(folder.parent)}})
    with eventually(lambda: _connected(made), "the server listens"):
        pass

    def again(code):
        with closing(_client(made.host("a"), made.host("b").address4)) as client:
            client.request("GET", "/", headers={"X-Code": code} if code else {})
            answer = client.getresponse()
            body = answer.read().decode()
        if answer.status != 200:
            return answer.status
            # What the proxy writes has lower-case names, as in Envoy.
        return body.removeprefix("the hangar was told ").strip().lower()

    def ask(rules, code):
        firewall.apply(rules)
        return again(code)

    ask.again = again
    ask.folder = folder
    ask.firewall = firewall
    return ask


def _connected(made):
    try:
        return made.host("a").connect(made.host("b").address4, 80, timeout_s=1)
    except OSError:
        return None


def test_actions_change_what_the_server_is_told_and_a_missing_secret_allows_nothing(told):
    """One lab for all: each is another policy of the same name."""
    wrong, right = "guess", "thx-1138"
    inline = {"value": right}
    assert told(headers_matches(**inline), wrong) == 403
    assert told(headers_matches(**inline), right) == f"x-code: {right}"
    assert told(headers_matches(**inline, mismatch="LOG"), wrong) == f"x-code: {wrong}"
    assert told(headers_matches(**inline, mismatch="REPLACE"), wrong) == f"x-code: {right}"
    assert told(headers_matches(**inline, mismatch="DELETE"), wrong) == "nothing"
    assert told(headers_matches(**inline, mismatch="ADD"), "") == f"x-code: {right}"
    secret = headers_matches(secret=SECRET, mismatch="REPLACE")
    assert told(secret, wrong) == 403
    replaced = told.folder / "code"
    replaced.write_text(f"{right}\n")
    eventually(lambda: told.again(wrong) == f"x-code: {right}", "the secret is there")
    must = headers_matches(secret=SECRET)
    assert told(must, right) == f"x-code: {right}"
    replaced.write_text("tk-421\n")
    eventually(lambda: told.again(right) == 403, "the old secret is worth nothing")
    assert told.again("tk-421") == "x-code: tk-421"
    for value in (right, "tk-421"):
        assert value not in told.firewall.log()
        assert value not in str(told.firewall.flows())
