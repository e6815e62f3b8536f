"""The tracker alone: time per packet, memory per flow, and the longest that a packet waits.

Each part runs in a process of its own, so that memory and garbage of one do not burden another.
Packets are bytes, parsed as in the worker; times are those of `parse`, `track` and `confirm`
together unless said otherwise. "Worst" is the worst of hundreds of thousands on a machine that does
other things, too: the scheduler's pauses are in it, so CPU time of the thread is what is compared.
"""

import gc
import multiprocessing
import random
import struct
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns, thread_time_ns

from bench.figure import Figure, percentile
from conntrack.packet import parse
from conntrack.tracker import STRICT, Tracker

ENTRIES = 1_000_000
EXPIRING = 200_000
COLLIDING = 32_000
SWEEP_COUNT = 1_000
"""Keys per round of expiry (the worker's EXPIRY_BUDGET_COUNT)."""
PAGE_BYTES = 4096

_HEAD = struct.Struct("!BBHHHBBHII")
_TCP = struct.Struct("!HHIIBBHHH")
_SYN, _SYN_ACK, _ACK = 0x02, 0x12, 0x10
_SERVER = 0x0A000002


def segment(  # noqa: PLR0917 -- the fields of a segment, in its order
    source: int, port: int, flags: int, sequence: int, ack: int = 0, payload: int = 0,
    *, reply: bool = False,
) -> bytes:  # fmt: skip
    """A TCP segment between a client (address as a number) and the server, checksums left out."""
    ends = (_SERVER, source) if reply else (source, _SERVER)
    ports = (80, port) if reply else (port, 80)
    size = 40 + payload
    head = _HEAD.pack(0x45, 0, size, 0, 0, 64, 6, 0, *ends)
    tcp = _TCP.pack(*ports, sequence, ack, 0x50, flags, 0xFFFF, 0, 0)
    return head + tcp + bytes(payload)


def datagram(source: int, port: int) -> bytes:
    """An empty UDP datagram to the server."""
    head = _HEAD.pack(0x45, 0, 28, 0, 0, 64, 17, 0, source, _SERVER)
    return head + struct.pack("!HHHH", port, 53, 8, 0)


def feed(tracker: Tracker, data: bytes, now: float) -> None:
    """One packet, as the worker does it."""
    tracker.confirm(tracker.track(parse(data), now), now)


def handshake(chance: random.Random, source: int, port: int) -> list[bytes]:
    """The three segments that open a flow, with random initial numbers."""
    client, server = chance.getrandbits(32), chance.getrandbits(32)
    after_client, after_server = (client + 1) & 0xFFFFFFFF, (server + 1) & 0xFFFFFFFF
    return [
        segment(source, port, _SYN, client),
        segment(source, port, _SYN_ACK, server, after_client, reply=True),
        segment(source, port, _ACK, after_client, after_server),
    ]


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES


# --- time per packet ------------------------------------------------------------------------------


def times_per_packet() -> dict[str, float]:
    """Nanoseconds per packet: of known flows, of new flows, and of parsing alone."""
    chance = random.Random(1)
    tracker = Tracker(STRICT)
    flows = []
    for number in range(1_000):
        opening = handshake(chance, 0x0A010000 + number, 40_000)
        for data in opening:
            feed(tracker, data, 1.0)
        flows.append(opening)
    data_packets = []
    for number, (syn, answer, _) in enumerate(flows):
        client = int.from_bytes(syn[24:28], "big") + 1 & 0xFFFFFFFF
        server = int.from_bytes(answer[24:28], "big") + 1 & 0xFFFFFFFF
        source = 0x0A010000 + number
        data_packets.append(segment(source, 40_000, _ACK, client, server, 1000))
        data_packets.append(
            segment(source, 40_000, _ACK, server, (client + 1000) & 0xFFFFFFFF, reply=True)
        )
    fresh = [segment(0x0B000000 + n, 40_000, _SYN, chance.getrandbits(32)) for n in range(20_000)]
    return {
        "known": min(_each(tracker, data_packets) for _ in range(20)),
        "new": min(_each(Tracker(STRICT), fresh) for _ in range(3)),
        "parse": min(_parse_each(data_packets) for _ in range(20)),
    }


def _each(tracker: Tracker, packets: list[bytes]) -> float:
    begun = perf_counter_ns()
    for data in packets:
        tracker.confirm(tracker.track(parse(data), 2.0), 2.0)
    return (perf_counter_ns() - begun) / len(packets)


def _parse_each(packets: list[bytes]) -> float:
    begun = perf_counter_ns()
    for data in packets:
        parse(data)
    return (perf_counter_ns() - begun) / len(packets)


# --- many flows -----------------------------------------------------------------------------------


def memory(kind: str) -> float:
    """Megabytes that a million flows of a kind take, from sources that all differ."""
    chance = random.Random(2)
    tracker = Tracker(STRICT, limit_count=ENTRIES + 1)
    gc.freeze()
    before = resident_bytes()
    for number in range(ENTRIES):
        now = number * 1e-5
        source = 0x0B000000 + number
        if kind == "UDP":
            packets = [datagram(source, 40_000)]
        else:
            packets = handshake(chance, source, 40_000)
            packets = packets if kind == "established" else packets[:1]
        for data in packets:
            feed(tracker, data, now)
    assert len(tracker) == ENTRIES
    return (resident_bytes() - before) / 1e6


def pauses() -> dict[str, list[int]]:
    """CPU nanoseconds of the worst packets while growing, expiring and collecting garbage.

    As in the worker: gc.freeze() at the start, rounds of expiry between packets, automatic
    collections on.
    """
    chance = random.Random(3)
    tracker = Tracker(STRICT, limit_count=2 * ENTRIES)
    worker_freezes()
    growing, sweeps = [], []
    for number in range(ENTRIES):
        data = segment(0x0B000000 + number, 40_000, _SYN, chance.getrandbits(32))
        now = 0.0 if number < EXPIRING else 20.0
        begun = thread_time_ns()
        feed(tracker, data, now)
        growing.append(thread_time_ns() - begun)
    expiring = []
    number = 0
    while tracker.counters.expired < EXPIRING:
        begun = thread_time_ns()
        tracker.expire(31.0, budget=SWEEP_COUNT)
        sweeps.append(thread_time_ns() - begun)
        data = segment(0x0C000000 + number, 40_000, _SYN, 7)
        begun = thread_time_ns()
        feed(tracker, data, 31.0)
        expiring.append(thread_time_ns() - begun)
        number += 1
    collecting = []
    for number in range(50_000):
        data = segment(0x0D000000 + number, 40_000, _SYN, 7)
        begun = thread_time_ns()
        feed(tracker, data, 31.0)
        collecting.append(thread_time_ns() - begun)
    return {"growing": growing, "expiring": expiring, "sweep": sweeps, "collecting": collecting}


def worker_freezes() -> None:
    """What the worker does about Python's collector when it starts."""
    gc.freeze()
    gc.set_threshold(2_000, 4, 1_000_000)


def collisions() -> tuple[float, float]:
    """Seconds for flows whose tuples an attacker chose to collide, and for random ones.

    The tuples would collide as integers: 2**61 - 1 is the modulus of CPython's integer hash, and
    2**64 is 8 modulo it, so (word + 8, next - 1) pairs of the key keep the hash.
    """
    chance = random.Random(4)
    crafted = []
    step = (1 << 61) - 1
    for number in range(COLLIDING):
        value = (0x0B000001 << 64) + step * number
        key = value.to_bytes(12, "big")
        crafted.append(_from_key(key))
    usual = [_from_key(chance.randbytes(12)) for _ in range(COLLIDING)]
    return _insert_all(crafted), _insert_all(usual)


def _from_key(key: bytes) -> bytes:
    """A SYN whose addresses and ports are these 12 bytes."""
    head = _HEAD.pack(0x45, 0, 40, 0, 0, 64, 6, 0, 0, 0)[:12] + key[:8]
    return head + key[8:] + struct.pack("!IIBBHHH", 1, 0, 0x50, _SYN, 0xFFFF, 0, 0)


def _insert_all(packets: list[bytes]) -> float:
    best = float("inf")
    for _ in range(3):
        tracker = Tracker(STRICT)
        begun = perf_counter_ns()
        for data in packets:
            feed(tracker, data, 1.0)
        best = min(best, (perf_counter_ns() - begun) / 1e9)
    return best


# --- report ---------------------------------------------------------------------------------------


def measure() -> list[Figure]:
    """Measure each part in a fresh process."""
    times = _apart(times_per_packet)
    figures = [
        Figure("parse one TCP segment", times["parse"] / 1e3, "us"),
        Figure("parse, track, confirm: known flow", times["known"] / 1e3, "us"),
        Figure("parse, track, confirm: new flow", times["new"] / 1e3, "us"),
    ]
    figures += [
        Figure(f"{ENTRIES:,} {kind} flows", _apart(memory, kind), "MB", at_most=560)
        for kind in ("half-open", "UDP", "established")
    ]
    waits = _apart(pauses)
    for name, what in (
        ("growing", f"growing to {ENTRIES:,} flows"),
        ("expiring", f"{EXPIRING:,} flows expire"),
        ("collecting", "as many are kept"),
    ):
        ordered = sorted(waits[name])
        figures += [
            Figure(f"worst packet while {what}", ordered[-1] / 1e6, "ms", at_most=5),
            Figure(f"p99.9 packet while {what}", percentile(ordered, 0.999) / 1e6, "ms"),
        ]
    figures.append(Figure("worst round of expiry", max(waits["sweep"]) / 1e6, "ms", at_most=5))
    crafted, usual = _apart(collisions)
    figures.append(
        Figure(f"{COLLIDING:,} crafted tuples", crafted, "s", usual, "random tuples", at_most=2)
    )
    return figures


def _apart(function: Callable, *arguments: object):
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)
