"""A real gRPC client and a real gRPC server with the proxy between them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from test_l7proxy_transparent import World, listening, receive
from traffic import DEADLINE_S

from firewall.policy.snapshot import HttpRuleRow

PEERS = Path(__file__).parent / "grpc_peers.py"
RULES = (
    HttpRuleRow(method="POST", path=r"/demo\.Echo/(Unary|Fails|Counts|Sums|Both)"),
    HttpRuleRow(method="GET", path="/public/.*"),
)

pytestmark = [
    pytest.mark.needs("tproxy", "tproxy6", "socket", "socket6", "ipv6"),
    pytest.mark.skipif(importlib.util.find_spec("grpc") is None, reason="grpcio is not installed"),
]


SEEN = {
    "unary": "echo hi",
    "forbidden": ["PERMISSION_DENIED", "Access denied"],
    "after": "echo hi",
    "fails": ["FAILED_PRECONDITION", "not today: 100%"],
    "trailing": ["echo hi", "kept"],
    "turns": [f"echo {number}" for number in range(5)],
    "counts": 1 << 20,
    "sums": 1 << 20,
    "many": 80,
}
"""What a client gets that may call all methods but one."""


def talk(world):
    """What the client process printed."""
    done = world.client.run(
        [sys.executable, PEERS, "client", world.server.address4, "80"]
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_grpc_calls_pass_or_are_denied_by_method_streaming_both_ways(lab, tmp_path):
    """More bytes than any window each way, calls in turn, 80 at once, status and trailers kept."""
    world = World(lab, tmp_path, rules=RULES)
    server = world.server.popen([sys.executable, "-u", PEERS, "server", "0.0.0.0", "80"])
    try:
        assert server.stdout.readline().strip() in {b"serving", "serving"}
        with world.live:
            seen = talk(world)
            assert world.live.running, world.live.log()
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    assert seen == SEEN
    log = world.live.access_log.read_text(encoding="ascii")
    assert '"POST /demo.Echo/Forbidden HTTP/2" 403 UAEX' in log
    assert log.count('"POST /demo.Echo/Unary HTTP/2" 200 - ') == 83


def test_grpc_to_a_server_of_http1_is_unavailable(lab, tmp_path):
    """It has seen a preface and no request."""
    world = World(lab, tmp_path, rules=RULES)
    with world.live, listening(world) as server:
        client = world.client.popen(
            [sys.executable, PEERS, "client", world.server.address4, "80"]
        )  # fmt: skip
        connection, _ = server.accept()
        connection.settimeout(DEADLINE_S)
        seen = receive(connection, b"SM\r\n\r\n")
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        connection.close()
        output, _ = client.communicate(timeout=DEADLINE_S)
    assert b"demo.Echo" not in seen
    assert '"unary": ["UNAVAILABLE", "Bad Gateway"]' in str(output), output
