"""The conntrack corpus as captures: replay says of each packet what the vectors' runner says."""

import io
import struct
from typing import Any

import pytest
from conntrack_corpus import Run, reassemble, vectors

from conntrack.profile import LINUX, STRICT, Profile
from conntrack.tracker import Tracker
from firewall.policy.snapshot import Snapshot
from firewall.policy.view import View
from firewall.replay.capture import read_frames
from firewall.replay.play import Replay, Row, Witness

VECTORS = list(vectors())
CLASSES = {"RELATED_REPLY": "RELATED"}
RAW_IP = 101


def capture_of(vector: dict[str, Any]) -> bytes:
    """A pcap with nanoseconds that holds the pieces of every packet at the runner's times."""
    data = struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 262144, RAW_IP)
    now_ns = 1_000_000_000_000
    for packet in vector["packets"]:
        now_ns += round((packet.get("dt") or 0.001) * 1e9)
        for text in packet["hex"]:
            piece = bytes.fromhex(text)
            data += struct.pack("<IIII", *divmod(now_ns, 10**9), len(piece), len(piece)) + piece
    return data


class Rehearsal(Run):
    """The runner, with what replay cannot know left out: kernel settings, checksums, routers.

    Hop limits end on a router behind us; at PREROUTING the packet is accepted like any other.
    """

    is_router = False

    def __init__(self, vector: dict[str, Any], profile: Profile, *, loose: bool) -> None:
        super().__init__({**vector, "sysctl": {"nf_conntrack_tcp_loose": int(loose)}}, profile)
        self.tracker = Tracker(profile)
        self.tracker.loose = loose
        self.verify = False

    def answers(self, packet: dict[str, Any]) -> tuple[str, str]:
        """Class and state after one packet of the vector."""
        self.latest = None
        ctstate = self.step(packet)
        tracked = self.latest
        state = ""
        if tracked is not None:
            fresh = tracked.ctstate.name == "NEW" and tracked.entry is None
            entry = self.entry if fresh else tracked.entry
            state = entry.state_name if entry is not None else ""
        return CLASSES.get(ctstate, ctstate), state


def replayed(vector: dict[str, Any], profile: Profile, *, loose: bool) -> list[Row]:
    witness = Witness(profile)
    witness.loose = loose
    frames = read_frames(io.BytesIO(capture_of(vector)), vector["id"])
    return list(Replay(View(Snapshot()), witness).rows(frames))


@pytest.mark.parametrize(("profile", "loose"), [(STRICT, False), (LINUX, True)])
@pytest.mark.parametrize("vector", VECTORS)
def test_replay_answers_as_the_runner(vector, profile, loose):
    if "steps" in vector:
        pytest.skip("a limit vector has no packets")
    rows = iter(replayed(vector, profile, loose=loose))
    run = Rehearsal(vector, profile, loose=loose)
    for number, packet in enumerate(vector["packets"]):
        ctstate, state = run.answers(packet)
        last = [next(rows) for _ in packet["hex"]][-1]
        got = (last.conntrack, last.state)
        if ctstate == "NOT_SEEN":
            refused = reassemble([bytes.fromhex(text) for text in packet["hex"]]) is None
            assert refused, "the runner itself"
            assert got[0] in ("", "INVALID"), f"packet {number}: {last}"
            continue
        assert got == (ctstate, state), f"packet {number}: {last}"
