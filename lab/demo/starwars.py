r"""The Star Wars demo: who may land on the deathstar, and what may be said to it.

Five steps with real packets between throw-away hosts. Each shows a command, its output and the
flows that the firewall reports for it, and is checked.

Story and hosts follow Cilium's demo of the same name, so that its readers can compare.
"""

import re
from pathlib import Path

from lab.demo.chapter import CURL_TIMED_OUT, PACKET, REQUEST, Chapter, Story, curl, packet, request
from lab.demo.stage import Stage
from lab.laboratory import Lab

POLICIES = ("rule1-l4.yaml", "rule1-l7.yaml")

_DEATHSTAR = "deathstar.default.svc.cluster.local"
_RESTART_S = 60.0


def _landing() -> list[str]:
    return _curl("POST", "/v1/request-landing")


def _curl(method: str, path: str) -> list[str]:
    return curl(method, f"{_DEATHSTAR}{path}")


def _packet(ship: str, verdict: str) -> str:
    """A pattern for the flow of a ship's first packet."""
    return packet(ship, "deathstar:80", verdict)


class _Story(Story):
    title = "Star Wars"

    def __init__(self, lab: Lab, stage: Stage, folder: Path) -> None:
        super().__init__(lab, stage, folder)
        self._deathstar, self._tiefighter, self._xwing = (
            lab.host(name) for name in ("deathstar", "tiefighter", "xwing")
        )
        self.steps = (self.step1, self.step2, self.step3, self.step4, self.step5)

    def _lands(self, ship: str, kind: str, flow: str) -> str:
        self.stage.run(self.lab.host(ship), _landing(), output=r"Ship landed\nHTTP 200")
        return self.stage.flow(f"default/{ship}", kind, flow)

    def _is_dropped(self, ship: str) -> str:
        self.stage.run(self.lab.host(ship), _landing(), code=CURL_TIMED_OUT, output=r"^HTTP 000")
        return self.stage.flow(
            f"default/{ship}", PACKET, _packet(ship, "policy-verdict:none INGRESS DENIED")
        )

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
        self.apply(POLICIES[0], r"rule1.*created")
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
        self.apply(POLICIES[1], r"rule1.*configured")
        landing = rf"POST http://{re.escape(_DEATHSTAR)}/v1/request-landing"
        self._lands("tiefighter", REQUEST, request("FORWARDED", landing))
        self.stage.run(
            self._tiefighter, _curl("PUT", "/v1/exhaust-port"), output=r"Access denied\r?\nHTTP 403"
        )
        shot = rf"PUT http://{re.escape(_DEATHSTAR)}/v1/exhaust-port"
        self.stage.flow("default/tiefighter", REQUEST, request("DROPPED", shot))
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


CHAPTER = Chapter(
    name="starwars",
    topology="starwars.yaml",
    policies=POLICIES,
    story=_Story,
    servers={"deathstar": ("-m", "lab.demo.deathstar")},
)
