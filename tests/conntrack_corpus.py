"""The shared conntrack corpus: its vectors, and a runner that feeds them to a tracker."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conntrack.packet import Fault, Packet, PacketError, parse
from conntrack.profile import Profile
from conntrack.tcp_states import TcpState
from conntrack.tracker import CtState, Entry, Tracked, Tracker
from firewall.replay.reassembly import Reassembly

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "../shared/corpus/conntrack"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
STEP_S = 0.001  # between packets for which a vector states no time


def vectors() -> Iterator[Any]:
    if not CORPUS.is_dir():
        reason = "../shared/corpus/conntrack is absent"
        yield pytest.param(None, id="no-corpus", marks=pytest.mark.skip(reason=reason))
        return
    for file in sorted(CORPUS.glob("*.yaml")):
        for vector in yaml.load(file.read_text(), LOADER)["vectors"]:
            yield pytest.param(vector, id=f"{file.stem}/{vector['id']}")


# --- what a vector's settings mean --------------------------------------------------------------


def with_sysctl(profile: Profile, sysctl: dict[str, int]) -> Profile:
    """The profile with the kernel settings that a vector was recorded under."""
    timeouts = profile.timeouts
    for key, value in sysctl.items():
        name = key.removeprefix("nf_conntrack_")
        if name == "tcp_loose":
            profile = dataclasses.replace(profile, loose=bool(value))
        elif name == "tcp_be_liberal":
            profile = dataclasses.replace(profile, liberal=bool(value))
        elif name == "tcp_max_retrans":
            profile = dataclasses.replace(profile, retransmissions=value)
        elif name == "udp_timeout":
            timeouts = dataclasses.replace(timeouts, udp=value)
        elif name == "udp_timeout_stream":
            timeouts = dataclasses.replace(timeouts, udp_stream=value)
        elif name == "icmp_timeout":
            timeouts = dataclasses.replace(timeouts, icmp=value)
        elif name == "generic_timeout":
            timeouts = dataclasses.replace(timeouts, other=value)
        elif name == "tcp_timeout_unacknowledged":
            timeouts = dataclasses.replace(timeouts, tcp_unacknowledged=value)
        elif name == "tcp_timeout_max_retrans":
            timeouts = dataclasses.replace(timeouts, tcp_retransmitted=value)
        elif name.startswith("tcp_timeout_"):
            state = TcpState[name.removeprefix("tcp_timeout_").upper()]
            tcp = list(timeouts.tcp)
            tcp[state] = value
            timeouts = dataclasses.replace(timeouts, tcp=tuple(tcp))
        elif name not in ("checksum", "log_invalid"):
            pytest.fail(f"setting {key} is not known to this runner")
    return dataclasses.replace(profile, timeouts=timeouts)


# --- fragments ----------------------------------------------------------------------------------


def reassemble(pieces: list[bytes]) -> bytes | None:
    """What the kernel's reassembly hands on: the whole datagram, or None."""
    reassembly = Reassembly()
    for piece in pieces:
        whole = reassembly.add(piece, 0.0)
        if isinstance(whole, bytes) and (whole != piece or is_atomic(piece)):
            return whole
    return None


# --- one vector ---------------------------------------------------------------------------------


class Run:
    """One vector against one tracker.

    `is_router`: the box forwards, so what its hop limit ends at opens no flow.
    """

    is_router = True

    def __init__(self, vector: dict[str, Any], profile: Profile) -> None:
        sysctl = vector.get("sysctl") or {}
        self.tracker = Tracker(with_sysctl(profile, sysctl))
        self.tracker.loose = bool(sysctl.get("nf_conntrack_tcp_loose", 1))
        self.verify = bool(sysctl.get("nf_conntrack_checksum", 1))
        self.now = 1000.0
        self.entry: Entry | None = None
        self.latest: Tracked | None = None
        self.before: Entry | None = None

    def step(self, packet: dict[str, Any]) -> str:
        """Feed one packet of the vector; its class."""
        self.now += packet.get("dt") or STEP_S
        self.before = self.entry
        pieces = [bytes.fromhex(text) for text in packet["hex"]]
        data: bytes | None = pieces[0]
        if len(pieces) > 1 or packet.get("frags"):
            for piece in pieces:
                if not is_atomic(piece):
                    with pytest.raises(PacketError) as refused:
                        parse(piece)
                    assert refused.value.fault in (Fault.FRAGMENT, Fault.TRUNCATED)
            data = reassemble(pieces)
        if data is None:
            return "NOT_SEEN"
        try:
            parsed = parse(data, verify=self.verify)
        except PacketError:
            return "INVALID"
        return self.feed(parsed)

    def feed(self, parsed: Packet) -> str:
        self.latest = tracked = self.tracker.track(parsed, self.now)
        found = tracked.entry
        # A router discards a packet whose hop limit ends; its new flow is never confirmed.
        passes = tracked.ctstate not in (CtState.INVALID, CtState.UNTRACKED)
        if passes and (found is not None or parsed.hop_limit > 1 or not self.is_router):
            found = self.tracker.confirm(tracked, self.now)
        if found is not None:
            self.entry = found
        if tracked.ctstate == CtState.INVALID:
            return "INVALID"
        return tracked.ctstate.name

    def observed(self) -> dict[str, Any]:
        while self.tracker.expire(self.now, budget=10000):
            pass
        seen: dict[str, Any] = {"entries": len(self.tracker)}
        entry = self.entry
        if entry is not None and entry.serial >= 0:
            seen |= {
                "state": entry.state_name,
                "timeout": entry.expires_at - self.now,
                "assured": entry.assured,
                "seen_reply": entry.seen_reply,
            }
        seen["new_entry"] = self.entry is not self.before
        return seen


def is_atomic(piece: bytes) -> bool:
    """An IPv6 fragment header that holds a whole packet (RFC 6946)."""
    return piece[0] >> 4 == 6 and piece[6] == 44 and piece[42:44] == b"\0\0"
