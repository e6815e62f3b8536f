"""The chapter about names: where a droid may go on the holonet, and about whom it may ask.

Two steps with a real name server outside. The first shows what a name opens and what it does not,
the second what a pattern adds.
"""

import re
from pathlib import Path

from lab.demo.chapter import CURL_TIMED_OUT, PACKET, REQUEST, Chapter, Story, curl
from lab.demo.stage import Stage
from lab.laboratory import Lab

POLICIES = ("names-one.yaml", "names-all.yaml")

_API, _PLANS, _SITH = "api.holonet.example", "plans.holonet.example", "sith.example"

_CURL_UNRESOLVED = 6
"""curl(1): the host could not be resolved."""

_START_S = 60.0


def _question(name: str, verdict: str) -> str:
    """A pattern for the flow of a question; curl asks for both families."""
    return rf"dns-request proxy {verdict} .*\(DNS Query {re.escape(name)}\. A(AAA)?\)"


class _Story(Story):
    title = "Names on the holonet"

    def __init__(self, lab: Lab, stage: Stage, folder: Path) -> None:
        super().__init__(lab, stage, folder)
        self._mediabot, self._holonet = lab.host("mediabot"), lab.host("holonet")
        self.steps = (self.step1, self.step2)

    def _visits(self, name: str, address: str) -> None:
        self.stage.run(
            self._mediabot, curl("GET", name), output=rf"{name} is at {address}\nHTTP 200"
        )

    def step1(self) -> None:
        """One name."""
        stage = self.stage
        stage.scene(
            1, "A name is a destination: the addresses come from DNS",
            "The droid may ask the name server about *.holonet.example and connect to one name. "
            "The proxy in between learns the answer, and it goes out when the way is open.",
        )  # fmt: skip
        stage.wait_until(
            lambda: "operational" in self._holonet.log(), "the holonet is operational", _START_S
        )
        self.apply(POLICIES[0], r"names created")
        self._visits(_API, "203.0.113.10")
        stage.flow(
            "default/mediabot", PACKET, rf"-> {_API}:80 \(ID:\d+\) policy-verdict:L3-L4 .*ALLOWED"
        )
        stage.bartizan("fqdn", "cache", "list", output=rf"lookup +{_API}\. +60 .* 203\.0\.113\.10")
        stage.run(self._mediabot, curl("GET", _PLANS), code=CURL_TIMED_OUT, output=r"^HTTP 000")
        stage.flow("default/mediabot", PACKET, rf"-> {_PLANS}:80 .*policy-verdict:none .*DENIED")
        stage.run(self._mediabot, curl("GET", _SITH), code=_CURL_UNRESOLVED)
        stage.flow("default/mediabot", REQUEST, _question(_SITH, "DROPPED"))
        if _SITH in self._holonet.log():
            stage.differs(f"the question for {_SITH} left the node")

    def step2(self) -> None:
        """A pattern."""
        self.stage.scene(
            2, "A pattern: every name of the holonet",
            "The rule now means *.holonet.example. What was asked before counts at once: the same "
            "address gets another identity, and nobody has to ask again.",
        )  # fmt: skip
        self.apply(POLICIES[1], r"names configured")
        self._visits(_PLANS, "203.0.113.11")
        self.stage.flow(
            "default/mediabot", PACKET, rf"-> {_PLANS}:80 \(ID:\d+\) policy-verdict:L3-L4 .*ALLOWED"
        )
        self.stage.bartizan(
            "fqdn", "names", output=r"\*\.holonet\.example +api\.holonet\.example\."
        )


CHAPTER = Chapter(
    name="names",
    topology="names.yaml",
    policies=POLICIES,
    story=_Story,
    servers={"holonet": ("-m", "lab.demo.holonet")},
)
