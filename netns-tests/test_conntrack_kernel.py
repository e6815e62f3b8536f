"""Our LINUX profile and the scripts of tests/conntrack/plays beside the kernel's own tracker."""

import dataclasses
import os
import random
from pathlib import Path
from typing import NamedTuple

import fragment_plans
import packet_script
import pytest
from dialogues import (
    GRE,
    Dialogue,
    IcmpDialogue,
    PlainDialogue,
    SctpDialogue,
    UdpDialogue,
    path,
)
from hostile_dialogues import MutantDialogue, QuoteDialogue
from kernel_tracker import CLIENT, SERVER, SERVER6, FlowName, KernelTracker, Shot, now
from packet_script import Ends, Segment
from tcp_dialogue import TcpDialogue

from conntrack.address import format_address, parse_address
from conntrack.flow import TCP, UDP
from conntrack.packet import PacketError, parse
from conntrack.profile import Profile
from conntrack.sctp_states import SctpState
from conntrack.tcp_states import TcpState
from conntrack.tracker import LINUX, CtState, Tracker

pytestmark = pytest.mark.needs("nft", "conntrack", "conntrack-tool")

PLAYS = sorted((Path(__file__).parents[1] / "tests/conntrack/plays").glob("*.play"))
TOLERANCE_S = 2


class KernelStage:
    """The kernel as the tracker of a script.

    Its timers are not those of our STRICT profile: seconds are compared in linux scripts only, and
    only there is waited.
    """

    def __init__(self, kernel: KernelTracker) -> None:
        self._kernel = kernel
        self._ends = Ends()
        self._linux = False
        kernel.set(tcp_loose=0, tcp_be_liberal=0)

    def direct(self, words: list[str]) -> None:
        match words:
            case ["profile", name]:
                self._linux = name == "linux"
                self._kernel.set(tcp_loose=int(self._linux))
                self._kernel.forget()
            case ["loose", state]:
                self._kernel.set(tcp_loose=int(state == "on"))
            case ["liberal", "on"]:
                self._kernel.set(tcp_be_liberal=1)
            case ["wait", _]:
                assert not self._linux, "a linux script that waits needs a kernel that does"
            case ["port", client, server]:
                self._ends.client_port, self._ends.server_port = int(client), int(server)
            case ["isn", client, server]:
                self._ends.client_isn, self._ends.server_isn = int(client), int(server)
            case _:
                pytest.fail(f"unknown directive {words}")

    def play(self, segment: Segment) -> str:
        began = now()
        (ctstate,) = self._kernel.send([Shot(self._ends.build(segment), segment.reply)])
        flow = self._kernel.flows().get(FlowName(TCP, CLIENT, self._ends.client_port))
        said = ctstate
        if segment.state is not None:
            said += f" {flow.state if flow else '-'}"
        if segment.timeout_s is not None and flow and self._linux:
            passed_s = now() - began  # since the timer began, at most
            left_s = segment.timeout_s - flow.timeout_s
            near = -TOLERANCE_S <= left_s <= passed_s + TOLERANCE_S
            said += f" {segment.timeout_s if near else flow.timeout_s}s"
        return said

    def expected(self, segment: Segment) -> str:
        words = [segment.ctstate]
        if segment.state is not None:
            words.append(segment.state)
        if segment.timeout_s is not None and self._linux:
            words.append(f"{segment.timeout_s}s")
        return " ".join(words)


@pytest.mark.parametrize("path", PLAYS, ids=lambda path: path.stem)
def test_the_kernel_follows_the_script(lab, path: Path) -> None:
    """What is not marked [ours] or [kernel] holds for both trackers."""
    stage = KernelStage(KernelTracker(lab(a="app=a", b="app=b")))
    lines = packet_script.transcript(packet_script.read(path), stage, "kernel")
    assert not lines, "\n".join(["", path.name, *lines])


@pytest.mark.parametrize("version", [4, 6])
def test_the_kernel_puts_fragments_together_by_the_plans(lab, version: int) -> None:
    """What `firewall.replay.reassembly` is held to by tests/replay."""
    kernel = KernelTracker(lab(a="app=a", b="app=b"))
    came = {}
    for index, plan in enumerate(fragment_plans.PLANS):
        way = path(index, version)
        pieces = fragment_plans.cut(plan, way.client, way.server, index + 1)
        came[plan] = "NEW" in kernel.pass_on(pieces, way.packet(False, GRE, bytes(24)))
    assert came == {plan: whole[version == 6] for plan, whole in fragment_plans.PLANS.items()}


# --- random conversations -----------------------------------------------------------------------

SEED = int(os.environ.get("CONVERSATION_SEED", "91128101"))
DIALOGUES = 500  # at a time: each step sends one packet of each
STEPS = 14
CLASS_AGREES, STATE_AGREES = 0.995, 0.99
PATIENCE_S = 3600  # nothing expires while a loaded machine takes its time
UNHURRIED = dataclasses.replace(
    LINUX,
    timeouts=dataclasses.replace(
        LINUX.timeouts,
        tcp=(PATIENCE_S,) * len(TcpState),
        sctp=(PATIENCE_S,) * len(SctpState),
        udp=PATIENCE_S,
        icmp=PATIENCE_S,
        gre=PATIENCE_S,
    ),
)
EXACTLY = dataclasses.replace(UNHURRIED, invalid_writes=True)
_TIMERS = (
    *(f"tcp_timeout_{state.name.lower()}" for state in TcpState if 0 < state < TcpState.SYN_SENT2),
    *(f"sctp_timeout_{state.name.lower()}" for state in SctpState if state > 0),
    *("udp_timeout", "icmp_timeout", "icmpv6_timeout", "gre_timeout"),
)
_SERVERS = (parse_address(SERVER), parse_address(SERVER6))

Kinds = tuple[type[Dialogue], ...]
TCP_ONLY: Kinds = (TcpDialogue,)
DATAGRAMS: Kinds = (UdpDialogue, IcmpDialogue, PlainDialogue)
ASSOCIATIONS: Kinds = (SctpDialogue,)


class Answer(NamedTuple):
    """What a tracker says after one packet: its class, and the flow's state ("-": no flow)."""

    ctstate: str
    state: str
    assured: bool


class Ours:
    """Our tracker in a LINUX profile, asked as the kernel is."""

    def __init__(self, profile: Profile) -> None:
        self._tracker = Tracker(profile)

    def send(self, shots: list[Shot]) -> list[str]:
        """The class of each packet; all are confirmed, which INVALID ones survive unchanged."""
        return [self._class(shot.packet) for shot in shots]

    def _class(self, data: bytes) -> str:
        try:
            packet = parse(data)
        except PacketError:
            return "INVALID"
        tracked = self._tracker.track(packet, now())
        self._tracker.confirm(tracked, now())
        # The rules beside the kernel's tracker note both under one class.
        return "INVALID" if tracked.ctstate is CtState.UNTRACKED else tracked.ctstate.name

    def flows(self) -> dict[FlowName, tuple[str, bool]]:
        """State and assurance of every flow."""
        while self._tracker.expire(now(), budget=100_000):
            pass
        found = {}
        for entry in self._tracker.entries():
            flow = entry.original
            forward = flow.destination in _SERVERS
            client = flow.source if forward else flow.destination
            port = flow.source_port if forward else flow.destination_port
            name = FlowName(flow.protocol, format_address(client), port)
            found[name] = (entry.state_name, entry.assured)
        return found


def comparable(flows: dict[FlowName, tuple[str, bool]]) -> dict[FlowName, tuple[str, bool]]:
    """Without what depends on the two seconds after which datagrams are a stream."""
    return {name: (s, a and name.protocol != UDP) for name, (s, a) in flows.items()}


class Round:
    """What came of conversations that the kernel and two of our profiles have followed.

    Attributes:
        packets: sent.
        class_count: packets to which LINUX gave the kernel's class.
        state_count: packets after which LINUX had the kernel's state and assurance.
        differing: the conversations up to each packet after which LINUX said something else.
        inexact: the same of LINUX with `invalid_writes`.
    """

    def __init__(self) -> None:
        self.packets = self.class_count = self.state_count = 0
        self.differing: list[str] = []
        self.inexact: list[str] = []


def converse(
    kernel: KernelTracker, chance: random.Random, liar: float, kinds: Kinds, found: Round
) -> None:
    """Play some conversations and note what the trackers say."""
    dialogues = [
        kinds[index // 2 % len(kinds)](chance, path(index, 6 if index % 2 else 4), liar)
        for index in range(DIALOGUES)
    ]
    ours, exact = Ours(UNHURRIED), Ours(EXACTLY)
    kernel.forget()
    history: list[list[str]] = [[] for _ in dialogues]
    for _ in range(STEPS):
        shots = [dialogue.next() for dialogue in dialogues]
        theirs = kernel.send(shots)
        listed = kernel.flows().items()
        flows = comparable({name: (flow.state, flow.assured) for name, flow in listed})
        said = [(one.send(shots), comparable(one.flows())) for one in (ours, exact)]
        for index, dialogue in enumerate(dialogues):
            expected = Answer(theirs[index], *flows.get(dialogue.name, ("-", False)))
            got, exactly = (
                Answer(classes[index], *states.get(dialogue.name, ("-", False)))
                for classes, states in said
            )
            way = "<" if shots[index].reply else ">"
            answers = f"kernel {expected} ours {got} exactly {exactly}"
            history[index].append(f"{way} {shots[index].packet.hex()} {answers}")
            found.packets += 1
            found.class_count += expected.ctstate == got.ctstate
            found.state_count += expected[1:] == got[1:]
            if expected != got:
                found.differing.append("\n".join(history[index]))
            if expected != exactly:
                found.inexact.append("\n".join(history[index]))


@pytest.mark.parametrize(
    ("kinds", "liar", "rounds"),
    [
        pytest.param(TCP_ONLY, 0.0, 1, id="tcp-0.0"),
        pytest.param(TCP_ONLY, 0.5, 3, id="tcp-0.5"),
        pytest.param(DATAGRAMS, 0.0, 1, id="datagrams-0.0"),
        pytest.param(DATAGRAMS, 0.5, 1, id="datagrams-0.5"),
        pytest.param(ASSOCIATIONS, 0.0, 1, id="sctp-0.0"),
        pytest.param(ASSOCIATIONS, 0.5, 1, id="sctp-0.5"),
        pytest.param((MutantDialogue,), 0.6, 1, id="mutants-0.6"),
        pytest.param((QuoteDialogue,), 0.6, 1, id="quotes-0.6"),
    ],
)
def test_random_conversations_are_classified_as_the_kernel_does(
    lab, kinds: Kinds, liar: float, rounds: int
) -> None:
    """Class of at least 99.5 % of the packets and state after at least 99 % are the same.

    What differs is what an INVALID segment leaves behind in the kernel (docs/conntrack.md): with
    `invalid_writes` it is left behind here, too, and no packet may differ.
    """
    kernel = KernelTracker(lab(a="app=a", b="app=b"))
    kernel.set(tcp_loose=1, tcp_be_liberal=0, **dict.fromkeys(_TIMERS, PATIENCE_S))
    found = Round()
    for number in range(rounds):
        converse(kernel, random.Random(SEED + number), liar, kinds, found)
    packets = rounds * DIALOGUES * STEPS

    def told(texts: list[str]) -> str:
        return f"{len(texts)} of {packets} differ; the first:\n" + "\n\n".join(texts[:3])

    assert found.packets == packets
    assert not found.inexact, told(found.inexact)
    assert found.class_count >= CLASS_AGREES * packets, told(found.differing)
    assert found.state_count >= STATE_AGREES * packets, told(found.differing)
    assert liar or not found.differing, told(found.differing)
