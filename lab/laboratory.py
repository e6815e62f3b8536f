"""A lab: a node and its hosts, made in a moment, gone without a trace.

    enclosure
    ├── node        forwards; holds the gateway fe80::1 / 169.254.1.1 of every link
    │   ├── to-a ────── eth0  host a   10.0.1.1/32, fd00:0:0:1::1/128, default route to the node
    │   └── to-b ────── eth0  host b
    ...

Links are routed, not bridged, so every packet between hosts passes the node's PREROUTING hook once.
Nothing of this needs anything to live in a host: sockets are opened in its namespace from here
(`lab.namespaces`), and programs are started there by nsenter(1).

Names of hosts resolve everywhere in the enclosure through /etc/hosts: `a`, `a.default`,
`a.default.svc`, `a.default.svc.cluster.local`, and what the topology adds.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lab import enclosure, namespaces, topology
from lab.closing import Closing
from lab.namespaces import Namespace
from lab.topology import HostPlan, Topology
from lab.wire import Capture, Link, frame

GATEWAY4 = "169.254.1.1"
GATEWAY6 = "fe80::1"
"""The node's address on every link (link-local: RFC 3927, RFC 4291)."""

TERM_GRACE_S = 2.0
"""How long a process may take to end after SIGTERM before it is killed."""

_INTERFACE_NAME_LENGTH = 15
"""IFNAMSIZ - 1, linux/if.h."""

_LINK_S = 20.0  # the kernel's linkwatch waits for a lock that the end of a namespace takes, too
_POLL_S = 0.001


class LabError(Exception):
    """The lab cannot be made; the text says which command failed and what it said."""


class Machine:
    """What a host and the node have in common: a namespace in which to run programs."""

    def __init__(self, name: str, addresses: Sequence[str], folder: Path) -> None:
        """Make the namespace `name`."""
        self.name = name
        self.addresses = tuple(addresses)
        self.folder = folder
        self.netns = Namespace(name)
        self._children: list[subprocess.Popen[str]] = []

    @property
    def namespace_path(self) -> Path:
        """The namespace's file, for `nsenter --net=` and `bartizan endpoint add --netns`."""
        return self.netns.path

    @property
    def address4(self) -> str:
        """The first IPv4 address; raises LookupError if the host has none."""
        return self._address(socket.AF_INET)

    @property
    def address6(self) -> str:
        """The first IPv6 address; raises LookupError if the host has none."""
        return self._address(socket.AF_INET6)

    def _address(self, family: int) -> str:
        for address in self.addresses:
            if topology.family(address) == family:
                return address
        raise LookupError(f"{self.name} has no {socket.AddressFamily(family).name} address")

    def address(self, family: int) -> str:
        """The first address of AF_INET or AF_INET6; raises LookupError if there is none."""
        return self._address(family)

    # --- programs -----------------------------------------------------------------------------

    def command(self, argv: Sequence[str | Path]) -> list[str]:
        """The command line that runs `argv` in this namespace."""
        return ["nsenter", f"--net={self.netns.path}", "--", *map(str, argv)]

    def run(
        self,
        argv: Sequence[str | Path],
        timeout_s: float = 120.0,
        *,
        check: bool = False,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; output is text. `env` is added to ours.

        Raises:
            subprocess.TimeoutExpired: it took longer than `timeout_s`, and was killed.
            LabError: `check` and it failed.
        """
        done = subprocess.run(
            self.command(argv),
            check=False,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env={**os.environ, **env} if env else None,
        )
        if check and done.returncode != 0:
            raise LabError(
                f"{self.name}$ {shlex.join(map(str, argv))}: exit {done.returncode}\n{done.stderr}"
            )
        return done

    def popen(
        self,
        argv: Sequence[str | Path],
        *,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.STDOUT,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program; it is ended with the lab, together with all that it started."""
        child = subprocess.Popen(
            self.command(argv),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, **env} if env else None,
        )
        self._children.append(child)
        return child

    def start(self, argv: Sequence[str | Path]) -> subprocess.Popen[str]:
        """Start a program whose output goes to a file of the lab, shown by `log()`."""
        log = self.folder / f"{self.name}-{len(self._children)}.log"
        with log.open("w", encoding="utf-8") as sink:
            return self.popen(argv, stdout=sink)

    def log(self) -> str:
        """What the programs begun by `start` have said so far."""
        files = sorted(self.folder.glob(f"{self.name}-*.log"))
        return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)

    # --- sockets ------------------------------------------------------------------------------

    def open_socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket of this namespace."""
        return self.netns.open_socket(family, kind, protocol)

    def listen(
        self, port: int, *, family: int = socket.AF_INET, address: str = "", backlog: int = 16
    ) -> socket.socket:
        """A TCP socket that listens on `port`; 0 = any free one."""
        server = self.open_socket(family, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(backlog)
        return server

    def datagram(
        self, port: int = 0, *, family: int = socket.AF_INET, address: str = ""
    ) -> socket.socket:
        """A UDP socket bound to `port`; 0 = any free one."""
        opened = self.open_socket(family, socket.SOCK_DGRAM)
        opened.bind((address, port))
        return opened

    def connect(
        self, address: str, port: int, *, timeout_s: float = 30.0, source_port: int = 0
    ) -> socket.socket:
        """A TCP connection from here.

        Raises:
            OSError: refused, unreachable; TimeoutError after `timeout_s`.
        """
        client = self.open_socket(topology.family(address), socket.SOCK_STREAM)
        try:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if source_port:
                client.bind(("", source_port))
            client.settimeout(timeout_s)
            client.connect((address, port))
        except BaseException:
            client.close()
            raise
        return client

    # --- end ----------------------------------------------------------------------------------

    def end_processes(self) -> None:
        """End what was started here: SIGTERM, then, for all that is left in here, SIGKILL."""
        for child in self._children:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + TERM_GRACE_S
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
        while left := [pid for pid in self.netns.processes() if pid != os.getpid()]:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for child in self._children:
                child.poll()
            if time.monotonic() > deadline + TERM_GRACE_S:
                break
            time.sleep(_POLL_S)  # processes that die want the processor, too
        for child in self._children:
            child.wait()
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream is not None:
                    stream.close()
        self._children.clear()


class Host(Machine):
    """One host with its link to the node.

    Attributes:
        plan: What the topology says about it.
        link: The veth pair; `interface` is its node side.
    """

    def __init__(self, plan: HostPlan, number: int, interface: str, folder: Path) -> None:
        """Make the host's namespace; the lab makes the link."""
        super().__init__(plan.name, plan.addresses, folder)
        self.plan = plan
        # 02: locally administered, unicast (RFC 9542 section 2.1); the rest is ours to number.
        self.link = Link(
            interface=interface,
            node_mac=bytes((2, 0xBA, 0x27, 0, number, 1)),
            host_mac=bytes((2, 0xBA, 0x27, 0, number, 2)),
        )
        self._raw: socket.socket | None = None

    @property
    def interface(self) -> str:
        """The node's end of the link."""
        return self.link.interface

    def send(self, *packets: bytes, ethertype: int | None = None) -> None:
        """Put layer-3 packets on the link as they are, whatever their source says."""
        if self._raw is None:
            self._raw = self.open_socket(socket.AF_PACKET, socket.SOCK_RAW)
            self._raw.bind(("eth0", 0))
        for packet in packets:
            self._raw.send(frame(self.link, bytes(packet), ethertype))

    def capture(self) -> Capture:
        """See what arrives from now on; a context manager."""
        tap = self.open_socket(socket.AF_PACKET, socket.SOCK_RAW)
        return Capture(tap, "eth0")

    def close_sockets(self) -> None:
        """Give up the sender's socket."""
        if self._raw is not None:
            self._raw.close()
            self._raw = None


class Lab(Closing):
    """The node and its hosts; a context manager, which leaves nothing behind.

    Attributes:
        topology: What was asked for, with every address assigned.
        node: The machine in the middle, where a firewall runs.
        hosts: By name.
        folder: For files of this lab, in the enclosure's tmpfs.
    """

    def __init__(self, plan: Topology) -> None:
        """Make namespaces and links, then start the hosts' processes.

        Raises:
            LabError: we are outside of an enclosure, or the kernel refuses a part.
        """
        if enclosure.mode() is None:
            raise LabError(
                "a lab lives in an enclosure: run `python -m lab.enclosure -- COMMAND...`"
            )
        self.topology = topology.assigned(plan)
        self.folder = enclosure.LAB_RUN / plan.name
        self.folder.mkdir()
        self.hosts: dict[str, Host] = {}
        self._machines: list[Machine] = []
        self._resolv_before = ""
        try:
            self.node = Machine("node", self.topology.node_addresses, self.folder)
            self._machines.append(self.node)
            for number, host in enumerate(self.topology.hosts, start=1):
                self._add(host, number)
            self._configure()
            self._publish_names()
            for made in self.hosts.values():
                for process in made.plan.processes:
                    made.start(process)
        except BaseException:
            self.close()
            raise

    def host(self, name: str) -> Host:
        """The host of this name; raises KeyError naming those that exist."""
        try:
            return self.hosts[name]
        except KeyError:
            known = ", ".join(self.hosts)
            raise KeyError(f"no host {name!r} in this lab (there are: {known})") from None

    def close(self) -> None:
        """End every process, then take away namespaces, names and files."""
        for machine in reversed(self._machines):
            machine.end_processes()
        for host in self.hosts.values():
            host.close_sockets()
        for machine in self._machines:
            machine.netns.close()
        self._machines.clear()
        self.hosts.clear()
        self._retract_names()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- making -------------------------------------------------------------------------------

    def _add(self, plan: HostPlan, number: int) -> None:
        taken = {host.interface for host in self.hosts.values()}
        interface = f"to-{plan.name}"[:_INTERFACE_NAME_LENGTH]
        if interface in taken:
            suffix = f"-{number}"
            interface = interface[: _INTERFACE_NAME_LENGTH - len(suffix)] + suffix
        host = Host(plan, number, interface, self.folder)
        self.hosts[plan.name] = host
        self._machines.append(host)

    def _configure(self) -> None:
        self.node.netns.set(
            ipv4__ip_forward="1",
            ipv4__conf__all__rp_filter="0",
            ipv4__conf__default__rp_filter="0",
            ipv4__conf__all__send_redirects="0",
            ipv4__conf__default__send_redirects="0",
            ipv4__icmp_ratelimit="0",
        )
        with_ipv6 = Path("/proc/sys/net/ipv6").exists()
        if with_ipv6:
            self.node.netns.set(ipv6__conf__all__forwarding="1", ipv6__icmp__ratelimit="0")
            for machine in self._machines:
                # No duplicate address detection: addresses are usable at once (RFC 4862 5.4).
                machine.netns.set(
                    ipv6__conf__default__accept_dad="0",
                    ipv6__conf__default__accept_ra="0",
                    ipv6__conf__default__router_solicitations="0",
                )
        self._batch("", [line for host in self.hosts.values() for line in _link_lines(host)])
        for host in self.hosts.values():
            self._batch(host.name, _host_lines(host))
        # A source address in a route must not be tentative, which even lo's are for a moment.
        lines = [
            f"address add {address} dev lo"
            + " nodad" * (topology.family(address) == socket.AF_INET6)
            for address in self.node.addresses
        ]
        for host in self.hosts.values():
            lines += _node_lines(host, self.node.addresses)
        self._batch("node", lines)
        for host in self.hosts.values():
            self._await_link(host)
            # The kernel shows the state before it lets packets out, both under the lock that this
            # takes as well.
            self._batch(host.name, [f"link set eth0 mtu {host.plan.mtu_bytes}"])

    def _await_link(self, host: Host) -> None:
        """Wait until the host's end can send: the kernel sees to that in its own time.

        Until then it drops what is sent without a word (dev_activate in net/sched/sch_generic.c).
        """
        deadline = time.monotonic() + _LINK_S
        while not host.netns.within(lambda: namespaces.is_running("eth0")):
            if time.monotonic() > deadline:
                raise LabError(f"the link of {host.name} is not running after {_LINK_S:g} s")
            time.sleep(_POLL_S)

    def _batch(self, namespace: str, lines: list[str]) -> None:
        """Have ip(8) perform `lines` in a namespace, in one process."""
        where = ["-netns", namespace] if namespace else []
        done = subprocess.run(
            ["ip", *where, "-batch", "-"],
            check=False,
            input="\n".join(lines) + "\n",
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise LabError(f"ip: in {namespace or 'the enclosure'}: {done.stderr.strip()}")

    # --- names --------------------------------------------------------------------------------

    def _publish_names(self) -> None:
        lines = [self._names_begin]
        seen: set[str] = set()
        for host in self.hosts.values():
            name, namespace = host.name, host.plan.namespace
            names = [
                name, f"{name}.{namespace}", f"{name}.{namespace}.svc",
                f"{name}.{namespace}.svc.cluster.local", *host.plan.names,
            ]  # fmt: skip
            fresh = [candidate for candidate in names if candidate not in seen]
            seen.update(fresh)
            lines += [f"{address} {' '.join(fresh)}" for address in host.addresses if fresh]
        lines.append(self._names_end)
        with enclosure.HOSTS.open("a", encoding="utf-8") as hosts:
            hosts.write("\n".join(lines) + "\n")
        if self.topology.resolver:
            self._resolv_before = enclosure.RESOLV.read_text(encoding="utf-8")
            enclosure.RESOLV.write_text(f"nameserver {self.topology.resolver}\n", encoding="utf-8")

    def _retract_names(self) -> None:
        kept, ours = [], False
        for line in enclosure.HOSTS.read_text(encoding="utf-8").splitlines():
            ours = ours or line == self._names_begin
            if not ours:
                kept.append(line)
            ours = ours and line != self._names_end
        # Written in place: /etc/hosts is this very file, bound there.
        enclosure.HOSTS.write_text("\n".join(kept) + "\n", encoding="utf-8")
        if self._resolv_before:
            enclosure.RESOLV.write_text(self._resolv_before, encoding="utf-8")

    @property
    def _names_begin(self) -> str:
        return f"# begin lab {self.topology.name}"

    @property
    def _names_end(self) -> str:
        return f"# end lab {self.topology.name}"


def _text_mac(mac: bytes) -> str:
    return mac.hex(":")


def _link_lines(host: Host) -> list[str]:
    mtu = host.plan.mtu_bytes
    node_end = f"name {host.interface} mtu {mtu} address {_text_mac(host.link.node_mac)} netns node"
    host_end = f"name eth0 mtu {mtu} address {_text_mac(host.link.host_mac)} netns {host.name}"
    return [f"link add {node_end} type veth peer {host_end}"]


def _host_lines(host: Host) -> list[str]:
    lines = ["link set eth0 up"]
    for address in host.addresses:
        if topology.family(address) == socket.AF_INET:
            lines.append(f"address add {address}/32 dev eth0")
        else:
            lines.append(f"address add {address}/128 dev eth0 nodad")
    families = {topology.family(address) for address in host.addresses}
    if socket.AF_INET in families:
        lines += [
            f"route add {GATEWAY4} dev eth0 scope link",
            f"route add default via {GATEWAY4} dev eth0",
        ]
    if socket.AF_INET6 in families:
        lines.append(f"route add default via {GATEWAY6} dev eth0")
    return lines


def _node_lines(host: Host, node_addresses: Sequence[str]) -> list[str]:
    lines = [f"link set {host.interface} up"]
    families = {topology.family(address) for address in host.addresses}
    if socket.AF_INET in families:
        lines.append(f"address add {GATEWAY4}/32 dev {host.interface} scope link")
    if socket.AF_INET6 in families:
        lines.append(f"address add {GATEWAY6}/64 dev {host.interface} nodad")
    for address in host.addresses:
        family = topology.family(address)
        bits = 32 if family == socket.AF_INET else 128
        own = [known for known in node_addresses if topology.family(known) == family]
        source = f" src {own[0]}" if own else ""
        lines.append(f"route add {address}/{bits} dev {host.interface}{source}")
    return lines
