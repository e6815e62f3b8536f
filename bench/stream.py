"""One TCP stream through the node: plain, every packet in userspace, established in the kernel."""

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
    """Take turns, so that a slow moment of the machine falls on all sides."""
    plain: list[float] = []
    queued: list[float] = []
    carried: list[float] = []
    for _ in range(ROUNDS):
        with Lab(hosts(a="app=a", b="app=b")) as lab:
            plain.append(_gigabits(lab))
            for bypass, results in (("off", queued), ("on", carried)):
                firewall = daemon.start(lab, {"workers": 1, "bypass": bypass == "on"})
                results.append(_gigabits(lab))
                assert firewall.stop() == 0
    return [
        Figure(
            f"one TCP stream, {what}",
            median(results),
            "Gbit/s",
            median(plain),
            "plain forwarding",
            at_least=promised,
        )
        for what, results, promised in (
            ("bypass on", carried, 0.90),
            ("every packet in userspace", queued, 0.45),
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
    return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e9


def _await_listener(server: Host) -> None:
    for _ in range(500):
        if f":{PORT}" in server.run(["ss", "-ltnH"]).stdout:
            return
    raise TimeoutError("iperf3 does not listen")
