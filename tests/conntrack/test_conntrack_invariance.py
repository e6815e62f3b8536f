"""What an answer may not depend on: the sequence numbers themselves, the family, the clock's zero.

Conversations are drawn in numbers relative to what each side has said, so the same one can be
played from any initial numbers. A comparison that forgets that they wrap around, or a zero that is
taken for "none", shows here.
"""

import struct
from typing import Any, NamedTuple

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conntrack.packet import parse
from conntrack.profile import LINUX, STRICT, Profile
from conntrack.tracker import CtState, Tracker

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
MODULUS = 1 << 32
ENDS = {4: (bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))), 6: (bytes(15) + b"\1", bytes(15) + b"\2")}
PORTS = (4000, 80)
EDGES = (0, 0, 0, 0, 1, -1, 2, 100, -100, 1460, 65535, -65535, 66000, -66001, 1 << 20, 1 << 31)


class Step(NamedTuple):
    """One segment: who sends it, its flags, and numbers relative to what is expected."""

    reply: bool
    flags: int
    sequence: int = 0
    acknowledgment: int = 0
    length: int = 0
    window: int = 65535
    options: bytes = b""
    wait_s: float = 0.0


SCALED = bytes((3, 3, 7, 1))
HANDSHAKE = [
    Step(False, SYN, options=SCALED),
    Step(True, SYN | ACK, options=SCALED),
    Step(False, ACK),
]
DATA = [Step(False, ACK | PSH, length=100), Step(True, ACK), Step(True, ACK | PSH, length=1400)]
CLOSING = [Step(False, FIN | ACK), Step(True, ACK), Step(True, FIN | ACK), Step(False, ACK)]
LIFE = [*HANDSHAKE, *DATA, *CLOSING]

STEPS = st.builds(
    Step,
    st.booleans(),
    st.sampled_from((SYN, SYN | ACK, ACK, ACK, ACK | PSH, FIN | ACK, RST, RST | ACK, SYN | FIN, 0)),
    st.sampled_from(EDGES),
    st.sampled_from(EDGES),
    st.sampled_from((0, 0, 1, 100, 1400)),
    st.sampled_from((0, 1, 1000, 65535)),
    st.sampled_from((b"", b"", SCALED, b"\3\0\1\1")),
    st.sampled_from((0.0, 0.0, 0.0, 1.0, 40.0)),
)
TALKS = st.builds(
    lambda lived, steps: [*LIFE[:lived], *steps],
    st.integers(0, len(LIFE)),
    st.lists(STEPS, max_size=12),
)
NUMBERS = st.one_of(st.integers(0, MODULUS - 1), st.sampled_from((0, 1, MODULUS - 1, 1 << 31)))


def segment(version: int, step: Step, sequence: int, acknowledgment: int) -> bytes:
    source, destination = ENDS[version][:: -1 if step.reply else 1]
    ports = PORTS[:: -1 if step.reply else 1]
    offset = (20 + len(step.options)) // 4 << 4
    body = struct.pack(
        "!HHIIBBHHH", *ports, sequence, acknowledgment, offset, step.flags, step.window, 0, 0
    )
    body += step.options + bytes(step.length)
    if version == 6:
        head = struct.pack("!IHBB", 6 << 28, len(body), 6, 64)
    else:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, 6, 0)
    return head + source + destination + body


def play(
    talk: list[Step], numbers: tuple[int, int], profile: Profile, *, version: int = 4,
    now: float = 0.0,
) -> list[tuple[Any, ...]]:  # fmt: skip
    """What the tracker says to each segment."""
    tracker = Tracker(profile)
    expected = [*numbers]
    said = []
    for step in talk:
        now += step.wait_s
        own, other = int(step.reply), int(not step.reply)
        sequence = (expected[own] + step.sequence) % MODULUS
        acknowledgment = (expected[other] + step.acknowledgment) % MODULUS
        if not step.flags & ACK:
            acknowledgment = 0
        if step.flags & RST:
            # Some stacks set ACK in a reset and acknowledge nothing: a zero there is no number.
            assume(acknowledgment or not step.flags & ACK)
        packet = parse(segment(version, step, sequence, acknowledgment))
        tracked = tracker.track(packet, now)
        tracker.confirm(tracked, now)
        if step.sequence == 0 and tracked.ctstate != CtState.INVALID:
            used = step.length + bool(step.flags & SYN) + bool(step.flags & FIN)
            expected[own] = (expected[own] + used) % MODULUS
        rows = [
            (entry.state_name, entry.assured, entry.seen_reply, round(entry.expires_at - now, 3))
            for entry in tracker.entries()
        ]
        said.append((tracked.ctstate.name, tracked.reason, rows))
    return said


@settings(max_examples=150)
@given(TALKS, NUMBERS, NUMBERS)
def test_strict_does_not_see_where_numbers_begin(
    talk: list[Step], client: int, server: int
) -> None:
    """RFC 9293 3.4: sequence numbers are compared, never looked at."""
    assert play(talk, (client, server), STRICT) == play(talk, (10_000_000, 20_000_000), STRICT)


@settings(max_examples=50)
@given(TALKS, NUMBERS, NUMBERS, st.sampled_from((STRICT, LINUX)))
def test_tcp_is_the_same_over_both_families(
    talk: list[Step], client: int, server: int, profile: Profile
) -> None:
    """IPv6 is no second implementation."""
    numbers = (client, server)
    assert play(talk, numbers, profile, version=6) == play(talk, numbers, profile)


@settings(max_examples=50)
@given(TALKS, st.sampled_from((STRICT, LINUX)))
def test_the_clock_may_begin_anywhere(talk: list[Step], profile: Profile) -> None:
    """Only differences of time count."""
    numbers = (7, 9)
    assert play(talk, numbers, profile, now=1e6) == play(talk, numbers, profile)
