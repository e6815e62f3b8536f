"""Packets per second that one worker decides, every packet in userspace.

A worker is stopped, a queueful of datagrams of one known flow gathers, and it is let go: it has
nothing to wait for, reads as many per turn as it may, and its processor time divided by the packets
is what a packet costs. That holds on a busy machine, too, and the sender takes no part in it. What
the kernel does for the worker's system calls is in it: the queue's copy, the rest of the packet's
way, the delivery to the receiver.
"""

import time

from bench.figure import Figure
from bench.loop import ACCEPT, CALLBACK, WORKER, Variant, instead
from bench.verdicts import POLICY, known_flow
from lab import daemon
from lab.laboratory import Host, Lab
from lab.topology import hosts

PACKETS = 6_000
"""In one queueful; the queue holds 8,192."""

ROUNDS = 8

SINGLE = ("--single",)


def measure() -> list[Figure]:
    """Drain queues with each variant."""
    rate = {
        (kind, flags): _packets_per_s(kind, *flags)
        for kind, flags in (
            (CALLBACK, ()),
            (ACCEPT, SINGLE),
            (ACCEPT, ()),
            (WORKER, SINGLE),
            (WORKER, ()),
        )
    }
    bare = "the same loop without tracker and policy"
    callback = rate[CALLBACK, ()]
    single, batched = rate[WORKER, SINGLE], rate[WORKER, ()]
    unit = "packets/s"
    return [
        Figure("callback that accepts", callback, unit),
        Figure("that loop, a verdict each", rate[ACCEPT, SINGLE], unit, callback, "callback"),
        Figure("that loop, batched", rate[ACCEPT, ()], unit, callback, "callback"),
        Figure("worker, a verdict each", single, unit, rate[ACCEPT, SINGLE], bare, 0.70),
        Figure("worker, batched verdicts", batched, unit, rate[ACCEPT, ()], bare, 0.65),
        Figure("worker, batched", batched, unit, single, "a verdict each", 1.5),
    ]


def _packets_per_s(kind: str, *flags: str) -> float:
    """Return packets per second of processor time: the best round, the least disturbed one."""
    with Lab(hosts(a="app=a", b="app=b")) as lab:
        firewall = daemon.start(lab, {"workers": 1, "bypass": False})
        firewall.apply(POLICY)
        with instead(lab, firewall, kind, *flags) as variant:
            datagram = known_flow(lab.host("a"), lab.host("b"))
            costs_s = [_drain(variant, lab.host("a"), datagram) for _ in range(ROUNDS)]
    return 1 / min(costs_s)


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
