"""Client, node with a proxy, server: where `bench.proxy` measures, the same for every proxy.

wrk runs in host `a`, nginx in host `b`, on one processor; the proxy runs in the node, alone on
another one. `Transparent` proxies get the client's connections to `b` by TPROXY and have the
client's address towards the server, ours and haproxy alike. The others are asked at the node's own
address and keep it: that is less work, and all that they can do.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Self

from conntrack.address import Prefix, parse_address
from firewall.control.agent_channel import AgentChannel
from firewall.identities.labels import LabelSet
from firewall.policy.readers import read
from firewall.policy.repository import Repository
from firewall.policy.resolve import Resolver
from firewall.policy.snapshot import EndpointRow
from firewall.policy.snapshot_file import encode
from lab.laboratory import Lab, Machine
from lab.topology import HostPlan, Topology

Argument = str | Path | int

PORT = 80
PROXY_PORT = 15001
NODE = "10.0.9.1"
BIG_BYTES = 1 << 30
_REDIRECTED = "0x2"
_PROCESSORS = sorted(os.sched_getaffinity(0))
PROXY_PROCESSOR, OTHERS_PROCESSOR = _PROCESSORS[0], _PROCESSORS[-1]
_START_S = 20.0
_SCRIPT = Path(__file__).with_name("load.lua")
_TICKS_S = os.sysconf("SC_CLK_TCK")

_NGINX = """
user root; daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 8192; }}
http {{
  access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000000000;
  default_type text/plain;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{
    listen {port} backlog=1024; root {folder};
    location /public/ {{ return 200 "{body}"; }}
    location /public/file/ {{ alias {folder}/; }}
  }}
}}
"""

_HAPROXY = """
global
  nbthread 1
  maxconn 4000
defaults
  mode http
  timeout client 60s
  timeout server 60s
  timeout connect 5s
frontend front
  bind :{port} transparent
  http-request deny deny_status 403 unless {{ method GET }} {{ path_reg ^/public/.*$ }}
  default_backend back
backend back
  source 0.0.0.0 usesrc clientip
  server original 0.0.0.0
"""


class Gateway:
    """The three machines, with the server running; a context manager."""

    def __init__(self) -> None:
        plans = tuple(HostPlan(name=name, labels={"app": name}) for name in "ab")
        self.lab = Lab(Topology(name="gateway", hosts=plans, node_addresses=(NODE,)))
        self.node, self.client, self.server = self.lab.node, self.lab.host("a"), self.lab.host("b")
        folder = self.lab.folder
        (folder / "64k").write_bytes(bytes(65536))
        with (folder / "big").open("wb") as big:
            big.truncate(BIG_BYTES)
        configuration = folder / "nginx.conf"
        configuration.write_text(
            _NGINX.format(folder=folder, port=PORT, body="x" * 100), encoding="utf-8"
        )
        self.server.start(pinned(OTHERS_PROCESSOR, ["nginx", "-c", configuration]))
        _await_listener(self.server, PORT)
        append = "iptables -t mangle -A PREROUTING"
        tproxy = f"-j TPROXY --on-port {PROXY_PORT} --tproxy-mark {_REDIRECTED}"
        for argv in (
            f"ip rule add fwmark {_REDIRECTED} lookup 100",
            "ip route add local 0.0.0.0/0 dev lo table 100",
            f"{append} -i to-a -p tcp -d {self.server.address4} --dport {PORT} {tproxy}",
            # Packets of the server back to the transparent upstream socket.
            f"{append} -i to-b -p tcp -m socket --transparent -j MARK --set-mark {_REDIRECTED}",
        ):
            self.node.run(argv.split(), check=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lab.close()

    def load(
        self,
        proxy: "Proxy",
        path: str,
        *,
        connections: int,
        seconds: int,
        headers: Sequence[str] = (),
        rate: float | None = None,
        paths: int | None = None,
    ) -> dict[str, int]:
        """Run wrk and return what `load.lua` says; `rate` in requests/s, None = all it can."""
        environment = {"CONNECTIONS": str(connections)}
        if proxy.forward:
            environment["TARGET"] = f"http://{self.server.address4}{path}"
        if rate is not None:
            environment["RATE"] = str(rate)
        if paths is not None:
            environment["PATHS"] = str(paths)
        done = self.client.run(
            pinned(
                OTHERS_PROCESSOR,
                ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", _SCRIPT,
                 *(f"-H{header}" for header in headers), f"http://{proxy.address}:{proxy.port}{path}"],
            ),
            timeout_s=seconds + 30,
            check=True,
            env=environment,
        )  # fmt: skip
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return found

    def download_s(self, proxy: "Proxy") -> float:
        """Return how long the big file takes, once."""
        done = self.client.run(
            pinned(
                OTHERS_PROCESSOR,
                ["curl", "-s", "--fail", "-o", "/dev/null", "-w", "%{time_total}",
                 f"http://{proxy.address}:{proxy.port}/public/file/big"],
            ),
            timeout_s=120,
            check=True,
        )  # fmt: skip
        return float(done.stdout)


def pinned(processor: int, argv: Sequence[Argument]) -> list[str]:
    """Return the command that keeps a program on one processor."""
    return ["taskset", "-c", str(processor), *map(str, argv)]


class Proxy:
    """A proxy that runs in the node, ended with the block.

    Attributes:
        address: what the client asks.
        forward: it must be told the server in each request.
    """

    def __init__(
        self,
        gateway: Gateway,
        argv: Sequence[Argument],
        address: str,
        *,
        forward: bool = False,
    ) -> None:
        self.address = address
        self.port = PROXY_PORT if address == NODE else PORT
        self.forward = forward
        _await_listener(gateway.node, PROXY_PORT, there=False)
        self.process = gateway.node.start(pinned(PROXY_PROCESSOR, argv))
        _await_listener(gateway.node, PROXY_PORT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # proxy.py leaves its workers behind
        self.process.wait()

    def processor_s(self) -> float:
        """Return the processor time that it has used. nsenter and taskset have become it."""
        fields = (
            Path(f"/proc/{self.process.pid}/stat").read_text("ascii").rpartition(")")[2].split()
        )
        return (int(fields[11]) + int(fields[12])) / _TICKS_S

    def resident_bytes(self) -> int:
        """Return its resident memory."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text("ascii").split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


class Ours(Proxy):
    """One worker of ours, with an agent that takes its events and throws them away."""

    def __init__(
        self, gateway: Gateway, *, rules: int = 1, options: Sequence[str | Path] = ()
    ) -> None:
        folder = gateway.lab.folder
        snapshot = folder / "snapshot"
        snapshot.write_bytes(_snapshot(gateway, rules))
        argv = [
            sys.executable, "-m", "l7proxy.worker", "--number", 0, "--port", PROXY_PORT,
            "--run-dir", folder, "--snapshot", snapshot, "--log-level", "warning", *options,
        ]  # fmt: skip
        super().__init__(gateway, argv, gateway.server.address4)
        self._agent = Thread(target=asyncio.run, args=(_drain(folder / "l7proxy-0.sock"),))
        self._agent.start()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._agent.join()


async def _drain(path: Path) -> None:
    """Be the agent: read until the worker ends."""
    os.sched_setaffinity(0, {OTHERS_PROCESSOR})  # of this thread
    agent = AgentChannel(path)
    await agent.connect(_START_S)
    async for _ in agent:
        pass
    agent.close()


def _snapshot(gateway: Gateway, rules: int) -> bytes:
    """Resolve a policy that lets `a` say GET /public/..., as the last of so many rules."""
    others = [{"method": "GET", "path": f"/service{at}/v1/.*"} for at in range(rules - 1)]
    policy = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "bench", "namespace": "default"},
        "spec": {
            "endpointSelector": {"matchLabels": {"app": "b"}},
            "ingress": [
                {
                    "fromEndpoints": [{"matchLabels": {"app": "a"}}],
                    "toPorts": [
                        {
                            "ports": [{"port": str(PORT), "protocol": "TCP"}],
                            "rules": {"http": [*others, {"method": "GET", "path": "/public/.*"}]},
                        }
                    ],
                }
            ],
        },
    }
    found = read(json.dumps(policy), "bench.json")
    assert not found.errors, found.errors[0]
    resolver = Resolver()
    rows, ipcache = [], []
    for number, host in enumerate((gateway.client, gateway.server), start=1):
        labels = (
            f"k8s:app={host.name}",
            "k8s:io.kubernetes.pod.namespace=default",
            "k8s:io.cilium.k8s.policy.cluster=default",
        )
        resolver.upsert_identity(255 + number, LabelSet.parse(labels))
        address = parse_address(host.address4)
        rows.append(EndpointRow(number, host.name, "default", 255 + number, (address,)))
        ipcache.append((Prefix(address, 32), 255 + number))
    resolver.set_endpoints(rows)
    resolver.apply(Repository().apply(found.objects))
    return encode(resolver.snapshot(ipcache=ipcache))


def haproxy(gateway: Gateway) -> Proxy:
    """Start haproxy with the same rule, one thread, transparent at both ends."""
    configuration = gateway.lab.folder / "haproxy.cfg"
    configuration.write_text(_HAPROXY.format(port=PROXY_PORT), encoding="utf-8")
    argv: list[Argument] = ["haproxy", "-db", "-f", configuration]
    return Proxy(gateway, argv, gateway.server.address4)


def plain_h11(gateway: Gateway) -> Proxy:
    """Start the proxy of `bench.plain_h11`."""
    argv: list[Argument] = [
        sys.executable,
        "-m",
        "bench.plain_h11",
        PROXY_PORT,
        gateway.server.address4,
    ]
    return Proxy(gateway, argv, NODE)


def proxy_py(gateway: Gateway, programs: Path) -> Proxy:
    """Start proxy.py, one process; a forward proxy, because in reverse it keeps no connection."""
    argv: list[Argument] = [
        programs / "proxy", "--hostname", "0.0.0.0", "--port", PROXY_PORT, "--num-workers", 1,
        "--num-acceptors", 1, "--threadless", "--local-executor", 1, "--log-level", "ERROR",
    ]  # fmt: skip
    return Proxy(gateway, argv, NODE, forward=True)


def mitmproxy(gateway: Gateway, programs: Path) -> Proxy:
    """Start mitmdump as a reverse proxy."""
    argv: list[Argument] = [
        programs / "mitmdump", "-q", "--mode", f"reverse:http://{gateway.server.address4}:{PORT}",
        "--listen-port", PROXY_PORT, "--set", f"confdir={gateway.lab.folder}/mitm",
    ]  # fmt: skip
    return Proxy(gateway, argv, NODE)


def others(folder: Path) -> Path | None:
    """Return where mitmproxy and proxy.py are; None: not there.

    `make bench` installs them beforehand: from inside an enclosure nothing can be fetched.
    """
    programs = folder / "bin"
    if (programs / "mitmdump").exists():
        return programs
    print(f"without mitmproxy and proxy.py, which are not in {folder}", file=sys.stderr)
    return None


def _await_listener(machine: Machine, port: int, *, there: bool = True) -> None:
    deadline = time.monotonic() + _START_S
    while (f":{port} " in machine.run(["ss", "-ltnH"]).stdout) is not there:
        if time.monotonic() > deadline:
            what = "nobody listens" if there else "somebody still listens"
            raise TimeoutError(f"{machine.name}: {what} on {port}\n{machine.log()}")
        time.sleep(0.05)
