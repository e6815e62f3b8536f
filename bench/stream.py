"""One TCP stream through the node: plain, every packet in userspace, established in the kernel."""

import json
from statistics import median

from bench.build import PURE, builds, named, using
from bench.figure import Figure
from lab import daemon
from lab.laboratory import Host, Lab
from lab.topology import hosts

SECONDS = 4
ROUNDS = 5
PORT = 5201

_QUEUED = "every packet in userspace"


def measure() -> list[Figure]:
    """Take turns, so that a slow moment of the machine falls on all sides.

    What the kernel carries is the same on every build.
    """
    sides = [("bypass on", True, PURE, 0.90)]
    sides += [(_QUEUED, False, build, 0.45) for build in builds()]
    plain: list[float] = []
    found: dict[str, list[float]] = {named(what, build): [] for what, _, build, _ in sides}
    for _ in range(ROUNDS):
        with Lab(hosts(a="app=a", b="app=b")) as lab:
            plain.append(_gigabits(lab))
            for what, bypass, build, _ in sides:
                with using(build):
                    firewall = daemon.start(lab, {"workers": 1, "bypass": bypass})
                found[named(what, build)].append(_gigabits(lab))
                assert firewall.stop() == 0
    return [
        Figure(
            f"one TCP stream, {named(what, build)}",
            median(found[named(what, build)]),
            "Gbit/s",
            median(plain),
            "plain forwarding",
            at_least=promised,
        )
        for what, _, build, promised in sides
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
