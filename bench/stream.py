"""One TCP stream through the node: plain forwarding against every packet in userspace."""

import json
from statistics import median

from bench.figure import Figure
from lab import daemon
from lab.laboratory import Host, Lab
from lab.topology import hosts

SECONDS = 4
ROUNDS = 3
PORT = 5201


def measure() -> list[Figure]:
    """Take turns, so that a slow moment of the machine falls on both sides."""
    plain, queued = [], []
    for _ in range(ROUNDS):
        with Lab(hosts(a="app=a", b="app=b")) as lab:
            plain.append(_gigabits(lab))
            firewall = daemon.start(lab, {"workers": 1})
            queued.append(_gigabits(lab))
            assert firewall.stop() == 0
    return [
        Figure(
            "one TCP stream, every packet in userspace",
            median(queued),
            "Gbit/s",
            median(plain),
            "plain forwarding",
            at_least=0.35,
        )
    ]


def _gigabits(lab: Lab) -> float:
    client, server = lab.host("a"), lab.host("b")
    listening = server.popen(["iperf3", "-s", "-1", "-p", str(PORT)])
    _await_listener(server)
    done = client.run(
        ["iperf3", "-c", server.address4, "-p", str(PORT), "-t", str(SECONDS), "-O", "1", "-J"],
        timeout_s=SECONDS + 20,
        check=True,
    )
    listening.wait(10)
    return json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"] / 1e9


def _await_listener(server: Host) -> None:
    for _ in range(500):
        if f":{PORT}" in server.run(["ss", "-ltnH"]).stdout:
            return
    raise TimeoutError("iperf3 does not listen")
