"""A proxy worker of its own in a machine of a lab, with the redirection that it needs."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from http_transcript import PUBLIC
from http_transcript import snapshot as two_endpoints

from firewall.control.agent_channel import AgentChannel
from firewall.control.messages import Acknowledged, Events
from firewall.policy.snapshot import Snapshot
from firewall.policy.snapshot_file import encode

MARK = "0x3"
"""On everything that the proxy sends."""
_REDIRECTED = "0x2"
PROXY_PORT = 15001
DEADLINE_S = 30.0


def snapshot(*, port=80, clients=None, servers=None, **policy) -> Snapshot:
    """The two endpoints of the transcripts, at these packed addresses and this port."""
    made = two_endpoints(**({"rules": PUBLIC} | policy))
    replace = msgspec.structs.replace

    def moved(direction):
        entries = tuple(replace(row, port_low=port, port_high=port) for row in direction.entries)
        return replace(direction, entries=entries)

    policies = tuple(
        replace(row, ingress=moved(row.ingress), egress=moved(row.egress)) for row in made.policies
    )
    client, server = made.endpoints
    endpoints = (
        replace(client, addresses=clients or client.addresses),
        replace(server, addresses=servers or server.addresses),
    )
    return replace(made, policies=policies, endpoints=endpoints)


class Live:
    """`python -m l7proxy.worker` in `machine`, ended with the block."""

    def __init__(self, machine, folder: Path, *options, source=None, port=80) -> None:
        self.machine = machine
        self.folder = folder
        self.snapshot_path = folder / "snapshot"
        self.socket_path = folder / "l7proxy-0.sock"
        self.access_log = folder / "access.log"
        self.snapshot_path.write_bytes(encode(source or snapshot(port=port)))
        self.process = machine.start(
            [sys.executable, "-m", "l7proxy.worker", "--number", 0, "--port", PROXY_PORT,
             "--run-dir", folder, "--snapshot", self.snapshot_path, "--mark-from-proxy", MARK,
             "--access-log", self.access_log, *options]
        )  # fmt: skip
        for argv in (
            f"ip rule add fwmark {_REDIRECTED} lookup 100",
            "ip route add local 0.0.0.0/0 dev lo table 100",
            f"ip -6 rule add fwmark {_REDIRECTED} lookup 100",
            "ip -6 route add local ::/0 dev lo table 100",
        ):
            machine.run(argv.split(), check=True)

    def __enter__(self):
        deadline = time.monotonic() + DEADLINE_S
        while not self.socket_path.exists():
            assert self.running, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def resident_bytes(self) -> int:
        """RSS of the worker; nsenter(1) execs, so the pid that was started is the worker's."""
        statm = Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii")
        return int(statm.split()[1]) * 4096

    async def announce(self, source: Snapshot) -> list:
        """Publish another snapshot and wait until it is enforced; the events seen meanwhile."""
        agent = AgentChannel(self.socket_path)
        await agent.connect(DEADLINE_S)
        self.snapshot_path.write_bytes(encode(source))
        await agent.announce(source.revision, self.snapshot_path)
        events = []
        async with asyncio.timeout(DEADLINE_S):
            async for message in agent:
                if isinstance(message, Events):
                    events += message.events
                if isinstance(message, Acknowledged):
                    assert (message.revision, message.error) == (source.revision, "")
                    break
        agent.close()
        return events

    def log(self) -> str:
        return self.machine.log()

    def redirect(self, address: str, port: int, protocol: str = "tcp") -> None:
        """Hand what goes to this address and port to the proxy, except what the proxy sends."""
        program = "ip6tables" if ":" in address else "iptables"
        table = f"{program} -t mangle -A PREROUTING -p {protocol}"
        answers = "! --syn" if protocol == "tcp" else ""
        match = f"{table} -d {address} --dport {port}"
        for argv in (
            f"{match} -m mark --mark {MARK} -j RETURN",
            f"{match} -j TPROXY --on-port {PROXY_PORT} --tproxy-mark {_REDIRECTED}",
            # Packets of the server back to the transparent upstream socket.
            f"{table} {answers} -m socket --transparent -j MARK --set-mark {_REDIRECTED}",
        ):
            self.machine.run(argv.split(), check=True)
