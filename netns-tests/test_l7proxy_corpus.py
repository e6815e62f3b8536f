"""The adversarial HTTP corpus against a live proxy worker behind TPROXY.

The corpus's own runner is client and server in one: it connects to 10.0.2.1, which is redirected,
and records what arrives at 127.0.0.1, where the proxy's connections to 10.0.2.1 are translated to.
Nothing in the proxy knows of it. Goal: no critical, high or medium (corpus README).
"""

import base64
import json
import socket
import sys
from pathlib import Path

import pytest
from header_corpus import HEADER_RULES, NOT_EXPRESSIBLE
from l7proxy_live import MARK, Live, snapshot
from tls_world import TlsServer
from traffic import DEADLINE_S

from conntrack.address import parse_address

CORPUS = Path(__file__).resolve().parents[1] / "../shared/corpus/http"
PORT = 19080
"""Where the runner's server listens."""

pytestmark = [
    pytest.mark.needs("tproxy"),
    pytest.mark.skipif(not (CORPUS / "run_h1.py").exists(), reason=f"{CORPUS} is not here"),
]


def severities(lab, tmp_path, *options, runner="run_h1.py"):
    host = lab(a="app=a").hosts["a"]
    for argv in (
        "ip addr add 10.0.1.1/32 dev lo",
        "ip addr add 10.0.2.1/32 dev lo",
        "ip route replace local 10.0.2.1 dev lo table local src 10.0.1.1",
    ):
        host.run(argv.split(), check=True)
    with Live(host, tmp_path, port=PORT) as live:
        live.redirect("10.0.2.1", PORT)
        host.run(
            f"iptables -t nat -A OUTPUT -p tcp -d 10.0.2.1 --dport {PORT} -m mark --mark {MARK} "
            f"-j DNAT --to-destination 127.0.0.1:{PORT}".split(),
            check=True,
        )
        out = tmp_path / "results.jsonl"
        done = host.run(
            # The HTTP/2 runner imports build_h2, which lies beside this file, and what lies beside
            # itself: without the PYTHONSAFEPATH of `make test-compiled`.
            ["env", "-u", "PYTHONSAFEPATH", f"PYTHONPATH={Path(__file__).parent}",
             sys.executable, "-B", CORPUS / runner, "--proxy",
             f"10.0.2.1:{PORT}", "--out", out, *options],
            240,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert live.running, live.log()
    results = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert results
    return {
        row["id"]: (row["severity"], row["violations"])
        for row in results
        if row["severity"] not in {"ok", "lenient"}
    }


def test_no_case_reaches_the_server_or_wedges_the_proxy(lab, tmp_path):
    assert severities(lab, tmp_path) == {}


def test_clients_that_drip_or_leave_are_ended(lab, tmp_path):
    """`--slow` without the case that only waits for 40 s."""
    assert severities(lab, tmp_path, "--slow", "--only", "resource-(slow|rst)") == {}


def test_no_http2_case_reaches_the_server_or_wedges_the_proxy(lab, tmp_path):
    assert severities(lab, tmp_path, runner="run_h2.py") == {}


@pytest.mark.needs("socket")
def test_header_and_host_rules_are_held_against_what_the_server_gets(lab, tmp_path):
    world = lab(a="app=a", b="app=b")
    client, server = world.hosts["a"], world.hosts["b"]
    secret = tmp_path / "secrets" / "default" / "token"
    secret.parent.mkdir(parents=True)
    secret.write_bytes(b"secret")
    source = snapshot(
        rules=HEADER_RULES,
        clients=(parse_address(client.address4),),
        servers=(parse_address(server.address4),),
    )
    live = Live(world.node, tmp_path, "--secrets-dir", tmp_path / "secrets", source=source)
    live.redirect(server.address4, 80)
    lines = (CORPUS / "h1_header_policy.jsonl").read_text(encoding="utf-8").splitlines()
    cases = [case for case in map(json.loads, lines) if case["id"] not in NOT_EXPRESSIBLE]
    assert cases
    wrong = []
    with live:
        upstream = TlsServer(server.listen(80), None)
        for case in cases:
            before = len(upstream.heads)
            with client.connect(server.address4, 80) as sock:
                sock.settimeout(DEADLINE_S)
                sock.sendall(base64.b64decode(case["bytes_b64"]))
                sock.shutdown(socket.SHUT_WR)
                status = sock.recv(65536)[9:12]
            answer = {b"200": "forward", b"403": "403", b"400": "400-close"}.get(
                status, str(status)
            )
            accepted = set(case["accept_first"])
            if "either-reject" in accepted:
                accepted |= {"403", "400-close"}
            seen = [
                line.lower() for head in upstream.heads[before:] for line in head.split(b"\r\n")
            ]
            wanted = [
                f"{name}: {value}".lower().encode()
                for name, value in (case["expect_upstream_headers"] or {}).items()
                if answer == "forward"
            ]
            if answer not in accepted or not set(wanted) <= set(seen):
                wrong.append((case["id"], answer, seen))
            if answer != "forward" and seen:
                wrong.append((case["id"], "reached the server", seen))
        upstream.close()
    assert not wrong
