"""Why: for packets that were really sent, the rule that decided, with its file and line."""

import http.client
import json
import subprocess
import sys

import pytest
from evidence import dropped, flow, forwarded
from traffic import DEADLINE_S, delivered, echo, eventually, tcp, token, udp

POLICY = """\
# what may reach b, and what b may reach
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: guard, namespace: default}
spec:
  endpointSelector:
    matchLabels: {app: b}
  ingress:
  - fromEndpoints:
    - matchLabels: {app: a}
    toPorts:
    - ports:
      - {port: "80", protocol: TCP}
      rules:
        http:
        - {method: GET, path: "/v1/"}
  - fromEndpoints:
    - matchLabels: {app: a}
    toPorts:
    - ports:
      - {port: "9000", protocol: UDP}
  ingressDeny:
  - fromEndpoints:
    - matchLabels: {app: c}
  egress:
  - toEndpoints:
    - matchLabels: {app: a}
    icmps:
    - fields:
      - {type: 8}
"""

pytestmark = pytest.mark.needs("tproxy", "socket", "connmark")


def _line(text: str, after: str = "") -> int:
    """The line (from 1) of the first `text` after the first `after`."""
    start = POLICY.index(after)
    return POLICY.count("\n", 0, POLICY.index(text, start)) + 1


ALLOW_HTTP = _line("- ports:")
ALLOW_UDP = _line("- ports:", '"/v1/"')
DENY = _line("- fromEndpoints:", "ingressDeny")
EGRESS = _line("- toEndpoints:")


@pytest.fixture(scope="module")
def running(module_lab, module_bartizan):
    made = module_lab(a="app=a", b="app=b", c="app=c")
    made.firewall = module_bartizan(made)
    made.host("b").start([sys.executable, "-m", "lab.demo.deathstar"])
    eventually(lambda: "operational" in made.host("b").log(), "the server runs")
    return made


@pytest.fixture
def three(running, tmp_path):
    """a may ask b, c is denied; the policy is a file, applied by the command."""
    running.firewall.clear()
    running.file = tmp_path / "guard.yaml"
    running.file.write_text(POLICY, encoding="utf-8")
    done = running.firewall.cli("policy", "apply", "-f", running.file)
    assert done.returncode == 0, done.stderr
    return running


def _why(three, uuid: str) -> dict:
    done = three.firewall.cli("why", uuid, "-o", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _decided(side: dict) -> list[tuple[str, int]]:
    return [(s["rule"]["file"], s["rule"]["line"]) for s in side["steps"] if s.get("decided")]


def test_a_dropped_syn_names_the_closest_rule_and_the_port_that_failed(three):
    """L4: a may use 80 and is refused at 81."""
    syn = tcp(three.host("a"), three.host("b"), 81)
    three.host("a").send(bytes(syn))
    record = dropped(three.firewall, syn)
    answer = _why(three, record["uuid"])
    side = answer["explanation"]["ingress"]
    assert (side["verdict"], side["because"]) == ("denied", "default deny")
    assert side["failed"]["what"] == "port"
    assert side["closest"]["rule"]["line"] == ALLOW_HTTP
    assert {one["line"] for one in side["isolated_by"]} >= {ALLOW_HTTP}
    text = three.firewall.cli("why", "--last-drop").stdout
    assert f"{three.file}:{ALLOW_HTTP}:" in text
    assert "port wanted 80/TCP, found 81/TCP" in text


def test_an_explicit_deny_names_its_line(three):
    """L3: c is denied by a rule, not by the default."""
    syn = tcp(three.host("c"), three.host("b"), 80)
    three.host("c").send(bytes(syn))
    answer = _why(three, dropped(three.firewall, syn, "POLICY_DENY")["uuid"])
    side = answer["explanation"]["ingress"]
    assert side["because"] == "a deny rule"
    assert _decided(side) == [(str(three.file), DENY)]


def test_an_egress_denial_is_explained_at_the_sender(three):
    """b may ping a, and is refused everything else."""
    datagram = udp(three.host("b"), three.host("a"), 53, token())
    three.host("b").send(bytes(datagram))
    explanation = _why(three, dropped(three.firewall, datagram)["uuid"])["explanation"]
    assert explanation["egress"]["verdict"] == "denied"
    assert explanation["egress"]["closest"]["rule"]["line"] == EGRESS
    assert explanation["ingress"]["verdict"] == "allowed"


def test_an_allowed_packet_names_the_rule_that_allowed_it(three):
    """Both an ingress and an egress allow."""
    payload = token()
    datagram = udp(three.host("a"), three.host("b"), 9000, payload)
    delivered(three.host("a"), three.host("b"), datagram, payload)
    side = _why(three, forwarded(three.firewall, datagram)["uuid"])["explanation"]["ingress"]
    assert side["verdict"] == "allowed"
    assert _decided(side) == [(str(three.file), ALLOW_UDP)]
    payload = token()
    ping = echo(three.host("b"), three.host("a"), payload)
    delivered(three.host("b"), three.host("a"), ping, payload)
    side = _why(three, forwarded(three.firewall, ping)["uuid"])["explanation"]["egress"]
    assert _decided(side) == [(str(three.file), EGRESS)]


def _refused_request(three) -> dict:
    """Send a request that the proxy refuses; the flow record of it."""
    client = http.client.HTTPConnection("b", 80, timeout=DEADLINE_S)
    client.sock = three.host("a").connect(three.host("b").address4, 80)
    client.request("PUT", "/v1/exhaust-port")
    answer = client.getresponse()
    assert answer.status == 403
    answer.read()
    client.close()
    return flow(
        three.firewall,
        lambda record: record.get("l7", {}).get("http", {}).get("method") == "PUT",
        verdict="DROPPED",
    )


def test_a_refused_request_is_held_against_the_http_rule(three):
    """L7: the 403 is explained field by field."""
    answer = _why(three, _refused_request(three)["uuid"])
    assert "notes" not in answer
    side = answer["explanation"]["ingress"]
    assert side["because"].startswith("the proxy refuses the request")
    assert _decided(side) == [(str(three.file), ALLOW_HTTP)]
    failed = {
        one["what"]: one["actual"] for one in side["closest"]["conditions"] if not one["held"]
    }
    assert failed == {"method": "PUT", "path": "/v1/exhaust-port"}


def test_the_suggested_patch_opens_the_way(three):
    """Patch the file, apply it, send the same request again: it arrives."""
    _refused_request(three)
    patch = three.firewall.cli("policy", "suggest", "--last-drop")
    assert patch.returncode == 0, patch.stderr
    done = subprocess.run(
        ["patch", "-p1", "-d", "/"], input=patch.stdout, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, (patch.stdout, done.stdout, done.stderr)
    assert three.file.read_text().startswith("# what may reach b")
    assert three.firewall.cli("policy", "apply", "-f", three.file).returncode == 0
    client = http.client.HTTPConnection("b", 80, timeout=DEADLINE_S)
    client.sock = three.host("a").connect(three.host("b").address4, 80)
    client.request("PUT", "/v1/exhaust-port")
    assert client.getresponse().status != 403
    client.close()


def test_a_flow_is_explained_by_the_policy_that_decided_it(three):
    """Afterwards the rule is gone; the answer is the old one and says that it is old."""
    syn = tcp(three.host("c"), three.host("b"), 80)
    three.host("c").send(bytes(syn))
    uuid = dropped(three.firewall, syn, "POLICY_DENY")["uuid"]
    three.firewall.withdraw("CiliumNetworkPolicy", "guard")
    answer = _why(three, uuid)
    assert answer["explanation"]["ingress"]["because"] == "a deny rule"
    assert answer["flow_revision"] == answer["explained_revision"] < answer["current_revision"]
    assert "policy has changed since" in answer["notes"][0]


def test_observe_adds_the_reason_on_request(three):
    """In JSON under extensions, in compact output indented below the line."""
    syn = tcp(three.host("a"), three.host("b"), 82)
    three.host("a").send(bytes(syn))
    uuid = dropped(three.firewall, syn)["uuid"]
    lines = three.firewall.cli("observe", "-o", "json", "--why", "--uuid", uuid).stdout
    record = json.loads(lines)["flow"]
    assert record["extensions"]["value"]["explanation"]["verdict"] == "denied"
    plain = json.loads(three.firewall.cli("observe", "-o", "json", "--uuid", uuid).stdout)["flow"]
    assert "explanation" not in plain["extensions"]["value"]
    compact = three.firewall.cli("observe", "--why", "--uuid", uuid).stdout
    assert "    closest rule  allow by CiliumNetworkPolicy default/guard" in compact
    assert f"{three.file}:{ALLOW_HTTP}:" in compact


def test_a_trace_answers_as_the_packets_do(three):
    """Without sending anything, with an exit code."""
    allowed = three.firewall.cli("policy", "trace", "--from", "a", "--to", "default/b:9000/UDP")
    assert (allowed.returncode, allowed.stdout.splitlines()[-1]) == (0, "Final verdict: ALLOWED")
    ask = ["policy", "trace", "--from", "a", "--to", "b:80/TCP", "--http"]
    refused = three.firewall.cli(*ask, "PUT /v1/x")
    assert (refused.returncode, refused.stdout.splitlines()[-1]) == (1, "Final verdict: DENIED")
    proxied = three.firewall.cli(*ask, "GET /v1/")
    assert (proxied.returncode, proxied.stdout.splitlines()[-1]) == (
        0,
        "Final verdict: REDIRECTED",
    )
    pinged = three.firewall.cli("policy", "trace", "--from", "b", "--to", "a:EchoRequest/ICMP")
    assert pinged.returncode == 0
    by_label = ["policy", "trace", "-s", "app=zzz", "-d", "app=b", "--dport", "80"]
    assert three.firewall.cli(*by_label).returncode == 1


def test_a_drop_that_no_policy_decided_says_what_it_was(three):
    """A spoofed source; nothing is suggested, because no policy could help."""
    spoofed = udp(three.host("c").address4, three.host("b"), 9000, token())
    three.host("a").send(bytes(spoofed))
    uuid = dropped(three.firewall, spoofed, "INVALID_SOURCE_IP")["uuid"]
    answer = _why(three, uuid)
    assert "explanation" not in answer
    assert answer["notes"][0].startswith("no policy decided this: Invalid source ip")
    refused = three.firewall.cli("policy", "suggest", uuid)
    assert refused.returncode == 1
    assert "no policy decided this flow" in refused.stderr


def test_an_unknown_flow_is_an_error_and_no_answer(three):
    """Exit code 1, and how many flows are kept."""
    done = three.firewall.cli("why", "00000000-dead")
    assert done.returncode == 1
    assert "no flow 00000000-dead is kept" in done.stderr
