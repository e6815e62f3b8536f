"""Who is under policy: the endpoints of this node, as declared, over restarts.

A declaration comes from one of three origins and only that origin may change or withdraw it: the
API, the configuration file, or a file of the endpoint directory. All are persisted, so that after a
restart, before any file has been read, exactly the endpoints of before are enforced again.

The roster decides and persists; it allocates no identities and publishes nothing (`engine` does).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from conntrack.address import format_address, parse_address
from firewall.agent import statefile
from firewall.agent.declaration import Declaration
from firewall.agent.document import NOWHERE, Place
from firewall.agent.statefile import StateError
from firewall.endpoints.endpoint import Endpoint
from firewall.identities.labels import LabelError, LabelFilter, LabelSet
from firewall.identities.workload import workload_labels
from firewall.policy.snapshot import NamedPortRow

Origin = Literal["api", "config", "directory"]

MAX_ENDPOINTS = 65_535
"""Ids are 16 bits, as Cilium's endpoint ids are."""

_FILE = "endpoints"
_MEND = "start without endpoints (what they may do is then not restricted until they are declared)"


class RosterError(Exception):
    """A declaration contradicts another one; nothing was changed."""


class UnknownEndpointError(LookupError):
    """There is no endpoint of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no endpoint {name!r}")


class Member(NamedTuple):
    """An endpoint and what it was made of."""

    endpoint: Endpoint
    declaration: Declaration
    origin: Origin


class StoredMember(msgspec.Struct, frozen=True, kw_only=True):
    """A member as it is persisted; addresses as text, labels as declared."""

    id: int
    name: str
    namespace: str
    addresses: tuple[str, ...]
    labels: tuple[str, ...]
    netns: str
    interface: str
    interface_index: int
    ports: tuple[NamedPortRow, ...]
    audit: bool
    origin: Origin
    file: str
    link: str = ""


class _Kept(NamedTuple):
    """What was persisted of a member, and from what it was made."""

    member: Member
    link: tuple[str, int]
    row: StoredMember


class Roster:
    """The members by name.

    Args:
        state_dir: where they are persisted.
        cluster: value of the cluster label that every endpoint gets.
        label_filter: which labels count for the identity.

    Attributes:
        saved: False = the last write failed, and what is in force is not on the disk.
    """

    def __init__(self, state_dir: Path, cluster: str, label_filter: LabelFilter) -> None:
        self._path = state_dir / _FILE
        self._cluster = cluster
        self._filter = label_filter
        self._members: dict[str, Member] = {}
        self._owners: dict[bytes, str] = {}
        self._by_id: dict[int, Member] = {}
        self._rows: dict[str, _Kept] = {}
        self._last_id = 0
        self._held = False
        self.saved = True

    def __iter__(self) -> Iterator[Member]:
        """Yield the members by name."""
        return iter([self._members[name] for name in sorted(self._members)])

    def __len__(self) -> int:
        return len(self._members)

    def get(self, name: str) -> Member:
        """Return a member.

        Raises:
            UnknownEndpointError: there is none of this name.
        """
        member = self._members.get(name)
        if member is None:
            raise UnknownEndpointError(name)
        return member

    def meant(self, text: str) -> Member:
        """Return the member that somebody names as it is listed: NAME, NAMESPACE/NAME, or its id.

        Raises:
            UnknownEndpointError: none is meant.
        """
        namespace, slash, name = text.rpartition("/")
        member = self._members.get(name)
        if member is None and text.isascii() and text.isdecimal():
            member = self._by_id.get(int(text))
        if member is None or (slash and member.endpoint.namespace != namespace):
            raise UnknownEndpointError(text)
        return member

    def find(self, name: str) -> Member | None:
        """Return a member, None if there is none of this name."""
        return self._members.get(name)

    def by_id(self, number: int) -> Member | None:
        """Return the member with an endpoint id, None if there is none."""
        return self._by_id.get(number)

    def owner(self, address: bytes) -> Member | None:
        """Return the member that has an address."""
        name = self._owners.get(address)
        return None if name is None else self._members[name]

    def labels_of(self, declaration: Declaration, namespace_labels: LabelSet | None) -> LabelSet:
        """Return all labels of an endpoint: its own, its namespace's and the cluster's.

        An endpoint that is `reserved:init` gets nothing added: what it is, is not known yet.
        """
        return workload_labels(
            declaration.labels,
            namespace=declaration.namespace,
            cluster=self._cluster,
            namespace_labels=((key, value) for _, key, value in namespace_labels or ()),
        )

    # --- changes ------------------------------------------------------------------------------

    def check(self, declaration: Declaration, origin: Origin, *, new: bool = False) -> None:
        """Refuse a declaration that contradicts another one.

        Args:
            declaration: what is wanted.
            origin: who says so.
            new: a member of this name that is declared otherwise is not to be changed.

        Raises:
            RosterError: an address belongs to another endpoint, another origin declared the name,
                it is taken, or there are too many endpoints.
        """
        known = self._members.get(declaration.name)
        if known is not None and known.origin != origin:
            raise RosterError(
                f"endpoint {declaration.name} is declared {_whence(known)}: change it there"
            )
        if new and known is not None and not known.declaration.says_as(declaration):
            raise RosterError(
                f"endpoint {declaration.name} is there already, with other addresses, labels or "
                "settings: `endpoint label` changes its labels, `endpoint add --replace` all of it"
            )
        if known is None and len(self._members) >= MAX_ENDPOINTS:
            raise RosterError(f"there are {MAX_ENDPOINTS} endpoints already")
        for address in declaration.addresses:
            other = self.owner(address)
            if other is not None and other.endpoint.name != declaration.name:
                raise RosterError(
                    f"{format_address(address)} belongs to endpoint {other.endpoint.name} "
                    f"({_whence(other)}); endpoint {declaration.name} cannot have it too"
                )

    def put(
        self, declaration: Declaration, origin: Origin, interface: tuple[str, int], time_ns: int
    ) -> Member:
        """Add or change a member; identity and labels are the caller's next step.

        Args:
            declaration: what is wanted.
            origin: who says so.
            interface: (name, index) of the node's side of its link, ("", 0) = not known.
            time_ns: wall clock.

        Raises:
            RosterError: as `check`.
            OSError: it could not be persisted; nothing changed.
        """
        self.check(declaration, origin)
        known = self._members.get(declaration.name)
        if known is not None and known.declaration.namespace == declaration.namespace:
            endpoint = known.endpoint
        elif known is not None:
            raise RosterError(
                f"endpoint {declaration.name} is in namespace {known.declaration.namespace}; "
                "another namespace is another endpoint: delete it first"
            )
        else:
            endpoint = Endpoint(
                self._free_id(),
                declaration.name,
                declaration.namespace,
                time_ns=time_ns,
                label_filter=self._filter,
            )
        member = Member(endpoint, declaration, origin)
        self._save({**self._members, declaration.name: member}, {declaration.name: interface})
        endpoint.configure(
            time_ns,
            addresses=declaration.addresses,
            interface=interface,
            netns=declaration.netns,
            named_ports=declaration.ports,
            audit=declaration.audit,
        )
        return member

    def remove(self, name: str, origin: Origin) -> Member:
        """Take a member out; its endpoint's end is the caller's next step.

        Raises:
            UnknownEndpointError: there is none.
            RosterError: another origin declared it.
            OSError: it could not be persisted; nothing changed.
        """
        member = self.get(name)
        if member.origin != origin:
            raise RosterError(f"endpoint {name} is declared {_whence(member)}: remove it there")
        self._save({key: one for key, one in self._members.items() if key != name}, {})
        return member

    def of_origin(self, origin: Origin, file: str | None = None) -> list[str]:
        """Return the names that an origin (of it, a file) declared."""
        return [
            name
            for name, member in self._members.items()
            if member.origin == origin and file in (None, member.declaration.place.file)
        ]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Persist the changes made inside at the end, in one write.

        Raises:
            OSError: at the end, they could not be persisted; they are in force all the same.
        """
        self._held = True
        self.saved = False
        try:
            yield
        finally:
            self._held = False
            self._save(self._members, {})
            self.saved = True

    # --- persistence --------------------------------------------------------------------------

    def restore(self, time_ns: int) -> None:
        """Bring back the members of before the restart, in state `restoring`.

        Raises:
            StateError: the state file cannot be used.
        """
        rows = statefile.read(self._path, "endpoints", tuple[StoredMember, ...], _MEND) or ()
        members: dict[str, Member] = {}
        for row in rows:
            try:
                declaration = _declaration(row)
            except (ValueError, LabelError) as error:
                raise StateError(f"{self._path}: endpoint {row.name}: {error}") from error
            endpoint = Endpoint(
                row.id,
                row.name,
                row.namespace,
                time_ns=time_ns,
                label_filter=self._filter,
                restored=True,
            )
            endpoint.configure(
                time_ns,
                addresses=declaration.addresses,
                interface=(row.link, row.interface_index),
                netns=row.netns,
                named_ports=row.ports,
                audit=row.audit,
            )
            members[row.name] = Member(endpoint, declaration, row.origin)
            self._last_id = max(self._last_id, row.id)
        self._adopt(members)

    def _save(self, members: dict[str, Member], interfaces: dict[str, tuple[str, int]]) -> None:
        """Persist, then believe it; within `together`, only believe it."""
        if not self._held:
            kept = {
                name: self._kept(members[name], interfaces.get(name, _link(members[name])))
                for name in sorted(members)
            }
            statefile.write(self._path, "endpoints", [one.row for one in kept.values()])
            self._rows = kept
        self._adopt(members)

    def _kept(self, member: Member, link: tuple[str, int]) -> "_Kept":
        """Return what is persisted of a member; most are as they were at the last change."""
        kept = self._rows.get(member.declaration.name)
        if kept is not None and kept.member is member and kept.link == link:
            return kept
        return _Kept(member, link, _stored(member, link))

    def _adopt(self, members: dict[str, Member]) -> None:
        self._members = members
        self._by_id = {member.endpoint.id: member for member in members.values()}
        self._owners = {
            address: name
            for name, member in members.items()
            for address in member.declaration.addresses
        }

    def _free_id(self) -> int:
        """Return an id that no member has, and not the one that has just become free."""
        used = {member.endpoint.id for member in self._members.values()}
        for _ in range(MAX_ENDPOINTS):
            self._last_id = self._last_id % MAX_ENDPOINTS + 1
            if self._last_id not in used:
                return self._last_id
        raise RosterError(f"all {MAX_ENDPOINTS} endpoint ids are in use")


def _whence(member: Member) -> str:
    """Say where a member was declared."""
    match member.origin:
        case "api":
            return "through the API"
        case "config" | "directory":
            return f"in {member.declaration.place.file or 'the configuration'}"


def _link(member: Member) -> tuple[str, int]:
    return member.endpoint.interface, member.endpoint.interface_index


def _stored(member: Member, link: tuple[str, int]) -> StoredMember:
    declaration = member.declaration
    return StoredMember(
        id=member.endpoint.id,
        name=declaration.name,
        namespace=declaration.namespace,
        addresses=tuple(map(format_address, declaration.addresses)),
        labels=declaration.labels.strings(),
        netns=declaration.netns,
        interface=declaration.interface,
        interface_index=link[1],
        ports=declaration.ports,
        audit=declaration.audit,
        origin=member.origin,
        file=declaration.place.file,
        link=link[0],
    )


def _declaration(row: StoredMember) -> Declaration:
    return Declaration(
        name=row.name,
        namespace=row.namespace,
        addresses=tuple(map(parse_address, row.addresses)),
        labels=LabelSet.parse(row.labels),
        netns=row.netns,
        interface=row.interface,
        ports=row.ports,
        audit=row.audit,
        place=Place(row.file) if row.file else NOWHERE,
    )
