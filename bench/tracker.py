"""The tracker alone: time per packet, memory per flow, and the longest that a packet waits.

Each part runs in a process of its own, so that memory and garbage of one do not burden another.
Packets are bytes, parsed as in the worker; times are CPU time of `parse`, `track` and `confirm`
together unless said otherwise, because the machine does other things, too. The parts that take long
run two at a time.

Where `make compiled` has been run, the times are taken on both builds.
"""

import gc
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import thread_time_ns
from typing import Any

import conntrack.tracker
from bench.figure import Figure
from conntrack.flow import FlowTuple
from conntrack.packet import PacketError, parse
from conntrack.tracker import STRICT, Tracker

ENTRIES = 1_000_000
GROWING = 300_000
EXPIRING = 200_000
COLLIDING = 32_000
MUTANTS = 300_000
FLOOD = 300_000
PAGE_BYTES = 4096
ROOT = Path(__file__).parents[1]
COMPILED = ROOT / "build/compiled"
_SHARE = 4
"""A source may have a quarter of the table, as in the daemon."""

_HEAD = struct.Struct("!BBHHHBBHII")
_TCP = struct.Struct("!HHIIBBHHH")
_SYN, _SYN_ACK, _ACK, _FIN_ACK = 0x02, 0x12, 0x10, 0x11
_SERVER = 0x0A000002


def segment(  # noqa: PLR0917 -- the fields of a segment, in its order
    source: int, port: int, flags: int, sequence: int, ack: int = 0, payload: int = 0,
    *, reply: bool = False, server: int = _SERVER,
) -> bytes:  # fmt: skip
    """A TCP segment between a client (address as a number) and a server, checksums left out."""
    ends = (server, source) if reply else (source, server)
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
    """Nanoseconds per packet: of known flows, of new flows, of short ones, of parsing alone."""
    chance = random.Random(1)
    tracker = Tracker(STRICT)
    flows = []
    for number in range(1_000):
        opening = handshake(chance, 0x0A010000 + number, 40_000)
        for data in opening:
            feed(tracker, data, 1.0)
        flows.append(opening)
    data_packets, endings = [], []
    for number, (syn, answer, _) in enumerate(flows):
        client = int.from_bytes(syn[24:28], "big") + 1 & 0xFFFFFFFF
        server = int.from_bytes(answer[24:28], "big") + 1 & 0xFFFFFFFF
        source = 0x0A010000 + number
        sent, closed = (client + 1000) & 0xFFFFFFFF, (client + 1) & 0xFFFFFFFF
        data_packets.append(segment(source, 40_000, _ACK, client, server, 1000))
        data_packets.append(segment(source, 40_000, _ACK, server, sent, reply=True))
        endings += [
            *flows[number],
            segment(source, 40_000, _FIN_ACK, client, server),
            segment(source, 40_000, _FIN_ACK, server, closed, reply=True),
            segment(source, 40_000, _ACK, closed, server + 1 & 0xFFFFFFFF),
        ]
    fresh = [segment(0x0B000000 + n, 40_000, _SYN, chance.getrandbits(32)) for n in range(20_000)]
    return {
        "known": min(_each(tracker, data_packets) for _ in range(20)),
        "new": min(_each(Tracker(STRICT), fresh) for _ in range(3)),
        "short": 6 * min(_each(Tracker(STRICT), endings) for _ in range(10)),
        "parse": min(_parse_each(data_packets) for _ in range(20)),
    }


def _each(tracker: Tracker, packets: list[bytes]) -> float:
    begun = thread_time_ns()
    for data in packets:
        tracker.confirm(tracker.track(parse(data), 2.0), 2.0)
    return (thread_time_ns() - begun) / len(packets)


def _parse_each(packets: list[bytes]) -> float:
    begun = thread_time_ns()
    for data in packets:
        parse(data)
    return (thread_time_ns() - begun) / len(packets)


# --- many flows -----------------------------------------------------------------------------------


def _as_in_the_worker() -> None:
    """What the worker does about Python's collector when it starts."""
    from firewall.datapath.process import COLLECTOR_THRESHOLDS

    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


def memory(kind: str) -> float:
    """Megabytes that a million flows of a kind take, from sources that all differ.

    Of half-open ones `lifetime` tells.
    """
    chance = random.Random(2)
    tracker = Tracker(STRICT, limit_count=ENTRIES, source_limit_count=ENTRIES // _SHARE)
    _as_in_the_worker()
    before = resident_bytes()
    for number in range(ENTRIES):
        now = number * 1e-5
        source = 0x0B000000 + number
        udp = kind == "UDP"
        for data in [datagram(source, 40_000)] if udp else handshake(chance, source, 40_000):
            feed(tracker, data, now)
    assert len(tracker) == ENTRIES
    return (resident_bytes() - before) / 1e6


class Worst:
    """The longest and the 99.9th percentile of many times, in buckets of a microsecond."""

    def __init__(self) -> None:
        self.buckets = [0] * 100_000

    def note(self, nanoseconds: int) -> None:
        """One more."""
        self.buckets[min(nanoseconds // 1_000, len(self.buckets) - 1)] += 1

    def figures(self) -> tuple[float, float]:
        """Milliseconds: (longest, 99.9th percentile)."""
        wanted, seen, at_percentile = sum(self.buckets) * 0.999, 0, -1
        longest = 0
        for microseconds, count in enumerate(self.buckets):
            seen += count
            if count:
                longest = microseconds
            if at_percentile < 0 and seen >= wanted:
                at_percentile = microseconds
        return longest / 1e3, at_percentile / 1e3


def growth(flows_per_source: int) -> tuple[float, float]:
    """Milliseconds of CPU of the worst packets while a table grows, collections included."""
    chance = random.Random(3)
    tracker = Tracker(STRICT, limit_count=2 * GROWING, source_limit_count=GROWING)
    _as_in_the_worker()
    worst = Worst()
    for number in range(GROWING):
        source, turn = divmod(number, flows_per_source)
        server, port = divmod(turn, 60_000)
        number_sent = chance.getrandbits(32)
        data = segment(0x0B000000 + source, port + 1, _SYN, number_sent, server=_SERVER + server)
        _timed_feed(tracker, data, 0.0, worst)
    assert len(tracker) == GROWING
    return worst.figures()


def lifetime() -> dict[str, Any]:
    """A million half-open flows, a source each; 200,000 of them die at once; others come.

    While they die, there is a round of expiry between any two packets, as in the worker.

    Returns:
        Megabytes that the million took, and milliseconds of CPU (longest, 99.9th percentile) of
        packets and rounds of expiry.
    """
    from firewall.datapath.sweep import BUDGET_COUNT, MANY_COUNT

    chance = random.Random(3)
    tracker = Tracker(STRICT, limit_count=2 * ENTRIES, source_limit_count=ENTRIES // _SHARE)
    growing, dying, rounds, later = (Worst() for _ in range(4))
    _as_in_the_worker()
    before = resident_bytes()
    for number in range(ENTRIES):
        data = segment(0x0B000000 + number, 40_000, _SYN, chance.getrandbits(32))
        _timed_feed(tracker, data, 0.0 if number < EXPIRING else 20.0, growing)
    megabytes = (resident_bytes() - before) / 1e6
    number = 0
    while tracker.counters.expired < EXPIRING:
        begun = thread_time_ns()
        if tracker.expire(31.0, budget=BUDGET_COUNT) >= MANY_COUNT:
            gc.collect(1)
        rounds.note(thread_time_ns() - begun)
        _timed_feed(tracker, segment(0x0C000000 + number, 40_000, _SYN, 7), 31.0, dying)
        number += 1
    for number in range(50_000):
        _timed_feed(tracker, segment(0x0D000000 + number, 40_000, _SYN, 7), 31.0, later)
    return {
        "megabytes": megabytes,
        "growing": growing.figures(),
        "dying": dying.figures(),
        "round": rounds.figures(),
        "later": later.figures(),
    }


def _timed_feed(tracker: Tracker, data: bytes, now: float, worst: Worst) -> None:
    begun = thread_time_ns()
    feed(tracker, data, now)
    worst.note(thread_time_ns() - begun)


def mutations() -> float:
    """Milliseconds of CPU of the worst of many packets, most of them changed or cut."""
    chance = random.Random(5)
    tracker = Tracker(STRICT, limit_count=10_000)
    _as_in_the_worker()
    opening = handshake(chance, 0x0A010001, 40_000)
    templates = [*opening, datagram(0x0A010001, 40_000), segment(0x0A010001, 1, _ACK, 1, 1, 400)]
    six = bytes((60, 0, 0, 0)) + bytes(4)
    templates.append(struct.pack("!IHBB", 6 << 28, 400, 60, 64) + bytes(32) + six * 50)
    quoted = bytes((3, 1, 0, 0)) + bytes(4) + opening[0]
    templates.append(_HEAD.pack(0x45, 0, 68, 0, 0, 64, 1, 0, _SERVER, 0x0A010001) + quoted)
    chunks = _HEAD.pack(0x45, 0, 432, 0, 0, 64, 132, 0, 0x0A010001, _SERVER)
    templates.append(chunks + bytes(12) + bytes((0, 0, 0, 4)) * 100)
    worst = Worst()
    for number in range(MUTANTS):
        data = bytearray(templates[number % len(templates)])
        for _ in range(chance.randrange(4)):
            data[chance.randrange(len(data))] = chance.choice(
                (0, 1, 60, 255, chance.randrange(256))
            )
        if chance.random() < 0.1:
            del data[chance.randrange(len(data)) :]
        mutant, now = bytes(data), number * 1e-4
        begun = thread_time_ns()
        try:
            packet = parse(mutant)
        except PacketError:
            packet = None
        if packet is not None:
            tracker.confirm(tracker.track(packet, now), now)
        worst.note(thread_time_ns() - begun)
    return worst.figures()[0]


def flood() -> tuple[float, float, int]:
    """300,000 SYN from anywhere at a full table in which a tenth is established.

    Returns:
        Milliseconds of CPU (longest, 99.9th percentile), and how many established flows were lost.
    """
    chance = random.Random(6)
    limit = 100_000
    tracker = Tracker(STRICT, limit_count=limit, source_limit_count=limit // _SHARE)
    _as_in_the_worker()
    for number in range(limit // 10):
        for data in handshake(chance, 0x0A010000 + number, 40_000):
            feed(tracker, data, 0.0)
    worst = Worst()
    for _ in range(FLOOD):
        data = segment(chance.getrandbits(32), chance.randrange(1, 65536), _SYN, 1)
        _timed_feed(tracker, data, 1.0, worst)
    assert len(tracker) <= limit
    lost = limit // 10 - sum(entry.assured for entry in tracker.entries())
    return *worst.figures(), lost


def restoring() -> float:
    """Seconds of CPU to take over 100,000 flows from another tracker."""
    tracker = Tracker(STRICT)
    flows = [
        FlowTuple((0x0A010000 + n).to_bytes(4, "big"), b"\x0a\0\0\2", 6, 40_000, 80)
        for n in range(100_000)
    ]
    begun = thread_time_ns()
    for flow in flows:
        tracker.restore(flow, 1.0, timeout_s=3600, state=3)
    return (thread_time_ns() - begun) / 1e9


def collisions() -> tuple[float, float]:
    """Seconds for flows whose tuples an attacker chose to collide, and for random ones.

    The tuples would collide as integers: 2**61 - 1 is the modulus of CPython's integer hash, so
    keys that differ by a multiple of it, read as numbers, have one hash.
    """
    chance = random.Random(4)
    step = (1 << 61) - 1
    first = 0x0B000001 << 64
    crafted = [_from_key((first + step * n).to_bytes(12, "big")) for n in range(COLLIDING)]
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
        begun = thread_time_ns()
        for data in packets:
            feed(tracker, data, 1.0)
        best = min(best, (thread_time_ns() - begun) / 1e9)
    return best


# --- report ---------------------------------------------------------------------------------------

PARTS: dict[str, Callable[..., object]] = {
    "times": times_per_packet,
    "memory": memory,
    "growth": growth,
    "lifetime": lifetime,
    "collisions": collisions,
    "mutations": mutations,
    "flood": flood,
    "restoring": restoring,
}


def _apart(name: str, *arguments: object, compiled: bool = False) -> Any:
    """What one part says, in a fresh process, on the pure or the compiled packet path."""
    environment = dict(os.environ, PYTHONSAFEPATH="1")
    roots = [COMPILED, ROOT] if compiled else [ROOT]
    environment["PYTHONPATH"] = ":".join(map(str, roots))
    question = json.dumps([name, *arguments])
    done = subprocess.run(
        [sys.executable, "-m", "bench.tracker", question, str(int(compiled))],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"part {question} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _answer(question: str, compiled: str) -> None:
    is_compiled = not str(conntrack.tracker.__file__).endswith(".py")
    assert is_compiled == bool(int(compiled)), "the other build was imported"
    name, *arguments = json.loads(question)
    print(json.dumps(PARTS[name](*arguments)))


def measure() -> list[Figure]:
    """Measure each part in a fresh process."""
    return [*_times(), *_tables(), *_hostile()]


def _times() -> list[Figure]:
    pure = _apart("times")
    compiled = _apart("times", compiled=True) if COMPILED.is_dir() else None
    what = {
        "parse": "parse one TCP segment",
        "known": "parse, track, confirm: known flow",
        "new": "parse, track, confirm: new flow",
        "short": "the same, six segments from SYN to last ACK",
    }
    figures = [Figure(text, pure[key] / 1e3, "us") for key, text in what.items()]
    if compiled is not None:
        figures += [
            Figure(f"{text}, compiled", compiled[key] / 1e3, "us", pure[key] / 1e3, "pure")
            for key, text in what.items()
        ]
    return figures


def _tables() -> list[Figure]:
    shapes = {2: "two of each source", GROWING: "all of one source"}
    with ThreadPoolExecutor(2) as pool:
        established = pool.submit(_apart, "memory", "established")
        lived = pool.submit(_apart, "lifetime")
        grown = {count: pool.submit(_apart, "growth", count) for count in shapes}
        datagrams = pool.submit(_apart, "memory", "UDP")
        mutated = pool.submit(_apart, "mutations")
    said = lived.result()
    sizes = {
        "established": established.result(),
        "half-open": said["megabytes"],
        "UDP": datagrams.result(),
    }
    waits = {f"growing to {ENTRIES:,}, a source each": said["growing"]}
    waits |= {f"growing to {GROWING:,}, {shapes[n]}": grown[n].result() for n in shapes}
    waits[f"{EXPIRING:,} of {ENTRIES:,} expire"] = said["dying"]
    waits["as many are kept"] = said["later"]
    figures = [
        Figure(f"{ENTRIES:,} {kind} flows", size, "MB", at_most=560) for kind, size in sizes.items()
    ]
    for what, (longest, usual) in waits.items():
        figures += [
            Figure(f"worst packet while {what}", longest, "ms", at_most=5),
            Figure(f"p99.9 packet while {what}", usual, "ms"),
        ]
    return [
        *figures,
        Figure("worst round of expiry", said["round"][0], "ms", at_most=5),
        Figure(f"worst of {MUTANTS:,} mutated packets", mutated.result(), "ms", at_most=1),
    ]


def _hostile() -> list[Figure]:
    crafted, usual = _apart("collisions")
    longest, usual_wait, lost = _apart("flood")
    return [
        Figure(f"{COLLIDING:,} crafted tuples", crafted, "s", usual, "random tuples", at_most=2),
        Figure(f"worst packet of a flood of {FLOOD:,} SYN, table full", longest, "ms", at_most=5),
        Figure("p99.9 packet of that flood", usual_wait, "ms"),
        Figure("established flows lost to it, of 10,000", lost, "", at_most=0),
        Figure("100,000 flows taken over", _apart("restoring"), "s", at_most=2),
    ]


if __name__ == "__main__":
    _answer(*sys.argv[1:])
