"""The proxy's admin page, as a user of Envoy knows it, over a unix socket."""

import json
import re
import stat
import sys

import pytest
from rules import peers, policy, ports
from test_agent_handover import proxies, visit
from traffic import eventually

pytestmark = pytest.mark.needs("tproxy", "socket", "connmark", "curl")

SECRET = {"headerMatches": [{"name": "X-Token", "secret": {"name": "code"}, "mismatch": "LOG"}]}
RULES = policy(
    "app=b",
    ingress=[
        {**peers("app=a"), **ports("80/TCP", http=[{"method": "POST"}, {"path": "/x", **SECRET}])}
    ],
)


@pytest.fixture
def served(lab, bartizan):
    """a may POST to b."""
    made = lab(a="app=a", b="app=b")
    made.host("b").start([sys.executable, "-m", "lab.demo.deathstar"])
    eventually(lambda: "operational" in made.host("b").log(), "the server runs")
    made.firewall = bartizan(made)
    made.firewall.apply(RULES)
    return made


def test_the_admin_page_shows_and_changes_what_envoys_does(served):
    firewall, node = served.firewall, served.node
    path = firewall.run_dir / "proxy-admin.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o660

    def ask(target, *options):
        done = node.run(
            ["curl", "-s", "--unix-socket", path, "-w", "\n%{http_code}", *options,
             f"http://localhost{target}"]
        )  # fmt: skip
        body, _, status = done.stdout.rpartition("\n")
        return int(status), body

    def count(name):
        rows = json.loads(ask("/stats?format=json")[1])["stats"]
        return {row["name"]: row.get("value") for row in rows}.get(name, 0)

    assert ask("/ready") == (200, "LIVE\n")
    assert visit(served, "POST", "/v1/request-landing")[0] == 200
    assert visit(served, "GET", "/")[0] == 403
    eventually(lambda: count("http.bartizan.downstream_rq_completed") == 2, "both are counted")
    assert "http.bartizan.downstream_rq_2xx: 1\n" in ask("/stats?filter=rq_2xx&usedonly")[1]
    assert 'envoy_response_code_class="4"} 1\n' in ask("/stats/prometheus")[1]
    assert ask("/stats?filter=(")[0] == 400

    shown = firewall.cli("proxy", "list").stdout
    assert re.search(r"2 +default/b +ingress +80/TCP +http +15006 +2 +1 +1\n", shown), shown
    assert re.search(r"l7proxy-0 +\d+ +running", shown), shown
    status = firewall.cli("status").stdout
    assert "1 redirects active on port 15006, 2 requests received, 1 refused" in status

    dump = json.loads(ask("/config_dump")[1])
    (entry,) = dump["policies"]
    assert entry["endpoint"] == "default/b"
    assert dump["workers"]["l7proxy-0"]["revision"] == dump["snapshot_revision"]
    (match,) = entry["ingress"][0]["l7"]["http"][1]["header_matches"]
    assert (match["secret_name"], match["value"]) == ("code", "[redacted]")

    assert sorted(ask("/listeners")[1].splitlines()) == [
        "l7proxy-0-udp::0.0.0.0:15006", "l7proxy-0-udp::[::]:15006",
        "l7proxy-0::0.0.0.0:15006", "l7proxy-0::[::]:15006",
    ]  # fmt: skip
    assert "original_dst::upstream_cx_total::1\n" in ask("/clusters")[1]
    assert json.loads(ask("/certs")[1]) == {"certificates": []}
    assert int(json.loads(ask("/memory")[1])["total_physical_bytes"]) > 1_000_000
    assert json.loads(ask("/server_info")[1])["state"] == "LIVE"

    for change in ("/drain_listeners", "/logging?level=debug", "/reset_counters"):
        assert ask(change)[0] == 405
    assert ask("/logging?level=loud", "-X", "POST")[0] == 400
    assert ask("/logging?level=debug", "-X", "POST") == (200, "level: debug\n")
    assert ask("/reset_counters", "-X", "POST")[0] == 200
    eventually(lambda: count("http.bartizan.downstream_rq_total") == 0, "counted from zero")
    before = proxies(firewall)
    assert ask("/drain_listeners", "-X", "POST")[0] == 200
    eventually(lambda: proxies(firewall) and not proxies(firewall) & before, "a fresh one")
    assert visit(served, "POST", "/v1/request-landing")[0] == 200
    assert firewall.stop() == 0
    assert not path.exists()
