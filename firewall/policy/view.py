"""A snapshot, arranged to answer: who is this address, and may this packet pass?

A worker makes one View per snapshot. Everything is derived on first use and remembered: an
address's peer, a direction's map, the decision for two addresses, protocol and port. All memos are
bounded; a full one is forgotten whole, which costs less than keeping track of age and cannot be
steered by a peer to keep a wrong answer.

A View that follows another takes over what its snapshot repeats: tables that are the same object,
and the maps of directions whose rows, and whatever they point to, are the same. So a change of one
row costs a look at each row, and nothing is compiled again. Peers and decisions are never taken
over.

Both sides are asked: the source endpoint's egress, then the destination endpoint's ingress. A side
without a managed endpoint has no policy and allows.
"""

from collections.abc import Sequence
from typing import NamedTuple

from conntrack.address import Prefix
from firewall.identities.ipcache import LongestPrefixMap
from firewall.identities.reserved import Reserved, world_for
from firewall.policy.difference import moved, prefix_key
from firewall.policy.policymap import (
    LOCAL_HOST_SELECTOR,
    UNENFORCED,
    UNRESOLVED,
    DirectionVerdict,
    PolicyMap,
)
from firewall.policy.snapshot import (
    ANY_SELECTOR,
    DirectionRow,
    EndpointRow,
    IpcacheRow,
    NamedPortRow,
    PolicyRow,
    Snapshot,
)
from firewall.policy.verdict import DropReason, TrafficDirection, Verdict

_DECISIONS = 16384  # remembered decisions, about 1 kB each with their parts
_PEERS = 16384  # remembered addresses
_NO_NAMES: frozenset[str] = frozenset()
_ALWAYS = "always"


class Peer(NamedTuple):
    """One side of the traffic.

    Attributes:
        identity: its number.
        selectors: every selector it matches, `ANY_SELECTOR` among them.
        endpoint: the managed endpoint that owns the address, None if none does.
    """

    identity: int
    selectors: frozenset[int]
    endpoint: EndpointRow | None


class Decision(NamedTuple):
    """The answer for one packet that opens a flow.

    Attributes:
        verdict: ACCEPT, DROP, or REDIRECT to the L7 proxy.
        reason: why it is dropped, None if it is not.
        direction: the side that dropped or redirects; for an accept INGRESS if the destination is
            managed, else EGRESS if the source is, else None.
        source, destination: who they are.
        egress, ingress: what each side says, None = no managed endpoint there.
        audited: a side denies, and audit mode lets it pass.
    """

    verdict: Verdict
    reason: DropReason | None
    direction: TrafficDirection | None
    source: Peer
    destination: Peer
    egress: DirectionVerdict | None
    ingress: DirectionVerdict | None
    audited: bool


class Side(NamedTuple):
    """One endpoint's policy in one direction, about to be asked.

    `named_ports`: where port names are looked up, the subject's own for ingress, those of the
    peer's identity for egress.
    """

    endpoint: EndpointRow
    direction: TrafficDirection
    named_ports: tuple[NamedPortRow, ...]


class _Directed(NamedTuple):
    """A direction's map and what it was made of."""

    row: DirectionRow
    map: PolicyMap


class View:
    """Answers from one snapshot. Not shared between threads: its memos are written on reading.

    Args:
        snapshot: what to answer from.
        last: a view of an earlier snapshot, to share with; it stays usable.
    """

    def __init__(self, snapshot: Snapshot, last: "View | None" = None) -> None:
        self.snapshot = snapshot
        self.revision = snapshot.revision
        self.generation = snapshot.generation
        settings = snapshot.settings
        self._local_host_allowed = settings.allow_localhost == _ALWAYS
        self._audit_all = settings.policy_audit_mode
        self._dual_stack = settings.dual_stack
        self._identities = {row.number: row for row in snapshot.identities}
        self._selectors: dict[int, frozenset[int]] = {}
        self._by_address = {a: row for row in snapshot.endpoints for a in row.addresses}
        self._by_interface = {
            row.interface_index: row for row in snapshot.endpoints if row.interface_index
        }
        self._policies = {row.identity: row for row in snapshot.policies}
        # An address of our own needs no row: what the endpoint and host rows say is local knowledge
        # (Cilium's source "local"), and it must not fall into a wider CIDR row.
        self._own = dict.fromkeys(settings.local_addresses, int(Reserved.HOST)) | {
            address: row.identity for address, row in self._by_address.items()
        }
        self._sights = {
            (row.endpoint, row.address): frozenset(row.selectors) for row in snapshot.sights
        }
        self._addresses = _address_map(snapshot, last)
        self._maps: dict[tuple[int, TrafficDirection], _Directed] = {}
        self._port_names: dict[tuple[NamedPortRow, ...], dict[tuple[int, int], frozenset[str]]] = {}
        self._peers: dict[bytes, Peer] = {}
        self._decisions: dict[tuple[bytes, bytes, int, int], Decision] = {}
        if last is not None:
            self._inherit(last)

    @property
    def addresses(self) -> "LongestPrefixMap[IpcacheRow]":
        """The ipcache by prefix, for the view that follows."""
        return self._addresses

    def _inherit(self, last: "View") -> None:
        """Take over what was derived from rows that are still the same."""
        before, now = last._identities, self._identities  # noqa: SLF001  one of us
        self._selectors = {
            number: matched
            for number, matched in last._selectors.items()  # noqa: SLF001
            if now.get(number) is before.get(number)
        }
        if self._local_host_allowed != last._local_host_allowed:  # noqa: SLF001
            return
        l7 = _unlike(last.snapshot.l7, self.snapshot.l7)
        origins = _unlike(last.snapshot.origins, self.snapshot.origins)
        for key, kept in last._maps.items():  # noqa: SLF001
            identity, direction = key
            row = self._direction(identity, direction)
            same = row is not None and (row is kept.row or row == kept.row)
            if same and not ((l7 or origins) and kept.map.uses(l7, origins)):
                kept.map.rebase(self.snapshot.l7, self.snapshot.origins)
                self._maps[key] = kept

    def peer(self, address: bytes) -> Peer:
        """Return who an address is; one that nobody knows is the world.

        Args:
            address: packed, 4 or 16 bytes, network order.
        """
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peer(address)
            if len(self._peers) >= _PEERS:
                self._peers.clear()
            self._peers[address] = peer
        return peer

    def seen(self, source: bytes, destination: bytes) -> Peer:
        """Return who a destination is to a source, which may know it by a name of its own."""
        peer = self.peer(destination)
        if not self._sights:
            return peer
        sender = self._by_address.get(source)
        known = self._sights.get((sender.id, destination)) if sender is not None else None
        return peer if known is None else peer._replace(selectors=peer.selectors | known)

    def _peer(self, address: bytes) -> Peer:
        row = self._addresses.lookup(address)
        further: tuple[int, ...] = ()
        if row is not None and row.length == 8 * len(address):
            identity, further = row.identity, row.selectors
        elif (own := self._own.get(address)) is not None:
            identity = own
        elif row is not None:
            identity, further = row.identity, row.selectors
        else:
            identity = int(world_for(address, dual_stack=self._dual_stack))
        selectors = self._selectors_of(identity)
        if further:
            selectors = selectors.union(further)
        return Peer(identity, selectors, self._by_address.get(address))

    def _selectors_of(self, identity: int) -> frozenset[int]:
        found = self._selectors.get(identity)
        if found is None:
            row = self._identities.get(identity)
            found = _with_any(identity, row.selectors if row is not None else ())
            if row is not None:
                self._selectors[identity] = found
        return found

    def endpoint_at(self, address: bytes) -> EndpointRow | None:
        """Return the managed endpoint that owns an address."""
        return self._by_address.get(address)

    def endpoint_on(self, interface_index: int) -> EndpointRow | None:
        """Return the managed endpoint behind one of the node's interfaces."""
        return self._by_interface.get(interface_index)

    def policy_of(self, identity: int) -> PolicyRow | None:
        """Return the policy of an identity, None if it has none here."""
        return self._policies.get(identity)

    def decide(self, source: bytes, destination: bytes, protocol: int, port: int) -> Decision:
        """Return the decision for a packet that opens a flow.

        Args:
            source: packed address.
            destination: packed address, after any translation.
            protocol: IANA number of the upper layer.
            port: destination port in host order, or the ICMP type, 0 for other protocols.
        """
        key = source, destination, protocol, port
        decision = self._decisions.get(key)
        if decision is None:
            decision = self._decide(
                self.peer(source), self.seen(source, destination), protocol, port
            )
            if len(self._decisions) >= _DECISIONS:
                self._decisions.clear()
            self._decisions[key] = decision
        return decision

    def _decide(self, source: Peer, destination: Peer, protocol: int, port: int) -> Decision:
        sender, receiver = source.endpoint, destination.endpoint
        egress: DirectionVerdict | None = None
        ingress: DirectionVerdict | None = None
        if sender is not None and sender is receiver:
            # An endpoint may reach itself, through a service for example (Cilium bpf_lxc.c).
            egress = ingress = UNENFORCED
        else:
            if sender is not None:
                names = self._ports_of(destination.identity)
                subject = Side(sender, TrafficDirection.EGRESS, names)
                egress = self.side(subject, destination, protocol, port)
            if receiver is not None:
                subject = Side(receiver, TrafficDirection.INGRESS, receiver.named_ports)
                ingress = self.side(subject, source, protocol, port)
        return _combine(source, destination, egress, ingress)

    def side(self, subject: Side, peer: Peer, protocol: int, port: int) -> DirectionVerdict:
        """Return what one endpoint's policy says about one peer, audit mode applied."""
        endpoint = subject.endpoint
        found = self.map_of(endpoint.identity, subject.direction)
        if found is None:
            return UNRESOLVED
        names = self._names(subject.named_ports, protocol, port) if found.named else _NO_NAMES
        verdict = found.lookup(peer.selectors, protocol, port, names)
        if verdict.allowed or not (self._audit_all or endpoint.audit):
            return verdict
        return verdict._replace(allowed=True, audited=True)

    def map_of(self, identity: int, direction: TrafficDirection) -> PolicyMap | None:
        """Return one direction of an identity's policy, None if the identity has none here."""
        key = identity, direction
        found = self._maps.get(key)
        if found is None:
            row = self._direction(identity, direction)
            if row is None:
                return None
            made = PolicyMap(
                row,
                self.snapshot.l7,
                self.snapshot.origins,
                allow_local_host=self._local_host_allowed
                and direction is TrafficDirection.INGRESS
                and identity != Reserved.HOST,
            )
            found = self._maps[key] = _Directed(row, made)
        return found.map

    def _direction(self, identity: int, direction: TrafficDirection) -> DirectionRow | None:
        policy = self._policies.get(identity)
        if policy is None:
            return None
        return policy.ingress if direction is TrafficDirection.INGRESS else policy.egress

    def _ports_of(self, identity: int) -> tuple[NamedPortRow, ...]:
        """Return the named ports of whoever has an identity."""
        row = self._identities.get(identity)
        return row.named_ports if row is not None else ()

    def port_names(
        self, decision: Decision, direction: TrafficDirection, protocol: int, port: int
    ) -> frozenset[str]:
        """Return the names that a decision's port has for one of its sides."""
        if direction is TrafficDirection.EGRESS:
            ports = self._ports_of(decision.destination.identity)
        else:
            endpoint = decision.destination.endpoint
            ports = endpoint.named_ports if endpoint is not None else ()
        return self._names(ports, protocol, port)

    def _names(self, ports: tuple[NamedPortRow, ...], protocol: int, port: int) -> frozenset[str]:
        table = self._port_names.get(ports)
        if table is None:
            table = {}
            for row in ports:
                at = row.protocol, row.port
                table[at] = table.get(at, _NO_NAMES) | {row.name}
            self._port_names[ports] = table
        return table.get((protocol, port), _NO_NAMES)


def _address_map(snapshot: Snapshot, last: View | None) -> LongestPrefixMap[IpcacheRow]:
    """Return the ipcache by prefix; of the last view's, only what changed is touched."""
    if last is not None and last.snapshot.ipcache is snapshot.ipcache:
        return last.addresses
    if last is not None and len(last.addresses) == len(last.snapshot.ipcache):
        found = last.addresses.copy()
        for key, (_, row) in moved(last.snapshot.ipcache, snapshot.ipcache, prefix_key).items():
            prefix = Prefix(*key[1:])
            if row is None:
                found.remove(prefix)
            else:
                found.insert(prefix, row)
        if len(found) == len(snapshot.ipcache):  # else a prefix has two rows, and order counts
            return found
    found = LongestPrefixMap()
    for row in snapshot.ipcache:
        found.insert(Prefix(row.network, row.length), row)
    return found


def _unlike(before: Sequence[object], after: Sequence[object]) -> set[int]:
    """Return the places at which two tables differ, those that only one has included."""
    if before is after:
        return set()
    short, long = sorted((len(before), len(after)))
    found = set(range(short, long))
    for place, (one, other) in enumerate(zip(before, after, strict=False)):
        if one is not other and one != other:
            found.add(place)
    return found


def _with_any(number: int, selectors: tuple[int, ...]) -> frozenset[int]:
    extra = (ANY_SELECTOR, LOCAL_HOST_SELECTOR) if number == Reserved.HOST else (ANY_SELECTOR,)
    return frozenset((*selectors, *extra))


def _combine(
    source: Peer,
    destination: Peer,
    egress: DirectionVerdict | None,
    ingress: DirectionVerdict | None,
) -> Decision:
    verdict, reason = Verdict.ACCEPT, None
    direction = None
    if egress is not None:
        direction = TrafficDirection.EGRESS
    if ingress is not None:
        direction = TrafficDirection.INGRESS
    if egress is not None and not egress.allowed:
        verdict, reason, direction = Verdict.DROP, egress.reason, TrafficDirection.EGRESS
    elif ingress is not None and not ingress.allowed:
        verdict, reason, direction = Verdict.DROP, ingress.reason, TrafficDirection.INGRESS
    elif egress is not None and egress.l7 is not None:
        verdict, direction = Verdict.REDIRECT, TrafficDirection.EGRESS
    elif ingress is not None and ingress.l7 is not None:
        verdict, direction = Verdict.REDIRECT, TrafficDirection.INGRESS
    audited = bool((egress and egress.audited) or (ingress and ingress.audited))
    return Decision(verdict, reason, direction, source, destination, egress, ingress, audited)
