"""Short exchanges through the node: HTTP connections, datagrams, pings; against plain forwarding.

HTTP: `CLIENTS` clients at once, a new connection for each request, one worker. Datagrams: one
client, 64 bytes each way, one flow. Ping: one flow, every `PING_INTERVAL_S`. The peers are small
programs of this module, started in the hosts; plain forwarding meets the same ones.

"callback": the same rules, but what they queue is accepted by a callback of NetfilterQueue that
looks at nothing. No decision in Python can be made for less; it is the floor.
"""

import json
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from bench.build import PURE, builds, named, using
from bench.figure import Figure, percentile
from bench.loop import CALLBACK, Variant, cpu_s, displace
from lab import daemon
from lab.laboratory import Lab
from lab.topology import hosts

ROUNDS = 3
SECONDS = 2.0
CLIENTS = 16
PORT = 8080
DATAGRAM_BYTES = 64
PING_COUNT = 300
PING_INTERVAL_S = 0.005

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"

PLAIN, OFF, ON = "plain", "off", "on"
"""Sides besides the callback: no firewall; `bypass: off`; `bypass: on`."""

Sample = dict[str, float]


def measure() -> list[Figure]:
    """Take turns, so that a slow moment of the machine falls on all sides."""
    found = builds()
    sides = [
        (PLAIN, PURE),
        (CALLBACK, PURE),
        *((side, build) for build in found for side in (OFF, ON)),
    ]
    samples: dict[tuple[str, str], list[Sample]] = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side, sample in samples.items():
            sample.append(_side(*side))

    def middle(what: str, side: str, build: str = PURE) -> float:
        return median(sample[what] for sample in samples[side, build])

    http = f"HTTP, new connection per request, {CLIENTS} at once"
    plain = middle("http", PLAIN), "plain forwarding"
    callback = f"{http}, callback that accepts"
    figures = [Figure(callback, middle("http", CALLBACK), "/s", *plain)]
    for build in found:
        figures += _figures(http, build, middle)
    return figures


def _figures(http: str, build: str, middle: Callable[..., float]) -> list[Figure]:
    """Compare one build with plain forwarding and with the callback."""

    def rate(text: str, what: str, side: str, promised: float | None = None) -> Figure:
        value, plain = middle(what, side, build), middle(what, PLAIN)
        return Figure(named(text, build), value, "/s", plain, "plain forwarding", promised)

    figures = [
        rate(http, "http", ON, 0.60),
        rate(f"{http}, every packet in userspace", "http", OFF),
        *(
            Figure(
                named(f"worker's processor time per TCP connection, {where}", build),
                middle("worker", side, build),
                "us",
                middle("worker", CALLBACK),
                "callback that accepts",
                at_most=promised,
            )
            for side, where, promised in (
                (OFF, "every packet in userspace", 2.0),
                (ON, "bypass on", None),
            )
        ),
        Figure(
            named("agent's processor time per TCP connection", build),
            middle("agent", ON, build),
            "us",
        ),
        rate("UDP request/response, 64 bytes, one flow", "datagrams", ON, 0.85),
        rate("the same, every packet in userspace", "datagrams", OFF),
    ]
    for side, where in ((ON, "bypass on"), (OFF, "every packet in userspace")):
        figures += [
            Figure(
                named(f"ping through the node, {share} added, {where}", build),
                middle(share, side, build) - middle(share, PLAIN),
                "us",
            )
            for share in ("p50", "p99")
        ]
    return figures


def _side(side: str, build: str) -> Sample:
    """Measure one side once, in namespaces of its own: no flow of another is in any table."""
    with Lab(hosts(a="app=a", b="app=b")) as lab:
        for what in ("http", "datagrams"):
            lab.host("b").start([sys.executable, "-m", "bench.exchanges", f"serve-{what}"])
        _await_listeners(lab)
        if side == PLAIN:
            return _connections(lab, {}) | _others(lab)
        with using(build):
            firewall = daemon.start(lab, {"workers": 1, "bypass": side == ON})
        if side == CALLBACK:
            displace(lab, firewall)
            with Variant(lab, firewall, CALLBACK, pinned=False) as callback:
                return _connections(lab, {"worker": callback.pid})
        workers = firewall.get("/v1/status")["workers"]
        pids = {worker["kind"]: worker["pid"] for worker in workers}
        assert firewall.process is not None
        spent = {"worker": pids["datapath"], "agent": firewall.process.pid}
        return _connections(lab, spent) | _others(lab)


def _await_listeners(lab: Lab) -> None:
    """Wait until both servers can be reached."""
    for option in ("-ltnH", "-lunH"):
        for _ in range(500):
            if f":{PORT}" in lab.host("b").run(["ss", option]).stdout:
                break
        else:
            raise TimeoutError("the servers do not listen")


def _connections(lab: Lab, pids: dict[str, int]) -> Sample:
    """Measure HTTP, and microseconds of some processes' processor time per connection."""
    before_s = {name: cpu_s(pid) for name, pid in pids.items()}
    per_s = _asked(lab, "http")
    count = per_s * SECONDS
    spent = {name: (cpu_s(pid) - before_s[name]) / count * 1e6 for name, pid in pids.items()}
    return {"http": per_s, **spent}


def _asked(lab: Lab, what: str) -> float:
    """Have the client ask for `SECONDS`; return exchanges per second."""
    argv = [sys.executable, "-m", "bench.exchanges", f"ask-{what}", lab.host("b").address4]
    done = lab.host("a").run(argv, timeout_s=SECONDS + 20, check=True)
    return float(json.loads(done.stdout))


def _others(lab: Lab) -> Sample:
    """Measure datagrams and pings."""
    client, address = lab.host("a"), lab.host("b").address4
    sample: Sample = {"datagrams": _asked(lab, "datagrams")}
    pings = client.run(
        ["ping", "-n", "-c", str(PING_COUNT), "-i", str(PING_INTERVAL_S), address],
        timeout_s=60,
        check=True,
    )
    times_ns = sorted(
        int(1e6 * float(line.partition("time=")[2].split(" ")[0]))
        for line in pings.stdout.splitlines()
        if "time=" in line
    )
    sample["p50"], sample["p99"] = (percentile(times_ns, share) / 1e3 for share in (0.50, 0.99))
    return sample


# --- the peers, in processes of their own -----------------------------------------------------


def serve_http() -> None:
    """Answer one request per connection, for ever."""
    with socket.create_server(("", PORT), backlog=1024) as server:
        while True:
            connection, _ = server.accept()
            with connection:
                if connection.recv(4096):
                    connection.sendall(_ANSWER)


def ask_http(address: str) -> float:
    """Return requests per second of `CLIENTS` threads together."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(ask_http_alone, [address] * CLIENTS))


def ask_http_alone(address: str) -> float:
    """Return requests per second, a connection each, one after the other."""
    count, began = 0, time.monotonic()
    while (passed_s := time.monotonic() - began) < SECONDS:
        with socket.create_connection((address, PORT), 10) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: b\r\n\r\n")
            answer = b""
            while not answer.endswith(b"ok"):
                answer += connection.recv(4096)
            while connection.recv(4096):
                pass
        count += 1
    return count / passed_s


def serve_datagrams() -> None:
    """Send every datagram back, for ever."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("", PORT))
        while True:
            server.sendto(*server.recvfrom(2048))


def ask_datagrams(address: str) -> float:
    """Return round trips per second of one flow."""
    count, payload = 0, b"x" * DATAGRAM_BYTES
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.connect((address, PORT))
        began = time.monotonic()
        while (passed_s := time.monotonic() - began) < SECONDS:
            client.send(payload)
            client.recv(2048)
            count += 1
    return count / passed_s


if __name__ == "__main__":
    role = globals()[sys.argv[1].replace("-", "_")]
    print(role(*sys.argv[2:]))
