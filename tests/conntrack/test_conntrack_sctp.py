"""SCTP: chunks, tags, and who may move an association."""

import random
import struct

import pytest

from conntrack.flow import SCTP
from conntrack.packet import Packet, parse
from conntrack.profile import LINUX, STRICT, Profile
from conntrack.sctp_states import SctpState
from conntrack.tracker import CtState, Entry, Tracked, Tracker

CLIENT, SERVER = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
NOW = 50.0
DATA, INIT, INIT_ACK, SACK, HEARTBEAT, HEARTBEAT_ACK, ABORT, SHUTDOWN = range(8)
SHUTDOWN_ACK, ERROR, COOKIE_ECHO, COOKIE_ACK, SHUTDOWN_COMPLETE = 8, 9, 10, 11, 14
C, S = 0x11, 0x22  # the tags that client and server announce
PROFILES = pytest.mark.parametrize("profile", [STRICT, LINUX], ids=lambda profile: profile.name)

Chunk = tuple[int, int, bytes]


def init(tag: int) -> bytes:
    return struct.pack("!IIHHI", tag, 65535, 1, 1, 1)


def packet(reply: bool, tag: int, *chunks: Chunk) -> Packet:
    ends, ports = (CLIENT + SERVER, (4000, 3868))
    if reply:
        ends, ports = SERVER + CLIENT, (3868, 4000)
    body = struct.pack("!HHII", *ports, tag, 0)
    for kind, flags, value in chunks:
        body += struct.pack("!BBH", kind, flags, 4 + len(value)) + value
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, SCTP, 0)
    return parse(head + ends + body)


class Talk:
    """One association through one tracker; `>` is the client, `<` the server."""

    def __init__(self, profile: Profile = STRICT) -> None:
        self.tracker = Tracker(profile)
        self.now = NOW

    def say(self, way: str, kind: int, tag: int, value: bytes = b"", flags: int = 0) -> str:
        return self.send(packet(way == "<", tag, (kind, flags, value))).ctstate.name

    def send(self, parsed: Packet) -> Tracked:
        tracked = self.tracker.track(parsed, self.now)
        self.tracker.confirm(tracked, self.now)
        return tracked

    def open(self) -> None:
        assert self.say(">", INIT, 0, init(C)) == "NEW"
        assert self.say("<", INIT_ACK, C, init(S)) == "REPLY"
        assert self.say(">", COOKIE_ECHO, S, b"cook") == "ESTABLISHED"
        assert self.say("<", COOKIE_ACK, C) == "REPLY"
        assert self.state is SctpState.ESTABLISHED
        assert self.entry.assured

    @property
    def entry(self) -> Entry:
        (entry,) = self.tracker.entries()
        return entry

    @property
    def state(self) -> SctpState | None:
        return self.entry.sctp_state


@PROFILES
def test_only_who_knows_the_tag_moves_an_association(profile: Profile) -> None:
    """RFC 9260 8.5; T bit: 8.5.1."""
    talk = Talk(profile)
    talk.say(">", INIT, 0, init(C))
    assert talk.say("<", INIT_ACK, C + 1, init(S)) == "INVALID"
    assert talk.say("<", INIT_ACK, C, init(S)) == "REPLY"
    assert talk.say(">", COOKIE_ECHO, S + 1, b"cook") == "INVALID"
    talk.say(">", COOKIE_ECHO, S, b"cook")
    talk.say("<", COOKIE_ACK, C)
    assert (talk.state, talk.entry.assured) == (SctpState.ESTABLISHED, True)
    for forged in (
        packet(False, 0x99, (ABORT, 0, b"")),
        packet(False, C, (ABORT, 0, b"")),
        packet(False, S, (ABORT, 1, b"")),
        packet(False, S, (INIT, 0, init(5))),
        packet(False, S, (DATA, 3, bytes(12)), (SHUTDOWN_COMPLETE, 0, b"")),
    ):
        assert talk.send(forged).ctstate == CtState.INVALID
        assert talk.state is SctpState.ESTABLISHED
    assert talk.say(">", ABORT, C, flags=1) == "ESTABLISHED"
    assert talk.state is SctpState.CLOSED


@PROFILES
def test_an_association_ends_in_three_steps(profile: Profile) -> None:
    """RFC 9260 9.2, begun by the server."""
    talk = Talk(profile)
    talk.open()
    talk.say("<", SHUTDOWN, C, bytes(4))
    assert talk.state is SctpState.SHUTDOWN_RECD
    talk.say(">", SHUTDOWN_ACK, S)
    assert talk.state is SctpState.SHUTDOWN_ACK_SENT
    talk.say("<", SHUTDOWN_COMPLETE, C)
    assert talk.state is SctpState.CLOSED


def test_an_init_alone_moves_nothing_that_lives() -> None:
    """It needs no tag, so anybody can send it; Linux takes its tag, and the flow is stuck."""
    talk = Talk()
    talk.open()
    assert talk.say(">", INIT, 0, init(0x666)) == "ESTABLISHED"
    assert talk.say("<", SACK, 0x666, bytes(12)) == "REPLY"  # the candidate's tag may be used
    assert talk.say("<", DATA, C, bytes(12)) == "REPLY"
    assert talk.say(">", DATA, S, bytes(12)) == "ESTABLISHED"
    assert talk.say("<", DATA, 0x666, bytes(12)) == "INVALID"  # the client has not restarted
    assert talk.say("<", COOKIE_ACK, 0x666) == "INVALID"
    assert talk.say("<", DATA, C, bytes(12)) == "REPLY"


def test_an_end_that_has_restarted_is_heard() -> None:
    """RFC 9260 5.2.2: INIT with new tags in a living association, answered with new ones."""
    talk = Talk()
    talk.open()
    talk.say(">", INIT, 0, init(0x33))
    assert talk.say("<", INIT_ACK, 0x33, init(0x44)) == "REPLY"
    assert talk.say(">", COOKIE_ECHO, 0x44, b"cook") == "ESTABLISHED"
    assert talk.say("<", COOKIE_ACK, 0x33) == "REPLY"
    assert talk.state is SctpState.ESTABLISHED
    assert talk.say(">", DATA, 0x44, bytes(12)) == "ESTABLISHED"
    assert talk.say(">", DATA, S, bytes(12)) == "INVALID"


def test_a_server_that_opens_is_asked_about() -> None:
    """Its INIT is the first packet of an association of its own: NEW, as for TCP."""
    talk = Talk()
    talk.say(">", INIT, 0, init(C))
    assert talk.say("<", INIT, 0, init(S)) == "NEW"
    assert talk.entry.original.source == SERVER
    # Both have opened at once; the tags fit, whoever is asked first (RFC 9260 5.2.1).
    assert talk.say(">", INIT_ACK, S, init(C)) == "REPLY"
    assert talk.say("<", INIT_ACK, C, init(S)) == "ESTABLISHED"
    assert talk.say("<", COOKIE_ECHO, C, b"cook") == "ESTABLISHED"
    assert talk.say(">", COOKIE_ECHO, S, b"cook") == "REPLY"
    assert talk.say(">", COOKIE_ACK, S) == "REPLY"
    assert talk.state is SctpState.ESTABLISHED


def test_a_closed_association_is_opened_anew_by_either_side() -> None:
    """Another association, another decision."""
    for way in "><":
        talk = Talk()
        talk.open()
        talk.say("<", ABORT, C)
        assert talk.say(way, INIT, 0, init(5)) == "NEW"
        assert not talk.entry.seen_reply


@pytest.mark.parametrize("kind", [DATA, COOKIE_ECHO, ABORT, SHUTDOWN_ACK, HEARTBEAT, INIT_ACK])
def test_only_init_comes_before_the_answer(kind: int) -> None:
    """The client cannot know the tag that such a chunk must carry."""
    talk = Talk()
    talk.say(">", INIT, 0, init(C))
    assert talk.say(">", kind, 7, init(9)) == "INVALID"
    assert talk.say("<", DATA, C, bytes(12)) == "INVALID"


def test_a_refused_association_leaves_no_entry() -> None:
    """RFC 9260 8.4: ABORT with the tag of the INIT."""
    talk = Talk()
    talk.say(">", INIT, 0, init(C))
    assert talk.say("<", ABORT, S) == "INVALID"
    assert talk.say("<", ABORT, C) == "REPLY"
    assert len(talk.tracker) == 0


@pytest.mark.parametrize("kind", [DATA, INIT_ACK, ABORT, SHUTDOWN_ACK, HEARTBEAT_ACK, ERROR, 63])
def test_nothing_else_opens_an_association(kind: int) -> None:
    """RFC 9260 8.4: out of the blue."""
    assert Talk().say(">", kind, 7, init(9)) == "INVALID"


def test_a_path_of_a_multi_homed_association_opens_with_a_heartbeat() -> None:
    """RFC 9260 8.3; the answer proves the path."""
    talk = Talk()
    assert talk.say(">", HEARTBEAT, S, bytes(8)) == "NEW"
    assert talk.say("<", HEARTBEAT_ACK, C, bytes(8)) == "REPLY"
    assert (talk.state, talk.entry.assured) == (SctpState.ESTABLISHED, True)
    assert talk.say("<", DATA, C + 1, bytes(12)) == "INVALID"


def test_a_half_open_association_is_not_kept_alive() -> None:
    """Repetition renews no timer."""
    talk = Talk()
    talk.say(">", INIT, 0, init(C))
    for _ in range(9):
        talk.now += 1
        talk.say(">", INIT, 0, init(C))
    assert talk.entry.expires_at == NOW + STRICT.timeouts.sctp[SctpState.CLOSED]


@pytest.mark.parametrize("seed", range(3))
def test_no_server_holds_an_association_that_its_client_has_only_asked_for(seed: int) -> None:
    """Whatever it says with the right tag: nothing is assured, nothing lives for long."""
    chance = random.Random(seed)
    kinds = (DATA, INIT, INIT_ACK, HEARTBEAT, ABORT, SHUTDOWN, SHUTDOWN_ACK, COOKIE_ECHO)
    kinds += (COOKIE_ACK, SHUTDOWN_COMPLETE, ERROR)
    longest_s = 3 * STRICT.timeouts.sctp[SctpState.CLOSED]  # CLOSED, COOKIE_WAIT, CLOSED
    for _ in range(20):
        talk = Talk()
        talk.say(">", INIT, 0, init(C))
        key = talk.entry.key
        for _ in range(60):
            talk.now += chance.choice((0.5, 2.0, 5.0))
            kind = chance.choice(kinds)
            value = init(S) if kind in (INIT, INIT_ACK) else b"what"
            parsed = packet(True, 0 if kind == INIT else C, (kind, chance.choice((0, 1)), value))
            tracked = talk.tracker.track(parsed, talk.now)
            if tracked.entry is not None:  # its own association would be another's business
                talk.tracker.confirm(tracked, talk.now)
            for entry in talk.tracker.entries():
                assert entry.key == key
                assert not entry.assured
                assert min(talk.now, entry.expires_at) - entry.created_at <= longest_s


def error(quoted: bytes) -> Packet:
    """Port unreachable, from the server about a packet of the client."""
    body = struct.pack("!BBHI", 3, 3, 0, 0) + quoted
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, 1, 0)
    return parse(head + SERVER + CLIENT + body)


def quote(tag: int, size: int = 8) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 32, 1, 0, 64, SCTP, 0) + CLIENT + SERVER
    return head + struct.pack("!HHI", 4000, 3868, tag)[:size]


def test_an_error_must_quote_the_tag() -> None:
    """RFC 9260 10; INIT, which has none, only while it is unanswered."""
    talk = Talk()
    talk.say(">", INIT, 0, init(C))
    assert talk.send(error(quote(0))).ctstate == CtState.RELATED_REPLY
    assert talk.send(error(quote(S))).ctstate == CtState.INVALID
    talk = Talk()
    talk.open()
    assert talk.send(error(quote(S))).ctstate == CtState.RELATED_REPLY
    for forged in (quote(0), quote(C), quote(S + 1), quote(S, 4)):
        assert talk.send(error(forged)).ctstate == CtState.INVALID
    linux = Talk(LINUX)
    linux.open()
    assert linux.send(error(quote(S + 1))).ctstate == CtState.RELATED_REPLY


@PROFILES
def test_a_chunk_without_length_ends_the_packet(profile: Profile) -> None:
    """A length of 0 would never end (CVE-2004-0626 for TCP options; the same idea)."""
    talk = Talk(profile)
    endless = packet(False, 0, (INIT, 0, init(C)))
    endless.options = bytes((INIT, 0, 0, 0)) + init(C)
    assert talk.send(endless).ctstate == CtState.INVALID
