"""DNS questions for an allowed name: through the proxy, against dnsmasq as a forwarder.

The same client and the same server (dnsmasq, answering from its own table) in both; between them
either our proxy, or a dnsmasq on the node that forwards and caches nothing. `WINDOW` questions are
under way at once, from `SOCKETS` ports.
"""

import select
import socket
import subprocess
import time
from statistics import median

import dns.message

from bench.figure import Figure
from lab import daemon, topology
from lab.laboratory import Host, Lab, Machine
from lab.topology import HostPlan, Topology

ROUNDS = 3
SECONDS = 2.0
SOCKETS = 16
WINDOW = 64
NAME = "bench.example"
SERVER = "203.0.113.53"
NODE = "10.0.0.1"

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: bench, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: a}}
  egress:
  - toEntities: [world]
    toPorts: [{ports: [{port: "53", protocol: ANY}], rules: {dns: [{matchPattern: "*.example"}]}}]
  - toFQDNs: [{matchPattern: "*.example"}]
"""


def measure() -> list[Figure]:
    """Take turns, so that a slow moment of the machine falls on both sides."""
    plan = topology.assigned(
        Topology(
            node_addresses=(NODE,),
            hosts=(
                HostPlan(name="a", labels={"app": "a"}),
                HostPlan(name="world", managed=False, addresses=(SERVER,)),
            ),
        )
    )
    ours: list[float] = []
    theirs: list[float] = []
    with Lab(plan) as lab:
        _dnsmasq(lab.host("world"), f"--address=/{NAME}/203.0.113.7", f"--listen-address={SERVER}")
        for _ in range(ROUNDS):
            forwarder = _dnsmasq(
                lab.node, f"--server={SERVER}", "--cache-size=0", f"--listen-address={NODE}"
            )
            theirs.append(_rate(lab.host("a"), NODE))
            forwarder.terminate()
            forwarder.wait()
            firewall = daemon.start(lab, {"workers": 1})
            firewall.apply(POLICY)
            ours.append(_rate(lab.host("a"), SERVER))
            firewall.stop()
    text = f"DNS questions for an allowed name, {WINDOW} at once, one proxy and one datapath worker"
    return [Figure(text, median(ours), "q/s", median(theirs), "dnsmasq forwarding")]


def _dnsmasq(machine: Machine, *options: str) -> "subprocess.Popen[str]":
    argv = [
        "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--bind-interfaces",
        "--conf-file=/dev/null", "--pid-file=", "--user=root", "--dns-forward-max=2000", *options,
    ]  # fmt: skip
    return machine.start(argv)


def _rate(client: Host, server: str) -> float:
    """Return answers per second, after a first one has come."""
    wire = dns.message.make_query(NAME, "A").to_wire()[2:]
    sockets = [client.datagram() for _ in range(SOCKETS)]
    poll = select.epoll()
    by_descriptor = {sock.fileno(): sock for sock in sockets}
    try:
        for sock in sockets:
            sock.connect((server, 53))
            sock.settimeout(5.0)
        _await_first(sockets[0], wire)
        for sock in sockets:
            sock.setblocking(False)
            poll.register(sock, select.EPOLLIN)
            for _ in range(WINDOW // SOCKETS):
                sock.send(b"\x00\x01" + wire)
        return _count(poll, by_descriptor, b"\x00\x01" + wire)
    finally:
        poll.close()
        for sock in sockets:
            sock.close()


def _await_first(sock: socket.socket, wire: bytes) -> None:
    deadline = time.monotonic() + 10.0
    sock.settimeout(0.2)
    while time.monotonic() < deadline:
        try:
            sock.send(b"\x00\x02" + wire)
            if sock.recv(512)[3] & 15 == 0:
                return
        except (TimeoutError, ConnectionRefusedError):
            continue
    raise TimeoutError("no answer")


def _count(poll: select.epoll, sockets: dict[int, socket.socket], question: bytes) -> float:
    """Ask again for every answer; of a question that was lost, another one takes the place."""
    began = time.monotonic()
    answered = 0
    while time.monotonic() - began < SECONDS:
        ready = poll.poll(0.2)
        if not ready:
            for sock in sockets.values():
                sock.send(question)
        for descriptor, _ in ready:
            sock = sockets[descriptor]
            while True:
                try:
                    sock.recv(512)
                except BlockingIOError:
                    break
                answered += 1
                sock.send(question)
    return answered / (time.monotonic() - began)
