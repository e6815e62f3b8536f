"""Every packet of the shared conntrack corpus, in both profiles.

LINUX must answer as the vectors expect (which Linux 6.18.44 does, unless a vector's stance says
that Linux is wrong). STRICT must accept what all trackers accept, refuse what all refuse, and reach
the goals that the vectors note. Whoever deviates stands in the table of docs/conntrack.md with a
reason; an entry there that is not needed any more fails, too.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from conntrack_corpus import Run, reassemble, vectors

from conntrack.flow import Direction
from conntrack.profile import LINUX, STRICT

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/conntrack.md"


def documented(profile: str) -> dict[str, str]:
    """Vector id → reason, from the deviation table of the document."""
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \| (.+?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {identifier: reason for identifier, which, reason in rows if which == profile}


VECTORS = list(vectors())


def differences(expected: dict[str, Any], ctstate: str, seen: dict[str, Any]) -> list[str]:
    """What a vector expects and the tracker does not show."""
    found = []
    for key, value in expected.items():
        if key == "class":
            # A fragment that fits no datagram is not shown to us; refusing it is the same answer.
            if ctstate != value:
                found.append(f"class {ctstate}, expected {value}")
        elif key == "timeout":
            if key not in seen or abs(seen[key] - value) > 1:
                found.append(f"timeout {seen.get(key)}, expected {value} within 1 s")
        elif key == "forwarded":
            continue  # the kernel's business
        elif seen.get(key) != value:
            found.append(f"{key} {seen.get(key)}, expected {value}")
    return found


def run_linux(vector: dict[str, Any]) -> list[str]:
    run = Run(vector, LINUX)
    problems = []
    for number, packet in enumerate(vector["packets"]):
        ctstate = run.step(packet)
        expected = dict(packet.get("expect") or {})
        incomplete = reassemble_refused(packet)
        if incomplete and expected.get("class") == "INVALID":
            # Linux lets pieces that it cannot reassemble traverse as INVALID; ours are refused
            # piece by piece, before there is a class.
            expected["class"] = "NOT_SEEN"
        found = differences(expected, ctstate, run.observed())
        problems += [f"packet {number}: {difference}" for difference in found]
    return problems


def reassemble_refused(packet: dict[str, Any]) -> bool:
    return len(packet["hex"]) > 1 and reassemble([bytes.fromhex(t) for t in packet["hex"]]) is None


# What the goals of the vectors ask, by their first words: a test of (class, state), or None where
# the goal is optional or asks nothing of a tracker.
GOALS: dict[str, Any] = {
    r"INVALID": lambda ctstate, state: ctstate == "INVALID",
    r"drop": lambda ctstate, state: ctstate in ("INVALID", "NOT_SEEN"),
    r"NEW-from-server or drop": lambda ctstate, state: ctstate in ("NEW", "INVALID"),
    r"RELATED, but must not be forwarded": lambda ctstate, state: ctstate == "INVALID",
    r"RFC 5961 5\.2": lambda ctstate, state: ctstate == "INVALID",
    r"FIN_WAIT\b": lambda ctstate, state: ctstate != "INVALID" and state == "FIN_WAIT",
    r"CLOSE_WAIT\b": lambda ctstate, state: ctstate != "INVALID" and state == "CLOSE_WAIT",
    r"SYN_RECV\b": lambda ctstate, state: ctstate == "REPLY" and state == "SYN_RECV",
    r"normal class": lambda ctstate, state: ctstate != "INVALID",
    r"optional: INVALID": lambda ctstate, state: ctstate == "INVALID",
    r"optional: limit replies": None,
}


def goal_of(text: str) -> Any:
    for pattern, check in GOALS.items():
        if re.match(pattern, text):
            return check
    pytest.fail(f"this runner does not know the goal {text!r}")


def run_strict(vector: dict[str, Any]) -> list[str]:
    run = Run(vector, STRICT)
    problems = []
    for number, packet in enumerate(vector["packets"]):
        ctstate = run.step(packet)
        state = run.observed().get("state")
        goal = packet.get("goal")
        if goal:
            check = goal_of(goal)
            if check is not None and not check(ctstate, state):
                problems.append(f"packet {number}: {ctstate} {state} misses the goal {goal!r}")
        elif packet.get("consensus") == "accept" and ctstate == "INVALID":
            problems.append(f"packet {number}: INVALID, but every tracker accepts it")
        elif packet.get("consensus") == "invalid" and ctstate != "INVALID":
            problems.append(f"packet {number}: {ctstate}, but every tracker refuses it")
    return problems


def verdict(vector: dict[str, Any], problems: list[str], profile: str) -> None:
    reason = documented(profile).get(vector["id"])
    if reason is None:
        assert not problems, "\n".join(problems)
    else:
        assert problems, f"docs/conntrack.md lists {vector['id']}, but it passes: remove the row"


@pytest.mark.parametrize("vector", VECTORS)
def test_the_linux_profile_answers_as_the_vector_expects(vector: dict[str, Any]) -> None:
    """Class, state, timeout, assured, seen_reply and entries after every packet."""
    if "steps" in vector:
        pytest.skip("a limit vector; see test_conntrack_limits")
    verdict(vector, run_linux(vector), "linux")


@pytest.mark.parametrize("vector", VECTORS)
def test_the_strict_profile_meets_goals_and_consensus(vector: dict[str, Any]) -> None:
    """Stricter than Linux where a goal says so, and never against what all trackers agree on."""
    if "steps" in vector:
        pytest.skip("a limit vector; see test_conntrack_limits")
    verdict(vector, run_strict(vector), "strict")


def test_directions_are_two() -> None:
    """The runner relies on ORIGINAL being 0."""
    assert [d.value for d in Direction] == [0, 1]
