"""Short exchanges through the node: HTTP connections, datagrams, pings; against plain forwarding.

HTTP: `CLIENTS` clients at once, a new connection for each request, one worker. Datagrams: one
client, 64 bytes each way, one flow. Ping: one flow, every `PING_INTERVAL_S`. The peers are small
programs of this module, started in the hosts; plain forwarding meets the same ones.
"""

import json
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from bench.figure import Figure, percentile
from lab import daemon
from lab.laboratory import Lab
from lab.topology import hosts

ROUNDS = 3
SECONDS = 2.5
CLIENTS = 16
PORT = 8080
DATAGRAM_BYTES = 64
PING_COUNT = 400
PING_INTERVAL_S = 0.005

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"

Sample = dict[str, float]


def measure() -> list[Figure]:
    """Take turns, so that a slow moment of the machine falls on all sides."""
    samples: dict[str, list[Sample]] = {"plain": [], "off": [], "on": []}
    for _ in range(ROUNDS):
        with Lab(hosts(a="app=a", b="app=b")) as lab:
            for what in ("http", "datagrams"):
                lab.host("b").start([sys.executable, "-m", "bench.exchanges", f"serve-{what}"])
            _await_listeners(lab)
            samples["plain"].append(_sample(lab))
            for bypass in ("off", "on"):
                firewall = daemon.start(lab, {"workers": 1, "bypass": bypass == "on"})
                samples[bypass].append(_sample(lab))
                assert firewall.stop() == 0

    def middle(side: str, what: str) -> float:
        return median(sample[what] for sample in samples[side])

    def rate(text: str, what: str, side: str, unit: str, promised: float | None) -> Figure:
        return Figure(
            text, middle(side, what), unit, middle("plain", what), "plain forwarding", promised
        )

    figures = [
        rate(f"HTTP, new connection per request, {CLIENTS} at once", "http", "on", "req/s", 0.60),
        rate("the same, every packet in userspace", "http", "off", "req/s", None),
        rate("UDP request/response, 64 bytes, one flow", "datagrams", "on", "req/s", 0.85),
        rate("the same, every packet in userspace", "datagrams", "off", "req/s", None),
    ]
    for side, where in (("on", "bypass on"), ("off", "every packet in userspace")):
        figures += [
            Figure(
                f"ping through the node, {share} added, {where}",
                middle(side, share) - middle("plain", share),
                "us",
            )
            for share in ("p50", "p99")
        ]
    return figures


def _await_listeners(lab: Lab) -> None:
    """Wait until both servers can be reached."""
    for option in ("-ltnH", "-lunH"):
        for _ in range(500):
            if f":{PORT}" in lab.host("b").run(["ss", option]).stdout:
                break
        else:
            raise TimeoutError("the servers do not listen")


def _sample(lab: Lab) -> Sample:
    """Measure everything once."""
    client, address = lab.host("a"), lab.host("b").address4
    sample: Sample = {}
    for what in ("http", "datagrams"):
        done = client.run(
            [sys.executable, "-m", "bench.exchanges", f"ask-{what}", address],
            timeout_s=SECONDS + 20,
            check=True,
        )
        sample[what] = json.loads(done.stdout)
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
