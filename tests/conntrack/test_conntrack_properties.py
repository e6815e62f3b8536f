"""What holds for any input."""

import struct
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from conntrack import keys
from conntrack.flow import FlowTuple, reply
from conntrack.packet import Packet, PacketError, parse, policy_port
from conntrack.tcp_window import SACK, SCALING, syn_options, unpack
from conntrack.tracker import LINUX, STRICT, CtState, Tracker

ADDRESSES = st.sampled_from([bytes((10, 0, 0, n)) for n in range(1, 5)])
PORTS = st.integers(0, 3)
NUMBERS = st.one_of(
    st.integers(0, 0xFFFFFFFF), st.sampled_from([0, 1, 1000, 1001, 5000, 5001, 0x80000000])
)
SECONDS = st.sampled_from([0.0, 0.0, 0.5, 3.0, 70.0])


def ipv4(protocol: int, source: bytes, destination: bytes, body: bytes, ttl: int = 64) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, ttl, protocol, 0)
    return head + source + destination + body


def ipv6(protocol: int, source: bytes, destination: bytes, body: bytes) -> bytes:
    return struct.pack("!IHBB", 6 << 28, len(body), protocol, 255) + source + destination + body


@st.composite
def tcp_segments(draw: Any) -> bytes:
    """TCP between few ends, so that flows meet; flags and numbers anything."""
    body = struct.pack(
        "!HHIIBBHHH", draw(PORTS), draw(PORTS), draw(NUMBERS), draw(NUMBERS), 0x50,
        draw(st.integers(0, 255)), draw(st.integers(0, 0xFFFF)), 0, 0,
    )  # fmt: skip
    payload = b"x" * draw(st.sampled_from([0, 0, 1, 100]))
    return ipv4(6, draw(ADDRESSES), draw(ADDRESSES), body + payload, draw(st.sampled_from([1, 64])))


@st.composite
def other_packets(draw: Any) -> bytes:
    """UDP, ICMP with and without quotes, SCTP and unknown protocols between the same ends."""
    source, destination = draw(ADDRESSES), draw(ADDRESSES)
    kind = draw(st.sampled_from(["udp", "icmp", "error", "sctp", "gre", "other"]))
    if kind == "udp":
        return ipv4(17, source, destination, struct.pack("!HHHH", draw(PORTS), draw(PORTS), 8, 0))
    if kind == "icmp":
        kinds = draw(st.sampled_from([0, 8, 13, 14, 17, 200]))
        return ipv4(1, source, destination, struct.pack("!BBHHH", kinds, 0, 0, draw(PORTS), 1))
    if kind == "error":
        quoted = draw(tcp_segments())[:28]
        return ipv4(1, source, quoted[12:16], struct.pack("!BBHI", 3, 1, 0, 0) + quoted)
    if kind == "sctp":
        chunk = draw(st.sampled_from([0, 1, 2, 6, 7, 8, 10, 11, 14]))
        tags = st.sampled_from([0, 1, 2])
        body = struct.pack("!HHII", draw(PORTS), draw(PORTS), draw(tags), 0)
        body += struct.pack("!BBHI", chunk, draw(st.integers(0, 1)), 20, draw(tags)) + bytes(12)
        return ipv4(132, source, destination, body)
    return ipv4(47 if kind == "gre" else 253, source, destination, bytes(8))


PACKETS = st.one_of(tcp_segments(), other_packets())
STORIES = st.lists(st.tuples(PACKETS, SECONDS), max_size=40)


def picture(tracker: Tracker) -> list[tuple[Any, ...]]:
    """Everything a tracker knows, as values."""
    slots = (
        "key",
        "state",
        "expires_at",
        "seen_reply",
        "assured",
        "serial",
        "rank",
        "original_packets",
        "reply_packets",
        "original_bytes",
        "reply_bytes",
        "memory",
        "created_at",
        "protocol",
    )
    rows = []
    for entry in tracker.entries():
        windows = unpack(entry.packed) if entry.packed is not None else entry.windows
        rows.append((*(getattr(entry, name) for name in slots), windows))
    return sorted(rows, key=lambda row: row[0])


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=120), st.booleans(), st.booleans())
def test_any_bytes_are_a_packet_or_a_fault(data: bytes, complete: bool, verify: bool) -> None:
    """There is no third outcome."""
    try:
        packet = parse(data, complete=complete, verify=verify)
    except PacketError:
        return
    assert packet.version in (4, 6)
    assert 0 <= policy_port(packet) <= 0xFFFF


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([0, 43, 44, 51, 60, 6, 17, 58, 59, 132, 47, 253]))
def test_any_ipv6_chain_is_a_packet_or_a_fault(data: Any, following: int) -> None:
    """Extension headers in any order and length, valid or not."""
    body = data.draw(st.binary(max_size=200))
    steered = bytearray(body)
    for at in range(0, len(steered) - 8, 8):
        if data.draw(st.booleans()):
            steered[at] = data.draw(st.sampled_from([0, 43, 44, 51, 60, 6, 17, 58, 132]))
            steered[at + 1] = data.draw(st.sampled_from([0, 0, 1, 255]))
    whole = ipv6(following, bytes(16), bytes(15) + b"\1", bytes(steered))
    cut = data.draw(st.integers(0, len(whole)))
    for piece, complete in ((whole, True), (whole[:cut], True), (whole[:cut], False)):
        try:
            parse(piece, complete=complete)
        except PacketError:
            continue


@settings(max_examples=200, deadline=None)
@given(PACKETS, st.data())
def test_a_copied_head_says_the_same_as_the_whole(packet: bytes, data: Any) -> None:
    """complete=False never invents: same key, or a fault."""
    try:
        whole = parse(packet)
    except PacketError:
        return
    cut = data.draw(st.integers(0, len(packet)))
    try:
        head = parse(packet[:cut], complete=False)
    except PacketError:
        return
    assert head.key == whole.key
    assert head.length == whole.length
    assert head.payload_bytes == whole.payload_bytes


@settings(deadline=None)
@given(
    st.builds(
        FlowTuple, ADDRESSES, ADDRESSES, st.integers(0, 255), st.integers(0, 65535),
        st.integers(0, 65535),
    )
)  # fmt: skip
def test_the_reply_of_a_reply_is_the_flow(flow: FlowTuple) -> None:
    """reply(reply(t)) == t."""
    assert reply(reply(flow)) == flow


@settings(deadline=None)
@given(PACKETS)
def test_the_reply_key_of_a_reply_key_is_the_key(data: bytes) -> None:
    """Keys turn around like tuples, ICMP types included."""
    try:
        packet = parse(data)
    except PacketError:
        return
    assert keys.reply_key(keys.reply_key(packet.key)) == packet.key
    turned = reply(keys.tuple_of_key(packet.key))
    assert keys.tuple_of_key(keys.reply_key(packet.key)) == turned


def live(data: bytes) -> Packet | None:
    try:
        return parse(data)
    except PacketError:
        return None


@settings(max_examples=150, deadline=None)
@given(STORIES, st.sampled_from([STRICT, LINUX]), st.booleans())
def test_only_a_confirmed_packet_writes(story: Any, profile: Any, loose: bool) -> None:
    """INVALID writes nothing, and neither does a packet that is dropped after tracking."""
    tracker = Tracker(profile)
    tracker.loose = loose
    now = 0.0
    for number, (data, wait_s) in enumerate(story):
        now += wait_s
        packet = live(data)
        if packet is None:
            continue
        before = picture(tracker)
        tracked = tracker.track(packet, now)
        assert picture(tracker) == before
        if tracked.ctstate in (CtState.INVALID, CtState.UNTRACKED):
            assert tracker.confirm(tracked, now) is None
            assert picture(tracker) == before
        elif number % 5:
            tracker.confirm(tracked, now)


@settings(max_examples=150, deadline=None)
@given(STORIES, st.sampled_from([STRICT, LINUX]), st.sampled_from([None, 2]))
def test_the_bound_of_the_table_holds(story: Any, profile: Any, per_source: int | None) -> None:
    """Never more entries than the limit, nor than one source may have; counters add up."""
    tracker = Tracker(profile, limit_count=5, source_limit_count=per_source)
    now = 0.0
    for data, wait_s in story:
        now += wait_s
        packet = live(data)
        if packet is not None:
            tracker.confirm(tracker.track(packet, now), now)
        entries = list(tracker.entries())
        assert len(entries) == len(tracker) <= 5
        if per_source is not None:
            sources = [entry.original.source for entry in entries]
            assert all(sources.count(source) <= per_source for source in sources)
    now += 1e6
    while tracker.expire(now, budget=100):
        pass
    assert len(tracker) == 0


@settings(max_examples=100, deadline=None)
@given(STORIES, st.sampled_from([STRICT, LINUX]))
def test_the_order_of_confirmation_does_not_corrupt(story: Any, profile: Any) -> None:
    """Packets tracked together and confirmed later are judged again, never applied blindly."""
    tracker = Tracker(profile, limit_count=5)
    packets = [packet for data, _ in story if (packet := live(data)) is not None]
    waiting = [tracker.track(packet, 1.0) for packet in packets]
    for tracked in reversed(waiting):
        entry = tracker.confirm(tracked, 1.0)
        if entry is not None and entry.serial >= 0:
            found = tracker.track(tracked.packet, 1.0).entry
            related = tracked.ctstate in (CtState.RELATED, CtState.RELATED_REPLY)
            assert related or found is entry or found is None
    assert len(tracker) == len(list(tracker.entries())) <= 5


@given(st.binary(min_size=2, max_size=2), st.binary(min_size=8, max_size=8), st.integers(0, 255))
def test_the_usual_options_of_a_syn_are_read_at_once_as_one_by_one(
    size: bytes, stamps: bytes, scale: int
) -> None:
    """The layout that most systems send has a short way; padding makes it take the long one."""
    usual = b"\x02\x04" + size + b"\x04\x02\x08\x0a" + stamps + b"\x01\x03\x03" + bytes([scale])
    assert syn_options(usual) == syn_options(usual + bytes(4)) == (min(scale, 14), SCALING | SACK)
