"""The packet scripts in plays/, run against our tracker."""

import dataclasses
from pathlib import Path

import packet_script
import pytest
from packet_script import Ends, Segment

from conntrack.packet import parse
from conntrack.tracker import LINUX, STRICT, Tracker

PLAYS = sorted((Path(__file__).parent / "plays").glob("*.play"))
TOLERANCE_S = 1.0


class Stage:
    """One tracker, one pair of ends, and the time."""

    def __init__(self) -> None:
        self.tracker = Tracker(STRICT)
        self.ends = Ends()
        self.now = 100.0

    def direct(self, words: list[str]) -> None:
        match words:
            case ["profile", "strict"]:
                self.tracker = Tracker(STRICT)
            case ["profile", "linux"]:
                self.tracker = Tracker(LINUX)
            case ["loose", state]:
                self.tracker.loose = state == "on"
            case ["liberal", "on"]:
                self.tracker.profile = dataclasses.replace(self.tracker.profile, liberal=True)
            case ["wait", seconds]:
                self.now += float(seconds)
            case ["port", client, server]:
                self.ends.client_port, self.ends.server_port = int(client), int(server)
            case ["isn", client, server]:
                self.ends.client_isn, self.ends.server_isn = int(client), int(server)
            case _:
                pytest.fail(f"unknown directive {words}")

    def play(self, segment: Segment) -> str:
        """Feed one segment; what the tracker says, in the words of the script."""
        packet = parse(self.ends.build(segment), verify=True)
        tracked = self.tracker.track(packet, self.now)
        self.tracker.confirm(tracked, self.now)
        said = tracked.ctstate.name
        entries = list(self.tracker.entries())
        assert len(entries) <= 1
        if segment.state is not None:
            said += f" {entries[0].state_name if entries else '-'}"
        if segment.timeout_s is not None and entries:
            left_s = entries[0].expires_at - self.now
            near = abs(left_s - segment.timeout_s) <= TOLERANCE_S
            said += f" {segment.timeout_s if near else round(left_s)}s"
        return said

    @staticmethod
    def expected(segment: Segment) -> str:
        words = [segment.ctstate]
        if segment.state is not None:
            words.append(segment.state)
        if segment.timeout_s is not None:
            words.append(f"{segment.timeout_s}s")
        return " ".join(words)


@pytest.mark.parametrize("path", PLAYS, ids=lambda path: path.stem)
def test_the_tracker_follows_the_script(path: Path) -> None:
    """Each line of a script is a clause of the RFC that its first comment names."""
    lines = packet_script.transcript(packet_script.read(path), Stage(), "ours")
    assert not lines, "\n".join(["", path.name, *lines])


def test_a_wrong_expectation_is_marked(tmp_path: Path) -> None:
    """A script that cannot fail would prove nothing."""
    path = tmp_path / "wrong.play"
    path.write_text("> S 0:0 -> ESTABLISHED SYN_SENT 30s\n")
    assert any(
        line.startswith(">>>")
        for line in packet_script.transcript(packet_script.read(path), Stage(), "ours")
    )


def test_a_line_that_is_no_sentence_is_refused(tmp_path: Path) -> None:
    """A misspelt line must not be skipped silently."""
    path = tmp_path / "broken.play"
    path.write_text("> S 0:0 => NEW\n")
    with pytest.raises(packet_script.ScriptError, match=r"broken\.play:1"):
        packet_script.read(path)
