"""Where packets are sent: a lab with a daemon in its node, made once for many cases.

A lab host has addresses, not names: whoever has an address in a case lives on the host that has it,
so cases that use the same addresses share hosts and daemon, and going from one case to the next is
a few calls of the API. Cases that cannot share (their node has an address that another case gives a
host, or there would be too many hosts) get a lab of their own (`groups`).
"""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from typing import Any

from conntrack.address import format_address, parse_address
from firewall.identities.labels import POD_NAMESPACE
from firewall.policy.objects import NamespaceObject
from lab import enclosure
from lab.closing import Closing
from lab.daemon import ApiRefused, Bartizan, missing_programs
from lab.laboratory import Host, Lab, LabError, Machine
from lab.topology import HostPlan, Topology
from policytest.case import NODE, Case, Endpoint, Source, Step
from policytest.flowstream import FlowStream
from policytest.keys import Keys
from policytest.servers import Servers
from policytest.world import World

MAX_HOSTS = 240
"""Hosts of one lab; it numbers them in one byte of their MAC addresses."""

ENFORCED_S = 30.0
"""How long the workers may take to follow a change on a busy machine."""

Query = dict[str, str | float]

_RING = 16_383
"""Flows that the daemon keeps for us: more than any batch makes."""


class FieldError(Exception):
    """Packets cannot be sent, or what came of them cannot be seen; the text says why."""


class RefusedError(Exception):
    """The daemon refuses what the readers of the test accept."""


def groups(cases: Iterable[Case]) -> list[list[Case]]:
    """Divide cases into those that can share a lab, in their order."""
    found: list[list[Case]] = []
    for case in cases:
        home = next((group for group in found if _fits(group, case)), None)
        if home is None:
            found.append([case])
        else:
            home.append(case)
    return found


def _fits(group: Sequence[Case], case: Case) -> bool:
    together = [*group, case]
    if len({one.node for one in together}) > 1:
        return False
    addresses = {address for one in together for shared in _sets(one) for address in shared}
    return len(addresses) <= MAX_HOSTS and addresses.isdisjoint(case.node)


def _sets(case: Case) -> list[tuple[bytes, ...]]:
    """Return the addresses of everybody in a case: endpoints, hosts, and bare addresses."""
    found = [endpoint.addresses for endpoint in case.endpoints]
    found += [host.addresses for host in case.hosts]
    found += [one.addresses for step in case.steps for one in step.add]
    owned = {address for addresses in found for address in addresses}.union(case.node)
    for step in case.steps:
        for title in {end for check in step.checks for end in (check.source, check.destination)}:
            try:
                address = parse_address(title)
            except ValueError:
                continue
            if address not in owned:
                owned.add(address)
                found.append((address,))
    return found


def _merged(sets: Iterable[tuple[bytes, ...]]) -> list[tuple[bytes, ...]]:
    """Join the sets that share an address; what is left is one host each."""
    home: dict[bytes, list[bytes]] = {}
    for addresses in sets:
        joined = list(dict.fromkeys([*addresses, *(a for x in addresses for a in home.get(x, ()))]))
        home |= dict.fromkeys(joined, joined)
    return list(dict.fromkeys(map(tuple, home.values())))


class Field(Closing):
    """The lab of some cases; a context manager. `begin` and `perform` take it through a case.

    Raises:
        FieldError: this machine cannot have it.
    """

    def __init__(self, cases: Sequence[Case]) -> None:
        if enclosure.mode() is None:
            raise FieldError("packets are sent inside an enclosure only (python -m lab.enclosure)")
        missing = missing_programs()
        if missing:
            raise FieldError(f"these programs are missing: {', '.join(missing)}")
        homes = _merged(one for case in cases for one in _sets(case))
        if len(homes) > MAX_HOSTS:
            raise FieldError(f"{len(homes)} hosts: a lab has at most {MAX_HOSTS}")
        plans = [
            HostPlan(name=f"h{number}", addresses=tuple(map(format_address, addresses)))
            for number, addresses in enumerate(homes, start=1)
        ]
        node = tuple(map(format_address, cases[0].node))
        try:
            self.lab = Lab(Topology(name="policytest", node_addresses=node, hosts=tuple(plans)))
        except (LabError, OSError, subprocess.SubprocessError) as error:
            raise FieldError(str(error)) from error
        self._hosts = {
            parse_address(address): host
            for host in self.lab.hosts.values()
            for address in host.addresses
        }
        self._names = _names(cases)
        self._node = set(cases[0].node)
        self._config: dict[str, Any] = {}
        self._daemon: Bartizan | None = None
        self._present: dict[str, dict[str, Any]] = {}
        self._namespaces: set[str] = set()
        self._raw: dict[int, socket.socket] = {}
        self.stream: FlowStream | None = None
        self.keys = Keys(self.lab.folder / "secrets")
        self.servers = Servers(self.keys.server_context)

    def close(self) -> None:
        """End the daemon and the lab."""
        self._end_stream()
        self.servers.close()
        for raw in self._raw.values():
            raw.close()
        self.lab.close()

    def _end_stream(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    # --- machines -----------------------------------------------------------------------------

    def machine(self, address: bytes) -> Machine:
        """Return who has an address."""
        return self.lab.node if address in self._node else self._hosts[address]

    def send(self, source: bytes, packet: bytes) -> None:
        """Put a layer-3 packet on the link of whoever has the address `source`."""
        if source not in self._node:
            self._hosts[source].send(packet)
            return
        # The node's own packets come from its stack, not from a link (raw(7): IPPROTO_RAW writes
        # no header of its own).
        family = socket.AF_INET if len(source) == 4 else socket.AF_INET6
        raw = self._raw.get(family)
        if raw is None:
            raw = self.lab.node.open_socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
            self._raw[family] = raw
        destination = packet[16:20] if len(source) == 4 else packet[24:40]
        raw.sendto(packet, (format_address(destination), 0))

    def host_at(self, address: bytes) -> Host | None:
        """Return the lab host that has an address, None for the node."""
        return self._hosts.get(address)

    @property
    def daemon(self) -> Bartizan:
        """The running daemon."""
        assert self._daemon is not None, "begin() starts it"
        return self._daemon

    # --- cases --------------------------------------------------------------------------------

    def begin(self, world: World) -> None:
        """Bring the daemon to the start of a case.

        Raises:
            FieldError: it does not start or does not follow. RefusedError: it refuses a policy.
        """
        self._namespaces = {
            resource.name
            for source in world.case.sources
            for resource in source.resources
            if isinstance(resource, NamespaceObject)
        }
        self.keys.provide(world.case)
        config = _config(world.case) | {"proxy": {"secrets_dir": str(self.keys.folder)}}
        if self._daemon is None or config != self._config:
            self._restart(config)
        else:
            self._call("DELETE", "/v1/policy", query={"all": "1", "wait": 0})
            self._call("DELETE", "/v1/fqdn/cache", query={"wait": 0})
        self._put_endpoints(world)
        self._put_sources(world.case.sources)
        self._put_namespaces(world)
        self._settle(world)

    def perform(self, world: World, step: Step) -> None:
        """Make the changes of a step, which `world` has made already; raises as `begin`."""
        for key in step.delete:
            names: Query = {"kind": key.kind, "name": key.name, "wait": 0}
            if key.namespace:
                names["namespace"] = key.namespace
            self._call("DELETE", "/v1/policy", query=names)
        self._put_endpoints(world)
        self._put_sources(step.apply)
        if step.namespaces:
            self._put_namespaces(world)
        self._settle(world)

    def _restart(self, config: dict[str, Any]) -> None:
        self._end_stream()
        if self._daemon is not None:
            self._daemon.stop()
            shutil.rmtree(self._daemon.state_dir, ignore_errors=True)
        self._present.clear()
        try:
            self._daemon = Bartizan(self.lab, config)
            self._daemon.start()
            self.stream = FlowStream(self._daemon.api_socket)
        except (LabError, OSError) as error:
            raise FieldError(f"the daemon does not start: {error}") from error
        self._config = config

    def _put_endpoints(self, world: World) -> None:
        wanted = {self.name_of(one): self._declared(one) for one in world.endpoints.values()}
        for name, present in list(self._present.items()):
            # An address may go from one endpoint to another: first everybody gives up theirs.
            if name not in wanted or wanted[name]["addresses"] != present["addresses"]:
                self._call("DELETE", f"/v1/endpoint/{name}", query={"wait": 0})
                del self._present[name]
        for name, declaration in wanted.items():
            if self._present.get(name) != declaration:
                self._call("PUT", f"/v1/endpoint/{name}", declaration, {"wait": 0})
                self._present[name] = declaration

    def name_of(self, endpoint: Endpoint) -> str:
        """Return what the daemon calls an endpoint: its name, or `name.namespace` to tell apart."""
        return self._names[endpoint.title]

    def _declared(self, endpoint: Endpoint) -> dict[str, Any]:
        numbers = {6: "tcp", 17: "udp", 132: "sctp"}
        host = self._hosts[endpoint.addresses[0]]
        return {
            "addresses": list(map(format_address, endpoint.addresses)),
            # Its namespace's label says that an endpoint without any is known to have none.
            "labels": endpoint.labels.strings() or [f"k8s:{POD_NAMESPACE}={endpoint.namespace}"],
            "namespace": endpoint.namespace,
            "interface": host.interface,
            "ports": [f"{row.name}:{row.port}/{numbers[row.protocol]}" for row in endpoint.ports],
            "audit": "on" if endpoint.audit else "off",
        }

    def _put_sources(self, sources: Iterable[Source]) -> None:
        for source in sources:
            if source.objects or source.resources:
                query: Query = {"file": source.file, "wait": 0}
                self._call("PUT", "/v1/policy", source.text, query)

    def _put_namespaces(self, world: World) -> None:
        documents: list[dict[str, Any]] = [
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": name, "labels": labels},
            }
            for name, labels in world.namespaces.items()
            if labels or name in self._namespaces
        ]
        self._namespaces.update(document["metadata"]["name"] for document in documents)
        if documents:
            text = json.dumps({"apiVersion": "v1", "kind": "List", "items": documents})
            self._call("PUT", "/v1/policy", text, {"file": world.case.file, "wait": 0})

    def _settle(self, world: World) -> None:
        """Wait until every worker enforces all that was asked for.

        The answer to any change comes when everything before it is enforced too; a change that
        changes nothing asks just that.
        """
        began = time.monotonic()
        if world.endpoints:
            name = next(iter(self._present))
            self._call("PUT", f"/v1/endpoint/{name}", self._present[name], {"wait": ENFORCED_S})
        else:
            text = json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}})
            self._call("PUT", "/v1/policy", text, {"wait": ENFORCED_S})
        if time.monotonic() - began >= ENFORCED_S:
            raise FieldError(f"the workers did not follow within {ENFORCED_S} s\n{self.log()}")

    def log(self) -> str:
        """Return the end of the daemon's log."""
        return "\n".join(self.daemon.log().splitlines()[-20:])

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | str | None = None,
        query: Query | None = None,
    ) -> None:
        text = json.dumps(body) if isinstance(body, dict) else body
        data = None if text is None else text.encode()
        try:
            status, answer = self.daemon.request(method, path, data, query, ENFORCED_S + 5)
        except OSError as error:
            raise FieldError(f"the daemon does not answer: {error}\n{self.log()}") from error
        if status >= 400:
            refusal = ApiRefused(status, json.loads(answer))
            raise RefusedError(f"{method} {path}: {refusal}")


def _config(case: Case) -> dict[str, Any]:
    """Return the daemon's configuration for a case."""
    settings = case.settings
    return {
        "workers": 1,
        "node_name": NODE,
        "node_labels": list(map("=".join, case.node_labels)),
        "cluster_name": settings.cluster_name,
        "host_firewall": settings.host_firewall,
        "nodes": [
            {
                "name": host.name,
                "addresses": list(map(format_address, host.addresses)),
                "labels": list(map("=".join, host.node_labels)),
            }
            for host in case.hosts
            if host.node_labels is not None
        ],
        "policy": {
            "enforcement": settings.enforcement,
            "allow_localhost": settings.allow_localhost,
            "audit": settings.audit,
        },
        "flows": {"ring": _RING},
        # The verdicts of a busy machine must not depend on how long an answer was held.
        "fqdn": {"proxy_response_max_delay_s": 10},
    }


def _names(cases: Iterable[Case]) -> dict[str, str]:
    """Return a name for every endpoint: its own where no other namespace has the same."""
    everybody = {
        endpoint.title: endpoint
        for case in cases
        for endpoint in (*case.endpoints, *(one for step in case.steps for one in step.add))
    }
    owners: dict[str, set[str]] = {}
    for endpoint in everybody.values():
        owners.setdefault(endpoint.name, set()).add(endpoint.namespace)
    return {
        title: one.name if len(owners[one.name]) == 1 else f"{one.name}.{one.namespace}"
        for title, one in everybody.items()
    }
