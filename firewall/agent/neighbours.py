"""The other agents on this one's store: where their endpoints are, and who those are.

Each agent writes a key for every address of its endpoints and follows everybody's, and everybody's
identities, so that a rule can name an endpoint that another node has. The keys are Cilium's
(pkg/ipcache/kvstore.go, pkg/identity.IPIdentityPair), but for the first, whose value is ours:

    cilium/state/nodes/v1/<cluster>/<node>     JSON   this name is taken, and by which agent
    cilium/state/ip/v1/<cluster>/<address>     JSON   identity, name and ports behind an address

All are bound to one lease: what a dead agent has said counts until that ends, as what its workers
enforce does. An address whose identity is not known yet is left to what else is known about it.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from typing import NamedTuple, NoReturn

import msgspec

from conntrack.address import Prefix, format_address, parse_address
from firewall.agent.config import Config
from firewall.control.journal import fields
from firewall.flows.record import EndpointName
from firewall.identities.registry import NODE_LEASE_S, IdentityRegistry
from firewall.identities.reserved import CLUSTER_MAX, FIXED_MIN, Reserved
from firewall.identities.store import KvStore, KvStoreError
from firewall.policy.conditions import PROTOCOL_WORDS
from firewall.policy.snapshot import EndpointRow, NamedPortRow

NODES = "cilium/state/nodes/v1"
ADDRESSES = "cilium/state/ip/v1"

KEEP_ALIVE_S = NODE_LEASE_S / 15
"""How often the lease is begun anew: a minute, so that a busy store costs nobody their keys."""

RETRY_S = 1.0
"""Pause after the store did not answer."""

_GLOBAL_ID = "cilium-global"
_PROTOCOLS = {word: number for number, word in PROTOCOL_WORDS.items()}

log = logging.getLogger(__name__)


class _NodeValue(msgspec.Struct, frozen=True):
    """Who has a node name: the agent with this state directory, which no two agents share."""

    name: str = msgspec.field(name="Name")
    cluster: str = msgspec.field(name="Cluster")
    state_dir: str = msgspec.field(name="StateDir")


class _PortValue(msgspec.Struct, frozen=True):
    name: str = msgspec.field(name="Name")
    port: int = msgspec.field(name="Port")
    protocol: str = msgspec.field(name="Protocol")


class _AddressValue(msgspec.Struct, frozen=True, omit_defaults=True):
    """An IPIdentityPair; `metadata` is cilium-global:<cluster>:<node>:<endpoint id>."""

    address: str = msgspec.field(name="IP")
    number: int = msgspec.field(name="ID")
    metadata: str = msgspec.field(name="Metadata", default="")
    namespace: str = msgspec.field(name="K8sNamespace", default="")
    name: str = msgspec.field(name="K8sPodName", default="")
    ports: tuple[_PortValue, ...] = msgspec.field(name="NamedPorts", default=())


class Neighbour(NamedTuple):
    """What another agent says of one address."""

    node: str
    identity: int
    name: EndpointName
    ports: tuple[NamedPortRow, ...]


class Neighbours:
    """Tells the other agents about our endpoints, and knows theirs.

    Args:
        store: the one that all of them have.
        registry: knows the identities.
        config: `kvstore.path` says whether there can be others at all.

    Attributes:
        shared: whether others may use the store; if not, nothing is told and nobody known.
        problem: what is wrong with the store or with what the others say, "" = nothing.
    """

    def __init__(self, store: KvStore, registry: IdentityRegistry, config: Config) -> None:
        self.shared = config.kvstore.path is not None
        self.problem = ""
        self._store = store
        self._registry = registry
        self._node = config.node
        self._cluster = config.cluster_name
        self._state_dir = str(config.state_dir.absolute())
        self._prefix = f"{ADDRESSES}/{config.cluster_name}/"
        self._lease: int | None = None
        self._wanted: dict[str, bytes] = {}
        self._written: dict[str, bytes] = {}
        self._bound: set[str] = set()
        self._moved = asyncio.Event()
        self._entries: Mapping[str, bytes] = {}
        self._known: dict[bytes, Neighbour] = {}

    async def join(self) -> None:
        """Take this node's name, and learn who is there; nothing happens on a store of our own.

        Raises:
            KvStoreError: another agent has the name, or the store does not answer.
        """
        if not self.shared:
            return
        await self._keep_lease()
        for following in (self._numbers(), self._places()):
            async with aclosing(following):
                await anext(following)

    async def run(self, publish: Callable[[], None]) -> None:
        """Follow the others and tell them, until cancelled.

        Args:
            publish: called when an address or an identity of theirs has changed.
        """
        if not self.shared:
            await asyncio.Event().wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(self._numbers, publish))
            group.create_task(self._follow(self._places, publish))
            group.create_task(self._tell())

    # --- ours ---------------------------------------------------------------------------------

    def announce(self, rows: Iterable[EndpointRow]) -> None:
        """Have the others know exactly these endpoints as ours."""
        if not self.shared:
            return
        wanted = {
            self._prefix + format_address(address): self._value(row, address)
            for row in rows
            for address in row.addresses
        }
        if wanted != self._wanted:
            self._wanted = wanted
            self._moved.set()

    def _value(self, row: EndpointRow, address: bytes) -> bytes:
        return msgspec.json.encode(
            _AddressValue(
                address=format_address(address),
                number=row.identity,
                metadata=f"{_GLOBAL_ID}:{self._cluster}:{self._node}:{row.id}",
                namespace=row.namespace,
                name=row.name,
                ports=tuple(
                    _PortValue(port.name, port.port, PROTOCOL_WORDS[port.protocol])
                    for port in row.named_ports
                    if port.protocol in PROTOCOL_WORDS
                ),
            )
        )

    async def _tell(self) -> NoReturn:
        while True:
            try:
                lease = await self._keep_lease()
                await self._write(lease)
                self._note("")
                pause_s = KEEP_ALIVE_S
            except KvStoreError as error:
                self._note(str(error))
                pause_s = RETRY_S
            try:
                await asyncio.wait_for(self._moved.wait(), pause_s)
            except TimeoutError:
                continue
            self._moved.clear()

    async def _write(self, lease: int) -> None:
        """Bring our keys in the store in line with what is wanted."""
        wanted = self._wanted
        for key in self._written.keys() - wanted.keys():
            await self._store.compare_and_delete(key, self._written[key])
            del self._written[key]
            self._bound.discard(key)
        for key, value in wanted.items():
            if self._written.get(key) != value or key not in self._bound:
                await self._store.put(key, value, lease=lease)
                self._written[key] = value
                self._bound.add(key)

    async def _keep_lease(self) -> int:
        """Return a lease that has just begun anew.

        Raises:
            KvStoreError: another agent has this node's name, or the store does not answer.
        """
        if self._lease is None or not await self._store.keep_alive(self._lease):
            lease = await self._store.grant_lease(NODE_LEASE_S)
            await self._take_name(lease)
            self._lease = lease
            self._bound.clear()
        return self._lease

    async def _take_name(self, lease: int) -> None:
        key = f"{NODES}/{self._cluster}/{self._node}"
        ours = msgspec.json.encode(_NodeValue(self._node, self._cluster, self._state_dir))
        if await self._store.create(key, ours, lease=lease):
            return
        found = await self._store.get(key)
        if found is not None and found != ours:
            raise KvStoreError(
                f"node_name {self._node} is taken: the agent with state_dir {_owner(found)} has it "
                "in this kvstore; give this one another node_name"
            )
        await self._store.put(key, ours, lease=lease)

    # --- theirs -------------------------------------------------------------------------------

    def addresses(self) -> Iterator[tuple[Prefix, int]]:
        """Yield every address of another node's endpoint with its identity, if that is known."""
        for address, one in self._known.items():
            if self._registry.lookup(one.identity) is not None:
                yield Prefix(address, 8 * len(address)), one.identity

    def ports(self) -> Iterator[tuple[int, tuple[NamedPortRow, ...]]]:
        """Yield identities of other nodes' endpoints with the named ports of those."""
        for one in self._known.values():
            if one.ports and self._registry.lookup(one.identity) is not None:
                yield one.identity, one.ports

    def name(self, address: bytes) -> EndpointName | None:
        """Return what another node's endpoint is called; the same object until that changes."""
        known = self._known.get(address)
        return None if known is None else known.name

    def counts(self) -> tuple[int, int]:
        """Return how many other nodes have endpoints, and how many addresses those have."""
        return len({one.node for one in self._known.values()}), len(self._known)

    async def _numbers(self) -> AsyncGenerator[bool, None]:
        async for changed in self._registry.follow():
            yield bool(changed)

    async def _places(self) -> AsyncGenerator[bool, None]:
        async for entries in self._store.watch(self._prefix):
            yield self._learn(entries)

    async def _follow(
        self, what: Callable[[], AsyncIterator[bool]], publish: Callable[[], None]
    ) -> NoReturn:
        while True:
            try:
                async for changed in what():
                    if changed:
                        publish()
            except KvStoreError as error:
                self._note(str(error))
            await asyncio.sleep(RETRY_S)

    def _learn(self, entries: Mapping[str, bytes]) -> bool:
        """Take what the store says of addresses; say whether that is news."""
        before = dict(self._known)
        clashes = []
        for key in self._entries.keys() - entries.keys():
            self._known.pop(self._address(key), None)
            if key in self._wanted:  # another agent claimed the address, and has given it up
                self._bound.discard(key)
                self._moved.set()
        for key, value in entries.items():
            if self._entries.get(key) == value:
                continue
            address, one = self._address(key), _read(value)
            if one is not None and one.node == self._node:
                # Of an earlier life, perhaps: what is not wanted any more is deleted.
                self._written.setdefault(key, value)
                one = None
            if one is None:
                self._known.pop(address, None)
            elif address:
                self._known[address] = one
                if key in self._wanted:
                    clashes.append(f"{format_address(address)} ({one.node})")
        self._entries = entries
        if clashes:
            log.warning(
                "other nodes have endpoints with addresses of ours",
                extra=fields(addresses=",".join(clashes)),
            )
        return self._known != before

    def _address(self, key: str) -> bytes:
        """Return the address that a key is about, b"" if it is about none."""
        try:
            return parse_address(key.removeprefix(self._prefix))
        except ValueError:
            return b""

    def _note(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.warning("the other agents are not heard", extra=fields(error=problem))
        self.problem = problem


def _read(value: bytes) -> Neighbour | None:
    """Read what another agent wrote of an address; None if it makes no sense to us."""
    try:
        found = msgspec.json.decode(value, type=_AddressValue)
    except msgspec.DecodeError:
        return None
    # Smaller ones are no endpoint's, greater ones mean something on the other node only.
    if found.number != Reserved.INIT and not FIXED_MIN <= found.number <= CLUSTER_MAX:
        return None
    *_, node, _ = ("", "", *found.metadata.split(":"))
    return Neighbour(
        node=node,
        identity=found.number,
        name=EndpointName(found.name, found.namespace),
        ports=tuple(
            NamedPortRow(port.name, _PROTOCOLS[port.protocol], port.port)
            for port in found.ports
            if port.protocol in _PROTOCOLS
        ),
    )


def _owner(value: bytes) -> str:
    """Return the state directory of who has a node name."""
    try:
        return msgspec.json.decode(value, type=_NodeValue).state_dir
    except msgspec.DecodeError:
        return "(unknown)"
