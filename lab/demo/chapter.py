"""What a demo is made of: chapters, each a lab of its own with a story in steps.

A chapter's module makes one `Chapter` value and names it `CHAPTER`; `lab.demo.play` lists them all.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lab import enclosure
from lab.demo.stage import Stage
from lab.laboratory import Lab

PACKET, REQUEST = "policy-verdict", "l7"
"""Kinds of flows, as `bartizan observe --type` names them."""

CURL_TIMED_OUT = 28
"""curl(1): the time-out was reached."""

_CONNECT_TIMEOUT_S = "3"


class Story:
    """The steps of one chapter, in order; each stands on what those before it left.

    Attributes:
        lab: The hosts.
        stage: Where everything is shown and checked.
        folder: Where the reader's policies are.
        steps: What happens.
    """

    title = ""
    """What the chapter is about, in a few words."""

    def __init__(self, lab: Lab, stage: Stage, folder: Path) -> None:
        """Take the stage; nothing is shown yet."""
        self.lab = lab
        self.stage = stage
        self.folder = folder
        self.steps: tuple[Callable[[], None], ...] = ()

    def prologue(self) -> None:
        """Say where we are, and put every host that is managed under policy."""
        stage, count = self.stage, len(self.lab.hosts)
        stage.line(f"{self.title}, {enclosure.describe()}.")
        stage.line(f"{count} hosts, one link each to the node, where bartizan runs:")
        for host in self.lab.hosts.values():
            if not host.plan.managed:
                continue
            labels = [
                word
                for key, value in host.plan.labels.items()
                for word in ("--label", f"{key}={value}")
            ]
            stage.bartizan(
                "endpoint", "add", host.name, "--ip", host.address4, *labels, "--netns", host.name,
                quiet=True,
            )  # fmt: skip

    def apply(self, name: str, change: str) -> None:
        """Apply one of the reader's policies; `change` is a pattern for what the command says."""
        self.stage.bartizan("policy", "apply", "-f", str(self.folder / name), output=change)


class Chapter(NamedTuple):
    """One chapter.

    Attributes:
        name: As on the command line.
        topology: The file of its hosts, in this folder.
        policies: The files that the reader may change, in this folder.
        story: What happens in it.
        servers: Command lines by the host that they are started on; {folder} is the lab's.
        config: Settings of bartizan besides the defaults; {folder} is the lab's.
    """

    name: str
    topology: str
    policies: tuple[str, ...]
    story: type[Story]
    servers: Mapping[str, Sequence[str]] = {}
    config: Mapping[str, Any] = {}


def curl(method: str, url: str, *options: str) -> list[str]:
    """Return a request by curl that prints the answer and its status."""
    # curl prints nothing about a drop or a status by itself; -w does.
    return [
        "curl", "-s", "--connect-timeout", _CONNECT_TIMEOUT_S, "-w", r"HTTP %{http_code}\n",
        "-X", method, *options, url,
    ]  # fmt: skip


def packet(source: str, destination: str, verdict: str) -> str:
    """Return a pattern for the flow of a connection's first packet to "host:port"."""
    ends = rf"default/{source}:\d+ \(ID:\d+\) \S+ default/{destination} \(ID:\d+\)"
    return rf"{ends} {verdict} .*TCP Flags: SYN\b"


def request(verdict: str, line: str, protocol: str = r"HTTP/1\.1") -> str:
    """Return a pattern for the flow of an HTTP request; `line` is a pattern: method, space, URL."""
    return rf"http-request {verdict}.* \({protocol} {line}\)"
