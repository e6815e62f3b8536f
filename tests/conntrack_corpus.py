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
    """What a host's reassembly hands on: the whole datagram, or None.

    Overlaps make the datagram disappear (RFC 5722; Linux does the same for IPv4), and so do gaps,
    different last fragments, and pieces of other datagrams.
    """
    version = pieces[0][0] >> 4
    held: dict[int, bytes] = {}
    total: int | None = None
    header = b""
    for piece in pieces:
        if version == 4:
            start = (piece[0] & 15) * 4
            field = int.from_bytes(piece[6:8], "big")
            offset, more, mine = (field & 0x1FFF) * 8, bool(field & 0x2000), piece[9:10]
            body = piece[start : int.from_bytes(piece[2:4], "big")]
        else:
            at, following = 40, piece[6]
            while following != 44:
                following, at = piece[at], at + (piece[at + 1] + 1) * 8
            field = int.from_bytes(piece[at + 2 : at + 4], "big")
            offset, more, mine = field & 0xFFF8, bool(field & 1), piece[at : at + 1]
            start = at
            body = piece[at + 8 : 40 + int.from_bytes(piece[4:6], "big")]
        if more and len(body) % 8:
            return None
        end = offset + len(body)
        overlaps = any(offset < at + len(b) and at < end for at, b in held.items())
        if overlaps or (not more and total not in (None, end)) or (header and mine != header[-1:]):
            return None
        if version == 6 and offset == 0 and not has_whole_chain(mine[0], body):
            return None
        held[offset] = body
        total = end if not more else total
        if offset == 0:
            header = piece[:start] + mine
    whole = b"".join(held[at] for at in sorted(held))
    if total is None or len(whole) != total or 0 not in held:
        return None
    first = bytearray(header[:-1])
    if version == 4:
        first[2:4] = (len(first) + len(whole)).to_bytes(2, "big")
        first[6:8] = b"\0\0"
        first[10:12] = b"\0\0"
        words = sum(int.from_bytes(first[i : i + 2], "big") for i in range(0, len(first), 2))
        while words >> 16:
            words = (words & 0xFFFF) + (words >> 16)
        first[10:12] = (~words & 0xFFFF).to_bytes(2, "big")
        return bytes(first) + whole
    # The header before the fragment header now names what that one named.
    at, place = 40, 6
    while first[place] != 44:
        place, at = at, at + (first[at + 1] + 1) * 8
    first[place] = header[-1]
    first[4:6] = (len(first) - 40 + len(whole)).to_bytes(2, "big")
    return bytes(first) + whole


def has_whole_chain(following: int, body: bytes) -> bool:
    """Whether a first fragment reaches the transport's ports (RFC 7112)."""
    at = 0
    while following in (0, 43, 60):
        if at + 8 > len(body):
            return False
        following, at = body[at], at + (body[at + 1] + 1) * 8
    return at + 8 <= len(body)


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
