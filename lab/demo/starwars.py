r"""The Star Wars demo: who may land on the deathstar, and what may be said to it.

Five steps with real packets between throw-away hosts. Each shows a command, its output and the
flows that the firewall reports for it, and is checked; the exit code is 0 only if every answer,
HTTP status and flow came as it should.

Story and hosts follow Cilium's demo of the same name, so that its readers can compare.
"""

import argparse
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from lab import daemon, enclosure, topology
from lab.commands import python_environment
from lab.demo.stage import Stage
from lab.laboratory import Lab, LabError

STEPS = 5

POLICIES = ("rule1-l4.yaml", "rule1-l7.yaml")

PACKET, REQUEST = "policy-verdict", "l7"
"""Kinds of flows, as `bartizan observe --type` names them."""

CURL_TIMED_OUT = 28
"""curl(1): the time-out was reached."""

_CONNECT_TIMEOUT_S = "3"
_HERE = Path(__file__).parent
_DEATHSTAR = "deathstar.default.svc.cluster.local"
_RESTART_S = 15.0


def main(step: int | None, folder: Path) -> int:
    """Play the demo up to `step` (None = all) in an enclosure; policies go to `folder`.

    Returns:
        0, 1 if something differed, 2 if the folder cannot be written, 3 if this machine cannot.
    """
    lacking = daemon.missing_programs(("ip", "nsenter", "iptables", "ip6tables", "ipset", "curl"))
    if lacking:
        print(f"the demo needs {', '.join(lacking)}: install them first", file=sys.stderr)
        return enclosure.CANNOT
    try:
        _write_policies(folder)
    except OSError as error:
        print(f"cannot write the policies to {folder}: {error.strerror}", file=sys.stderr)
        return 2
    if enclosure.mode() is not None:
        return _play(step or STEPS, folder)
    inside = [sys.executable, "-m", "lab.demo.starwars", str(folder), "--step", str(step or STEPS)]
    argv = [sys.executable, "-m", "lab.enclosure", "--quiet", "--", *inside]
    # ^C is for what plays inside, which takes its lab away and then ends.
    signal.signal(signal.SIGINT, lambda *_: None)
    return subprocess.run(argv, check=False, env=python_environment()).returncode


def _write_policies(folder: Path) -> None:
    """Put the policies there; what is there already may have been edited, and stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in POLICIES:
        if not (folder / name).exists():
            shutil.copyfile(_HERE / name, folder / name)


def _play(last: int, folder: Path) -> int:
    began = time.monotonic()
    try:
        with Lab(topology.read(_HERE / "starwars.yaml")) as lab:
            lab.host("deathstar").start([sys.executable, "-m", "lab.demo.deathstar"])
            firewall = daemon.start(lab, endpoints=False)
            story = _Story(lab, Stage(lab, firewall), folder)
            story.prologue()
            for step in story.steps[:last]:
                # Each step stands on those before it: after a difference the rest says nothing.
                if not story.stage.differences:
                    step()
            return story.stage.curtain(time.monotonic() - began, folder)
    except LabError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _landing() -> list[str]:
    return _curl("POST", "/v1/request-landing")


def _curl(method: str, path: str) -> list[str]:
    # curl prints nothing about a drop or a status by itself; -w does.
    return [
        "curl", "-s", "--connect-timeout", _CONNECT_TIMEOUT_S, "-w", r"HTTP %{http_code}\n",
        "-X", method, f"{_DEATHSTAR}{path}",
    ]  # fmt: skip


def _packet(ship: str, verdict: str) -> str:
    """A pattern for the flow of a ship's first packet."""
    ends = rf"default/{ship}:\d+ \(ID:\d+\) \S+ default/deathstar:80 \(ID:\d+\)"
    return rf"{ends} {verdict} .*TCP Flags: SYN\b"


def _request(verdict: str, request: str) -> str:
    """A pattern for the flow of an HTTP request."""
    return rf"http-request {verdict}.* \(HTTP/1\.1 {request}\)"


class _Story:
    """The five steps, in order; each stands on what those before it left."""

    def __init__(self, lab: Lab, stage: Stage, folder: Path) -> None:
        self.stage = stage
        self._lab = lab
        self._folder = folder
        self._deathstar, self._tiefighter, self._xwing = (
            lab.host(name) for name in ("deathstar", "tiefighter", "xwing")
        )
        self.steps = (self.step1, self.step2, self.step3, self.step4, self.step5)

    def prologue(self) -> None:
        """Say where we are, and put the ships under policy."""
        stage = self.stage
        stage.line(f"Star Wars, {enclosure.describe()}.")
        stage.line("Three hosts, one link each to the node, where bartizan runs:")
        for host in self._lab.hosts.values():
            labels = [
                word
                for key, value in host.plan.labels.items()
                for word in ("--label", f"{key}={value}")
            ]
            stage.bartizan(
                "endpoint", "add", host.name, "--ip", host.address4, *labels, "--netns", host.name,
                quiet=True,
            )  # fmt: skip

    def _lands(self, ship: str, kind: str, flow: str) -> str:
        self.stage.run(self._lab.host(ship), _landing(), output=r"Ship landed\nHTTP 200")
        return self.stage.flow(f"default/{ship}", kind, flow)

    def _is_dropped(self, ship: str) -> str:
        self.stage.run(self._lab.host(ship), _landing(), code=CURL_TIMED_OUT, output=r"^HTTP 000")
        return self.stage.flow(
            f"default/{ship}", PACKET, _packet(ship, "policy-verdict:none INGRESS DENIED")
        )

    def _apply(self, name: str, change: str) -> None:
        self.stage.bartizan("policy", "apply", "-f", str(self._folder / name), output=change)

    def step1(self) -> None:
        """No policy."""
        self.stage.scene(
            1, "No policy: everybody lands",
            "An endpoint that no policy selects is open, as in Cilium and Kubernetes.",
        )  # fmt: skip
        for ship in ("xwing", "tiefighter"):
            self._lands(ship, PACKET, _packet(ship, r".*\b(ALLOWED|FORWARDED)"))

    def step2(self) -> None:
        """Labels and a port."""
        self.stage.scene(
            2, "A rule for labels and a port: only the empire lands",
            "The rule speaks of identities, not addresses: org=empire may reach port 80. The "
            "xwing's packets end at the node; its curl waits until it gives up (exit 28).",
        )  # fmt: skip
        self._apply(POLICIES[0], r"rule1.*created")
        self._lands(
            "tiefighter", PACKET, _packet("tiefighter", "policy-verdict:L3-L4 INGRESS ALLOWED")
        )
        self._is_dropped("xwing")
        self.stage.bartizan("endpoint", "list", output=r"deathstar +Enabled")

    def step3(self) -> None:
        """What a port cannot say."""
        self.stage.scene(
            3, "A port is not enough: the tiefighter shoots",
            "Port 80 is allowed, so every request on it is, the one that blows up the deathstar "
            "too. (It dies of it in two seconds, and is started again.)",
        )  # fmt: skip
        before = len(_restarts(self._deathstar.log()))
        self.stage.run(
            self._tiefighter, _curl("PUT", "/v1/exhaust-port"),
            output=r"Panic: deathstar exploded[\s\S]*HTTP 503",
        )  # fmt: skip
        self.stage.flow(
            "default/tiefighter",
            PACKET,
            _packet("tiefighter", "policy-verdict:L3-L4 INGRESS ALLOWED"),
        )
        ends = self.stage.wait_until(
            lambda: _restarts(self._deathstar.log())[before:],
            "the deathstar dies of the shot and is started again",
            _RESTART_S,
        )
        for line in ends or ():
            self.stage.line(f"\n  {line}")

    def step4(self) -> None:
        """A rule for requests."""
        self.stage.scene(
            4, "A rule for requests: land, but do not shoot",
            "The same rule, now with what may be said: POST /v1/request-landing. Another request "
            "is answered by the proxy with 403 and never reaches the deathstar.",
        )  # fmt: skip
        self._apply(POLICIES[1], r"rule1.*configured")
        landing = rf"POST http://{re.escape(_DEATHSTAR)}/v1/request-landing"
        self._lands("tiefighter", REQUEST, _request("FORWARDED", landing))
        self.stage.run(
            self._tiefighter, _curl("PUT", "/v1/exhaust-port"), output=r"Access denied\r?\nHTTP 403"
        )
        shot = rf"PUT http://{re.escape(_DEATHSTAR)}/v1/exhaust-port"
        self.stage.flow("default/tiefighter", REQUEST, _request("DROPPED", shot))
        self._is_dropped("xwing")

    def step5(self) -> None:
        """Labels make the identity."""
        self.stage.scene(
            5, "Another label is another identity: the xwing changes sides, and back",
            "No address changes and no policy; only what the xwing is. Compare the (ID:...) of "
            "its flows.",
        )  # fmt: skip
        self.stage.bartizan("endpoint", "label", "xwing", "org=empire")
        landed = self._lands(
            "xwing", PACKET, _packet("xwing", r"policy-verdict:\S+ INGRESS ALLOWED")
        )
        self.stage.bartizan("endpoint", "label", "xwing", "org=alliance")
        dropped = self._is_dropped("xwing")
        if landed and dropped and _identity(landed) == _identity(dropped):
            self.stage.differs("the xwing kept its identity although its labels changed")


def _identity(flow: str) -> str:
    """The number of the first host of a flow line."""
    found = re.search(r"\(ID:(\d+)\)", flow)
    return found[1] if found else ""


def _restarts(log: str) -> list[str]:
    """Lines of the supervisor about a server that died."""
    return re.findall(r"deathstar: .* restarting", log)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lab.demo.starwars", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("bartizan-demo"))
    parser.add_argument("--step", type=int, choices=range(1, STEPS + 1), help="the last step")
    chosen = parser.parse_args()
    sys.exit(main(chosen.step, chosen.folder))
