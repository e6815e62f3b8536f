"""The control plane: endpoints, identities and policies in, snapshots out.

Theory of operation. Everything here runs on one event loop. A change is made at once in the model
(roster, policy book, registry) and asks for a publication; one task publishes, so that any number
of changes which arrive together become one snapshot. An endpoint is `regenerating` from the moment
its snapshot is being published, and `ready` when every worker has acknowledged that revision.

Order of a publication, so that no packet meets a half-known world: numbers for the prefixes of
rules, identities into the resolver, the snapshot computed, the kernel's sets of managed addresses,
the file, the announcements, and, once the workers have followed, the generation of the flows that
the kernel carries past them (`bypass`). What fails is tried again with growing pauses; what was in
force stays in force, and `problems` says what is wrong.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from firewall.agent import statefile
from firewall.agent.addresses import AddressBook
from firewall.agent.bypass import Bypass
from firewall.agent.config import Config
from firewall.agent.declaration import Declaration
from firewall.agent.neighbours import Neighbours
from firewall.agent.nodes import host_labels
from firewall.agent.policies import BookChange, Key, PolicyBook, PolicyText
from firewall.agent.publisher import Publisher, enforced_by_all
from firewall.agent.roster import Member, Origin, Roster, RosterError
from firewall.agent.secrets import secret_problems
from firewall.agent.setting import value
from firewall.agent.worker import Worker
from firewall.control.journal import fields
from firewall.control.messages import Acknowledged, Hello
from firewall.datapath.kernel import KernelError
from firewall.datapath.sets import EndpointLink, RulesetError
from firewall.endpoints.endpoint import Endpoint, Step
from firewall.endpoints.lifecycle import EndpointState
from firewall.endpoints.sources import (
    Interface,
    SourceError,
    bridges,
    find_interface,
    interface_named,
)
from firewall.identities.labels import LabelFilter, LabelSet
from firewall.identities.registry import IdentityError, IdentityRegistry, KvStoreError
from firewall.policy.readers import ENFORCED, SWITCHED, ReaderSettings
from firewall.policy.repository import Repository
from firewall.policy.resolve import Resolver
from firewall.policy.snapshot import Settings, Snapshot

COALESCE_S = 0.005
"""Changes within this time share a snapshot; short beside the 20 ms that publishing takes."""

RETRY_FIRST_S = 0.2
"""Pause after a publication that failed; doubled for every further one."""

RETRY_MAX_S = 10.0
"""Longest pause: what was mended is noticed within it."""

log = logging.getLogger(__name__)


class LinkError(Exception):
    """The interface of an endpoint cannot be found; the text says what was looked for."""


class Engine:
    """State of the node and the task that publishes it.

    Args:
        config: the configuration in force.
        registry: gives label sets their numbers.
        publisher: restored, so that revisions go on.
        workers: those that must acknowledge.
        manage: makes the kernel queue the packets of these endpoints (blocking; runs in a thread).
        bypass: which flows the kernel carries past the workers.
        neighbours: the other agents that share the registry's store.

    Attributes:
        problems: what is wrong now, by topic; shown in the status until it is mended.
    """

    def __init__(
        self,
        config: Config,
        registry: IdentityRegistry,
        publisher: Publisher,
        workers: list[Worker],
        manage: Callable[[Iterable[EndpointLink]], None],
        *,
        bypass: Bypass,
        neighbours: Neighbours,
    ) -> None:
        self.config = config
        self.registry = registry
        self.publisher = publisher
        self.workers = workers
        self.bypass = bypass
        self.problems: dict[str, str] = {}
        self.book = PolicyBook(
            config.state_dir,
            Repository(revision=max(1, publisher.snapshot.policy_revision)),
            reader_settings(config),
        )
        registry.describe_host(host_labels(config.node, config.node_labels))
        self.roster = Roster(
            config.state_dir, config.cluster_name, LabelFilter(config.labels.filter)
        )
        self._names_by_identity = config.fqdn.visibility == "node"
        self.resolver = Resolver(
            cluster=config.cluster_name,
            names_by_identity=self._names_by_identity,
            last=publisher.last,
        )
        self.addresses = AddressBook(config, registry, self.roster, neighbours)
        self.names = self.addresses.names
        self._manage = manage
        self._managed: list[EndpointLink] | None = None
        self._bridges: dict[str, str] | None = None
        self._told: dict[int, LabelSet] = {}
        self._offset = 0
        self._wanted = asyncio.Event()
        self._asked = 0
        self._done = 0
        self._done_revision = 0
        self._moved = asyncio.Condition()
        self._regenerating: dict[Endpoint, int] = {}
        self._leaving: list[tuple[Endpoint, int | None]] = []
        self._changing = asyncio.Lock()

    # --- start --------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Bring back what was in force before the restart.

        Raises:
            StateError: a state file cannot be used.
            InvalidPolicyError: a stored policy is refused by this version.
        """
        self._follow(self.book.restore())
        self.roster.restore(time.time_ns())
        self.addresses.restore()
        for member in self.roster:
            await self._relabel(member)

    def surpass(self, hello: Hello) -> None:
        """Number snapshots above what a worker of an earlier life enforces already."""
        if hello.revision > self.publisher.revision:
            self._offset += hello.revision + 1 - self.publisher.revision
            self.publish()

    # --- endpoints ----------------------------------------------------------------------------

    async def put_endpoint(
        self, declaration: Declaration, origin: Origin, *, new: bool = False
    ) -> Member:
        """Add or change an endpoint; `new`: add, and change none.

        An endpoint from a file is enforced by its address until its interface comes.

        Raises:
            RosterError: it contradicts another one. OSError: it could not be persisted.
            LinkError: its interface is not there (from the API only).
        """
        async with self._changing:
            self.roster.check(declaration, origin, new=new)
            return await self._put(declaration, origin)

    async def _put(self, declaration: Declaration, origin: Origin) -> Member:
        self.roster.check(declaration, origin)
        trouble = ""
        try:
            interface = await self._interface(declaration)
        except LinkError as error:
            if origin == "api":
                raise
            interface, trouble = Interface("", 0), str(error)
        self._note(f"endpoint {declaration.name}", trouble)
        member = self.roster.put(declaration, origin, interface, time.time_ns())
        await self._relabel(member)
        return member

    async def delete_endpoint(self, name: str, origin: Origin) -> None:
        """Stop managing an endpoint.

        Raises:
            UnknownEndpointError: there is none. RosterError: another origin declared it.
            OSError: it could not be persisted.
        """
        async with self._changing:
            self._delete(name, origin)

    def _delete(self, name: str, origin: Origin) -> None:
        endpoint = self.roster.remove(name, origin).endpoint
        number = endpoint.disconnect(time.time_ns())
        self.names.forget_endpoint(endpoint.id)
        self._leaving.append((endpoint, number))
        self._regenerating.pop(endpoint, None)
        self._note(f"endpoint {name}", "")
        self.publish()

    async def sync_endpoints(
        self, declarations: Iterable[Declaration], origin: Origin, file: str | None = None
    ) -> None:
        """Make the endpoints of an origin (of it, a file) exactly these.

        What contradicts another endpoint is left out and named in `problems`.

        Raises:
            OSError: it could not be persisted.
        """
        wanted = {declaration.name: declaration for declaration in declarations}
        gone = [name for name in self.roster.of_origin(origin, file) if name not in wanted]
        changed = [one for one in wanted.values() if not self._is_as_declared(one, origin)]
        if not gone and not changed and self.roster.saved:
            return
        async with self._changing:
            with self.roster.together():
                for name in gone:
                    self._delete(name, origin)
                clashes = [await self._clash_of(one, origin) for one in changed]
        topic = f"endpoints in {file or 'the configuration'}"
        said = "; ".join(filter(None, clashes))
        if said and said != self.problems.get(topic):
            log.warning("endpoint left out", extra=fields(error=said, file=file))
        self._note(topic, said)

    async def _clash_of(self, declaration: Declaration, origin: Origin) -> str:
        """Put an endpoint of a file; return what it contradicts, "" = nothing."""
        try:
            await self._put(declaration, origin)
        except RosterError as error:
            return f"line {declaration.place.line}: {error}"
        return ""

    def _is_as_declared(self, declaration: Declaration, origin: Origin) -> bool:
        known = self.roster.find(declaration.name)
        return known is not None and (known.declaration, known.origin) == (declaration, origin)

    def _note(self, topic: str, trouble: str) -> None:
        """Show a trouble, or ("") that it is over."""
        if trouble:
            self.problems[topic] = trouble
        else:
            self.problems.pop(topic, None)

    async def find_links(self) -> None:
        """Look every endpoint's interface up again: links have come, gone or changed."""
        async with self._changing:
            for member in self.roster:
                endpoint, topic = member.endpoint, f"endpoint {member.endpoint.name}"
                try:
                    interface = await self._interface(member.declaration)
                except LinkError as error:
                    # The old interface stays: a packet with this source from elsewhere is spoofed.
                    self.problems[topic] = str(error)
                    continue
                self.problems.pop(topic, None)
                if endpoint.configure(time.time_ns(), interface=interface) is not Step.NOTHING:
                    self.publish()
            found = await asyncio.to_thread(bridges)
            if found != self._bridges:
                self._bridges = found
                self.publish()

    async def _interface(self, declaration: Declaration) -> Interface:
        """Return the node's side of an endpoint's link; ("", 0) if the declaration names none."""
        self._bridges = None  # it may be a port of one that is not known yet
        try:
            if declaration.netns:
                return await asyncio.to_thread(find_interface, declaration.netns)
            if declaration.interface:
                return await asyncio.to_thread(interface_named, declaration.interface)
        except SourceError as error:
            raise LinkError(f"endpoint {declaration.name}: {error}") from error
        return Interface("", 0)

    async def _relabel(self, member: Member) -> None:
        """Bring labels and identity in line with declaration and namespace."""
        namespace = self.book.namespaces().get(member.declaration.namespace)
        labels = self.roster.labels_of(
            member.declaration, namespace.labels if namespace is not None else None
        )
        step = member.endpoint.set_labels(labels, time.time_ns())
        if step is Step.ALLOCATE:
            await self._identify(member.endpoint)
        self.publish()

    async def _identify(self, endpoint: Endpoint) -> None:
        """Get an endpoint the number of its labels; without a store it waits and stays `init`."""
        topic = f"identity of {endpoint.name}"
        while True:
            asked = endpoint.relevant
            try:
                number = await self.registry.allocate(asked)
            except (KvStoreError, IdentityError) as error:
                self.problems[topic] = str(error)
                log.warning(
                    "no identity", extra=fields(endpoint=endpoint.title, error=error, labels=asked)
                )
                return
            self.problems.pop(topic, None)
            answer = endpoint.identity_allocated(number, asked, time.time_ns())
            if answer.release is not None:
                await self._release(answer.release)
            if answer.step is not Step.ALLOCATE:
                return

    async def _release(self, number: int) -> None:
        """Give a reference back; if the store does not answer, the registry does it later."""
        with contextlib.suppress(KvStoreError):
            await self.registry.release(number)

    async def keep_identities(self) -> None:
        """Tell the store that this node lives; where a number was lost, get another one.

        Raises:
            KvStoreError: the store does not answer. IdentityError: a label set stays locked.
        """
        lost = frozenset(await self.registry.keep_alive())
        if not lost:
            return
        log.error(
            "identities lost: this node was away for longer than its lease",
            extra=fields(identities=",".join(map(str, sorted(lost)))),
        )
        self._leaving = [(one, None if held in lost else held) for one, held in self._leaving]
        for member in self.roster:
            endpoint = member.endpoint
            if (
                endpoint.identity in lost
                and endpoint.lose_identity(time.time_ns()) is Step.ALLOCATE
            ):
                await self._identify(endpoint)
        self.publish()

    async def retry_identities(self) -> None:
        """Ask again for the endpoints that still have no number."""
        for member in self.roster:
            if member.endpoint.identity is None:
                await self._identify(member.endpoint)
                self.publish()

    # --- policies -----------------------------------------------------------------------------

    async def apply_policy(self, texts: Iterable[PolicyText]) -> BookChange:
        """Apply texts, all or none.

        Raises:
            InvalidPolicyError: they are refused. OSError: they could not be persisted.
        """
        change = self.book.apply(texts)
        await self._adopt(change)
        missing = secret_problems(change.applied, self.config.proxy.secrets_dir)
        return change._replace(warnings=(*change.warnings, *missing))

    async def follow_file(self, path: Path, text: str | None) -> BookChange | None:
        """Follow a file of the policy directory; `text` None = it is gone.

        Returns:
            None if the file is invalid: `book.problems` says why, and nothing changed.

        Raises:
            OSError: it could not be persisted.
        """
        change = self.book.unfollow(path) if text is None else self.book.follow(path, text)
        if change is not None:
            await self._adopt(change)
        return change

    async def delete_policy(self, keys: Iterable[Key]) -> BookChange:
        """Delete objects; raises OSError if that could not be persisted."""
        change = self.book.delete(keys)
        await self._adopt(change)
        return change

    async def _adopt(self, change: BookChange) -> None:
        """Let the rest of the node follow a change of the book."""
        if not change.changed:
            return
        namespaces = self._follow(change)
        now_ns = time.time_ns()
        for member in self.roster:
            if member.declaration.namespace in namespaces:
                await self._relabel(member)
            reason = f"policy revision {change.policies.revision}"
            member.endpoint.need_regeneration(reason, now_ns)
        self.publish()

    def _follow(self, change: BookChange) -> set[str]:
        """Tell the resolver; return the namespaces whose labels may have changed."""
        self.resolver.apply(change.policies)
        self._note("host_firewall", self._without_host_firewall())
        if change.resources:
            self.resolver.set_resources(self.book.resources.values())
        return {name for kind, _, name in change.resources if kind == "Namespace"}

    def _without_host_firewall(self) -> str:
        """Name the policies that an earlier life took and that select this node in vain."""
        if self.config.host_firewall:
            return ""
        names = [
            str(one.key)
            for one in self.book.repository.objects
            if any(entry.subject_is_node for entry in one.entries)
        ]
        return f"is off, so these are not enforced: {', '.join(names)}" if names else ""

    def reconfigure(self, config: Config) -> None:
        """Let settings take effect that workers must know."""
        self.config = self.addresses.config = config
        for member in self.roster:
            member.endpoint.need_regeneration("configuration reloaded", time.time_ns())
        self.publish()

    # --- publication --------------------------------------------------------------------------

    def publish(self) -> None:
        """Ask for a publication; what is changed until it happens is part of it."""
        self._asked += 1
        self._wanted.set()

    async def enforced(self, timeout_s: float) -> bool:
        """Wait until every worker enforces everything asked for so far; say whether it does."""
        asked = self._asked
        if timeout_s <= 0:
            return False
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s), self._moved:
                await self._moved.wait_for(lambda: self._done >= asked)
        except TimeoutError:
            return False
        left_s = timeout_s - (time.monotonic() - began)
        if not await self.publisher.enforced(self._done_revision, self.workers, left_s):
            return False
        return await self.bypass.settled(timeout_s - (time.monotonic() - began))

    async def run(self) -> None:
        """Publish whenever it is asked for, until cancelled."""
        pause_s = 0.0
        while True:
            await self._wanted.wait()
            await asyncio.sleep(max(COALESCE_S, pause_s))
            self._wanted.clear()
            asked = self._asked
            try:
                await self._publish()
            except Exception as error:  # noqa: BLE001  the operator must be able to undo the cause
                pause_s = min(max(2 * pause_s, RETRY_FIRST_S), RETRY_MAX_S)
                self._failed(error)
                continue
            pause_s = 0.0
            self.problems.pop("snapshot", None)
            async with self._moved:
                self._done, self._done_revision = asked, self.publisher.revision
                self._moved.notify_all()
            self.settle()

    def _failed(self, cause: Exception) -> None:
        """Note that a publication failed, and ask for another one."""
        expected = isinstance(cause, (OSError, KernelError, RulesetError, IdentityError))
        error = self.problems["snapshot"] = str(cause) if expected else repr(cause)
        log.error(
            "snapshot not published",
            extra=fields(error=error),
            exc_info=None if expected else cause,
        )
        for endpoint in tuple(self._regenerating):
            endpoint.fail_regeneration(error, time.time_ns())
        self._regenerating.clear()
        self._wanted.set()

    async def _publish(self) -> None:
        """Compute and publish one snapshot."""
        self.addresses.follow(self.resolver.prefixes(), self.resolver.fqdns())
        self._tell_identities()
        members = list(self.roster)
        leaving_count = len(self._leaving)
        begun = [member.endpoint for member in members if _begin(member.endpoint)]
        rows = [member.endpoint.row() for member in members if member.endpoint.addresses]
        neighbours = self.addresses.neighbours
        neighbours.announce(rows)
        self.resolver.set_endpoints([*rows, *self.addresses.host_rows()], neighbours.ports())
        snapshot = self.resolver.snapshot(
            settings=self._settings(),
            ipcache=self.addresses.ipcache().items(),
            sights=() if self._names_by_identity else self.names.sights(),
        )
        revision = snapshot.revision + self._offset
        self._regenerating.update(dict.fromkeys(begun, revision))
        await self._manage_links(members)
        if revision != self.publisher.revision or not self.publisher.published:
            await self._write(snapshot, revision)
        # Not before: a publication that failed has not taken them out of any worker's snapshot.
        leaving, self._leaving = self._leaving[:leaving_count], self._leaving[leaving_count:]
        for endpoint, number in leaving:
            endpoint.disconnected(time.time_ns())
            if number is not None:
                await self._release(number)

    async def _write(self, snapshot: Snapshot, revision: int) -> None:
        """Publish a snapshot under its final revision."""
        began = time.monotonic()
        snapshot = msgspec.structs.replace(snapshot, revision=revision)
        await self.publisher.publish(snapshot, self.workers)
        self.bypass.follow(snapshot.generation, revision)
        log.info(
            "snapshot published",
            extra=fields(
                revision=revision,
                policy_revision=snapshot.policy_revision,
                generation=snapshot.generation,
                reason=self.resolver.reason or "no permission was taken away",
                endpoints=len(snapshot.endpoints),
                identities=len(snapshot.identities),
                ms=round(1000 * (time.monotonic() - began), 1),
            ),
        )

    async def _manage_links(self, members: list[Member]) -> None:
        """Have the kernel queue what concerns these endpoints, if that is not so already."""
        if self._bridges is None:
            self._bridges = await asyncio.to_thread(bridges)
        links = [
            EndpointLink(
                member.endpoint.addresses,
                member.endpoint.interface,
                self._bridges.get(member.endpoint.interface, ""),
            )
            for member in members
        ]
        links += [EndpointLink(row.addresses, row.interface) for row in self.addresses.host_rows()]
        if links != self._managed:
            await asyncio.to_thread(self._manage, links)
            self._managed = links

    def _tell_identities(self) -> None:
        """Bring the resolver's identities in line with the registry's."""
        known = self.registry.known()
        for number in self._told.keys() - known.keys():
            self.resolver.remove_identity(number)
            del self._told[number]
        for number, labels in known.items():
            told = self._told.get(number)
            if told is not labels and told != labels:
                self.resolver.upsert_identity(number, labels)
                self._told[number] = labels

    def _settings(self) -> Settings:
        config = self.config
        return Settings(
            enforcement=config.policy.enforcement,
            allow_localhost=config.policy.allow_localhost,
            policy_audit_mode=config.policy.audit,
            http_proxy_port=config.proxy.port if config.proxy.workers else 0,
            node_name=config.node,
            local_addresses=self.addresses.local,
        )

    # --- what workers say ---------------------------------------------------------------------

    async def greeted(self, worker: Worker, hello: Hello) -> None:
        """Bring a worker up to date that has just connected."""
        self.surpass(hello)
        await self.publisher.greet(worker, hello)
        self.settle()

    async def acknowledged(self, worker: Worker, message: Acknowledged) -> None:
        """Note what a worker enforces."""
        await self.publisher.acknowledge(worker, message)
        self.settle()

    def settle(self) -> None:
        """Make endpoints ready whose revision every worker enforces."""
        policy_revision = self.publisher.snapshot.policy_revision
        for endpoint, revision in tuple(self._regenerating.items()):
            if revision <= self.publisher.revision and enforced_by_all(revision, self.workers):
                del self._regenerating[endpoint]
                endpoint.finish_regeneration(policy_revision, time.time_ns())


def reader_settings(config: Config) -> ReaderSettings:
    """Return what reading policies depends on in this configuration."""
    switched = {name for name, setting in SWITCHED.items() if value(config, setting)}
    return ReaderSettings(cluster_name=config.cluster_name, enforceable=ENFORCED | switched)


def _begin(endpoint: Endpoint) -> bool:
    """Let an endpoint begin its regeneration if it waits for it."""
    waits = (EndpointState.RESTORING, EndpointState.WAITING_TO_REGENERATE)
    if endpoint.state not in waits or endpoint.identity is None:
        return False
    endpoint.begin_regeneration(time.time_ns())
    return True


def make_directories(config: Config) -> None:
    """Make run and state directory: 0755 (the API socket decides who may ask) and 0700.

    Raises:
        StateError: they cannot be made.
    """
    for path, mode in ((config.run_dir, 0o755), (config.state_dir, 0o700)):
        try:
            path.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as error:
            raise statefile.StateError(f"{path}: {error.strerror}; run as root") from error
