"""The HTTP proxy beside haproxy and proxies written in Python; where and how: `bench.gateway`.

Figures are medians of rounds, ratios of the same run. "haproxy" is Debian's with its default
buffers, one thread, the same rule, transparent as we are; it writes no log, we make two flow
records of each request and send them. `python -m bench.proxy` alone says what is spent.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from socket import socket
from statistics import median
from typing import NamedTuple

from bench.figure import Figure
from bench.gateway import (
    BIG_BYTES,
    PROXY_PROCESSOR,
    Gateway,
    Ours,
    Proxy,
    haproxy,
    mitmproxy,
    others,
    plain_h11,
    proxy_py,
)

ROUNDS = 3
SECONDS = 2
CONNECTIONS = 64
RULES = 1_000
TARGETS = 50_000
"""Different paths, many more than are remembered anywhere."""
IDLE_COUNT = 2_000
_OTHERS = Path(__file__).parents[1] / ".bench"


class Load(NamedTuple):
    """What wrk asks for, and what it is called in the report."""

    what: str
    path: str
    connections: int = CONNECTIONS
    headers: Sequence[str] = ()
    at_least: float | None = None


LOADS = (
    Load(f"keep-alive, {CONNECTIONS} connections", "/public/a", at_least=0.45),
    Load("local 403", "/private/a", at_least=0.4),
    Load("64 KiB bodies, 16 connections", "/public/file/64k", 16, at_least=0.8),
    Load("new connection per request", "/public/a", headers=("Connection: close",), at_least=0.3),
)


def measure() -> list[Figure]:
    """Take turns, so that a slow moment of the machine falls on all sides."""
    print(f"proxy on processor {PROXY_PROCESSOR}, the others share the rest", file=sys.stderr)
    rates: dict[tuple[str, str], list[float]] = {}
    spent: dict[tuple[str, str], list[float]] = {}
    big: dict[str, list[float]] = {"haproxy": [], "ours": []}
    tails: dict[str, list[float]] = {"haproxy": [], "ours": []}
    started: tuple[tuple[str, Callable[[Gateway], Proxy]], ...] = (
        ("haproxy", haproxy),
        ("ours", Ours),
    )
    with Gateway() as gateway:
        for _ in range(ROUNDS):
            for name, start in started:
                with start(gateway) as proxy:
                    for load in LOADS:
                        rate, spent_us = _rate(gateway, proxy, load)
                        rates.setdefault((name, load.what), []).append(rate)
                        spent.setdefault((name, load.what), []).append(spent_us)
                    big[name].append(BIG_BYTES / gateway.download_s(proxy) / 1e6)
            half = rates["ours", LOADS[0].what][-1] / 2
            for name, start in started:
                with start(gateway) as proxy:
                    found = gateway.load(
                        proxy, "/public/a", connections=CONNECTIONS, seconds=3, rate=half
                    )
                    tails[name].append(found["p99"])
        figures = [
            Figure(
                f"proxy, {load.what}",
                median(rates["ours", load.what]),
                "req/s",
                median(rates["haproxy", load.what]),
                "haproxy",
                load.at_least,
            )
            for load in LOADS
        ]
        figures += [  # says the same where others use the processors as well
            Figure(
                f"proxy, {load.what}: processor time of each",
                median(spent["ours", load.what]),
                "us",
                median(spent["haproxy", load.what]),
                "haproxy",
            )
            for load in LOADS
        ]
        figures += [
            Figure(
                "proxy, 1 GiB body", median(big["ours"]), "MB/s", median(big["haproxy"]), "haproxy",
                at_least=0.8,
            ),
            Figure(
                "proxy, p99 at half its own peak rate", median(tails["ours"]), "us",
                median(tails["haproxy"]), "haproxy at that rate", at_most=3,
            ),
        ]  # fmt: skip
        figures += _in_python(gateway)
        figures += _rules(gateway)
        figures.append(_idle(gateway))
    return figures


def _rate(gateway: Gateway, proxy: Proxy, load: Load) -> tuple[float, float]:
    """Return requests per second, and how much of the processor each took in microseconds."""
    before = proxy.processor_s()
    found = gateway.load(
        proxy,
        load.path,
        connections=load.connections,
        seconds=SECONDS,
        headers=load.headers,
    )
    assert not found["failed"], found
    assert not found["refused"] or load.path.startswith("/private"), found
    spent_us = 1e6 * (proxy.processor_s() - before) / found["requests"]
    rate = 1e6 * found["requests"] / found["us"]
    print(
        f"{type(proxy).__name__:6} {load.what}: {rate:8.0f}/s {spent_us:6.1f} us", file=sys.stderr
    )
    return rate, spent_us


def _in_python(gateway: Gateway) -> list[Figure]:
    """Compare with proxies that people run, as far as they can be had, taking turns with us."""
    programs = others(_OTHERS)
    contenders: list[tuple[str, Callable[[Gateway], Proxy], float]] = [
        ("plain asyncio and h11", plain_h11, 3)
    ]
    if programs is not None:
        contenders += [
            ("proxy.py", partial(proxy_py, programs=programs), 2.5),
            ("mitmproxy", partial(mitmproxy, programs=programs), 30),
        ]
    rates: dict[str, list[float]] = {}
    started = [("ours", Ours), *((name, start) for name, start, _ in contenders)]
    for _ in range(ROUNDS):
        for name, start in started:
            with start(gateway) as proxy:
                rates.setdefault(name, []).append(_rate(gateway, proxy, LOADS[0])[0])
    return [
        Figure(
            f"proxy, {LOADS[0].what}",
            median(rates["ours"]),
            "req/s",
            median(rates[name]),
            name,
            at_least=at_least,
        )
        for name, _, at_least in contenders
    ]


def _rules(gateway: Gateway) -> list[Figure]:
    """Compare one rule with many: one target, and more targets than anybody remembers."""
    found: dict[tuple[int, int | None], list[float]] = {}
    for _ in range(ROUNDS):
        for rules in (1, RULES):
            with Ours(gateway, rules=rules) as proxy:
                for paths in (None, TARGETS):
                    said = gateway.load(
                        proxy, "/public/a", connections=CONNECTIONS, seconds=SECONDS,
                        paths=paths,
                    )  # fmt: skip
                    found.setdefault((rules, paths), []).append(1e6 * said["requests"] / said["us"])
    return [
        Figure(
            f"proxy, {RULES:,} rules, {what}",
            median(found[RULES, paths]),
            "req/s",
            median(found[1, paths]),
            "one rule",
            at_least=0.9,
        )
        for what, paths in (("one target", None), (f"{TARGETS:,} targets in turn", TARGETS))
    ]


def _idle(gateway: Gateway) -> Figure:
    """Return the memory of a connection that has had one answer, the server's end included."""
    request = b"GET /public/a HTTP/1.1\r\nHost: b\r\n\r\n"
    with Ours(gateway) as proxy:
        warm = [_asked(gateway, request) for _ in range(50)]
        before = proxy.resident_bytes()
        idle = [_asked(gateway, request) for _ in range(IDLE_COUNT)]
        each = (proxy.resident_bytes() - before) / IDLE_COUNT
        for connection in (*warm, *idle):
            connection.close()
    return Figure("proxy, memory of an idle connection", each / 1e3, "kB", at_most=20)


def _asked(gateway: Gateway, request: bytes) -> socket:
    connection = gateway.client.connect(gateway.server.address4, 80)
    connection.sendall(request)
    assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
    return connection
