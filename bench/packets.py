"""Packets per second that one worker decides, every packet in userspace.

A variant of the loop is stopped, a queueful of datagrams of one known flow gathers, and it is let
go: it has nothing to wait for, reads as many per turn as it may, and its processor time divided by
the packets is what a packet costs. The sender takes no part in it. What the kernel does for its
system calls is in it: the queue's copy, the rest of the packet's way, the delivery to the receiver,
which waits for each packet on another processor and has to be woken, once or per packet.

The variants take turns in one lab, each alone on a processor, and the median of the rounds counts:
a machine that is now fast and now slow is so for all of them.
"""

import time
from collections import defaultdict
from statistics import median

from bench.build import builds, named
from bench.figure import Figure
from bench.loop import ACCEPT, CALLBACK, WORKER, Variant, displace
from bench.verdicts import POLICY, known_flow
from lab import daemon
from lab.laboratory import Host, Lab
from lab.topology import hosts

PACKETS = 6_000
"""In one queueful; the queue holds 8,192."""

ROUNDS = 5
DRAINS = 4
"""Queuefuls of a variant in one round; before them one that is not counted."""

Setup = tuple[str, tuple[str, ...], str]

SINGLE: tuple[str, ...] = ("--single",)
BATCHED: tuple[str, ...] = ()


def measure() -> list[Figure]:
    """Drain queues with each variant."""
    found = builds()
    variants: list[Setup] = [(CALLBACK, BATCHED, found[0])]
    variants += [
        (kind, flags, build)
        for build in found
        for kind in (ACCEPT, WORKER)
        for flags in (SINGLE, BATCHED)
    ]
    costs_s: dict[Setup, list[float]] = defaultdict(list)
    with Lab(hosts(a="app=a", b="app=b")) as lab:
        firewall = daemon.start(lab, {"workers": 1, "bypass": False})
        firewall.apply(POLICY)
        displace(lab, firewall)
        for _ in range(ROUNDS):
            for variant in variants:
                kind, flags, build = variant
                with Variant(lab, firewall, kind, *flags, build=build) as process:
                    costs_s[variant] += _drains(process, lab.host("a"), lab.host("b"))
    rate = {variant: 1 / median(costs) for variant, costs in costs_s.items()}
    figures = [Figure("callback that accepts", rate[variants[0]], "packets/s")]
    for build in found:
        figures += _figures(rate, build)
    return figures


def _figures(rate: dict[Setup, float], build: str) -> list[Figure]:
    """Compare the worker of a build with its own loop."""
    callback = rate[CALLBACK, BATCHED, builds()[0]]
    single, batched = rate[WORKER, SINGLE, build], rate[WORKER, BATCHED, build]
    alone, alone_batched = rate[ACCEPT, SINGLE, build], rate[ACCEPT, BATCHED, build]
    bare, unit = "the same loop without tracker and policy", "packets/s"
    return [
        Figure(named("that loop, a verdict each", build), alone, unit, callback, "callback"),
        Figure(named("that loop, batched", build), alone_batched, unit, callback, "callback"),
        Figure(named("worker, a verdict each", build), single, unit, alone, bare, 0.70),
        Figure(named("worker, batched verdicts", build), batched, unit, alone_batched, bare, 0.65),
        Figure(
            named("worker, batched against a verdict each", build),
            batched,
            unit,
            single,
            "a verdict each",
            1.5,
        ),
    ]


def _drains(variant: Variant, source: Host, target: Host) -> list[float]:
    """Return processor seconds per packet of some queuefuls."""
    with known_flow(source, target, is_read=True) as datagram:
        return [_drain(variant, source, datagram) for _ in range(DRAINS + 1)][1:]


def _drain(variant: Variant, source: Host, datagram: bytes) -> float:
    """Return processor seconds per packet of one queueful."""
    variant.pause()
    begun_s = variant.cpu_s()
    source.send(*[datagram] * PACKETS)
    count = variant.waiting_count()
    if count < PACKETS / 2:
        raise RuntimeError(f"only {count} of {PACKETS} packets are in the queue")
    variant.resume()
    while variant.waiting_count():
        time.sleep(0.01)
    return (variant.cpu_s() - begun_s) / count
