"""The tracker: which flow a packet belongs to, whether it fits, and what it would change.

Theory of operation
    `track` only looks. It finds the entry by the packet's key, asks the protocol's machine, and
    returns a `Tracked` that holds the change. `confirm` makes that change; a packet that is dropped
    is simply never confirmed and has left no trace. INVALID cannot be confirmed, so it can
    never write: this is true by construction, not by care (`Profile.invalid_writes` apart).

    Between the two, other packets may be confirmed. Every change raises the entry's serial; a
    `Tracked` with an old serial is judged again when it is confirmed.

    The table is bounded. A new flow that finds it full makes the most crowding source lose its
    oldest unassured entry; established flows never leave for a newcomer (`conntrack.eviction`).

Not handled: address translation (keys are the packet's own), application helpers (a payload never
opens a flow), reassembly (packets arrive whole).

Time is the caller's monotonic clock in seconds. One tracker serves one thread.
"""

from collections import deque
from collections.abc import Iterator
from typing import Final

from conntrack import datagram, sctp_linux, sctp_strict, tcp_linux, tcp_strict
from conntrack.entry import CtState, Entry, Judgement, Tracked, Update, invalid
from conntrack.eviction import Limits
from conntrack.flow import ICMP, ICMPV6, SCTP, TCP, Direction, FlowTuple
from conntrack.icmp_errors import message_fault, quote_fault
from conntrack.keys import key_of_tuple, reply_key
from conntrack.packet import Oddity, Packet
from conntrack.profile import LINUX, STRICT, Profile
from conntrack.quote import ICMP_ERRORS, ICMPV6_REDIRECT
from conntrack.table import SHARD_MASK, Table
from conntrack.tcp_states import TcpState

__all__ = [
    "LINUX",
    "STRICT",
    "Counters",
    "CtState",
    "Entry",
    "Profile",
    "Tracked",
    "Tracker",
]

DEFAULT_LIMIT_COUNT: Final = 262144  # entries; nf_conntrack_max of a host with 4 GB and more
DEFAULT_BUDGET_COUNT: Final = 4000  # keys per sweep: about 1 ms in CPython 3.11 (measured)
_REMOVAL_COST: Final = 20  # a removal takes as long as examining 20 keys (measured)
READY_COUNT: Final = 4096  # flows whose windows are not packed; 2 MB

_new: Final = tuple.__new__  # builds a NamedTuple in a third of the time of calling its class

# Looking up a member of an enum costs as much as comparing two windows.
_CT_NEW: Final = CtState.NEW
_CT_ESTABLISHED: Final = CtState.ESTABLISHED
_CT_REPLY: Final = CtState.REPLY
_CT_RELATED: Final = CtState.RELATED
_ORIGINAL: Final = Direction.ORIGINAL
_REPLY: Final = Direction.REPLY

# Neighbours (RFC 4861), multicast listeners (RFC 2710, 3810), multicast routers (RFC 4286).
_NEIGHBOUR: Final = frozenset((133, 134, 135, 136))
_LISTENER: Final = frozenset((130, 131, 132, 143, 151, 152))
_ROUTER_LEAVES: Final = 153  # RFC 4286 section 5; Linux has forgotten it

_ODDITIES: Final = {
    Oddity.SOURCE_ROUTE: "source route",
    Oddity.ROUTING_0: "routing header type 0",
    Oddity.NO_CHECKSUM: "UDP over IPv6 without checksum",
    Oddity.HOP_BY_HOP_LATE: "hop-by-hop options out of place",
    Oddity.GRE_HEADER: "GRE header that nobody defined",
}


class Counters:
    """Events since the tracker began.

    Attributes:
        inserted: entries made.
        expired: entries that died of silence and were swept.
        evicted: entries that left for a newer flow.
        refused: flows that found the table full of assured ones.
        lag_s: how long the entry had been dead that the last sweep found too late by most; seconds.
    """

    __slots__ = ("evicted", "expired", "inserted", "lag_s", "refused")

    def __init__(self) -> None:
        self.inserted = 0
        self.expired = 0
        self.evicted = 0
        self.refused = 0
        self.lag_s = 0.0


class Tracker:
    """All flows of one worker.

    Args:
        profile: the rules; `STRICT` unless Linux's own answers are wanted.
        limit_count: entries at most.
        source_limit_count: entries of one source (IPv6: one /64) at most; None: no such limit.

    Attributes:
        loose: a TCP segment with ACK may open a flow in its middle. Starts as the profile says; the
            caller may switch it on while flows that it lost are being found again.
    """

    def __init__(
        self,
        profile: Profile = STRICT,
        *,
        limit_count: int = DEFAULT_LIMIT_COUNT,
        source_limit_count: int | None = None,
    ) -> None:
        self.profile = profile
        self.loose = profile.loose
        self.counters = Counters()
        self._limits = Limits(limit_count, source_limit_count)
        self._table = Table()
        self._shards = self._table.shards
        self._ready: deque[Entry] = deque()
        self._strict = profile.strict

    def __len__(self) -> int:
        return self._table.count

    # --- one packet -----------------------------------------------------------------------------

    def track(self, packet: Packet, now: float) -> Tracked:
        """Classify one packet; nothing changes until the answer is confirmed."""
        key = packet.key
        direction = 0  # a plain int indexes twice as fast as an enum
        entry = self._shards[hash(key) & SHARD_MASK].get(key)
        if entry is None:
            key = reply_key(key)
            direction = 1
            entry = self._shards[hash(key) & SHARD_MASK].get(key)
        if entry is None or (now >= entry.expires_at and not entry.offloaded):
            return self.track_first(packet, now, None)
        if packet.oddities and self._strict:
            return self._refused(packet, entry, _oddity(packet))
        finding = self._judge(entry, packet, direction, now)
        reason = ""
        update: Update | None
        if isinstance(finding, Update):
            update = finding
        else:
            valid, reason, update, reopens = finding
            if reopens:
                return self.track_first(packet, now, entry)
            if not valid:
                return self._refused(packet, entry, reason, update)
        ctstate = _CT_REPLY if direction else _CT_ESTABLISHED if entry.seen_reply else _CT_NEW
        way = _REPLY if direction else _ORIGINAL
        return _new(Tracked, (ctstate, way, entry, reason, packet, entry.serial, update, None))

    def entry_of(self, packet: Packet) -> Entry | None:
        """The entry under a packet's key, in either direction, dead or alive."""
        return self._table.get(packet.key)

    def entry_quoted(self, packet: Packet) -> Entry | None:
        """The entry of the flow whose packet an ICMP error quotes, dead or alive."""
        return self._table.get(packet.quoted.key) if packet.quoted is not None else None

    def proceed(self, entry: Entry, packet: Packet, now: float) -> bool:
        """Track and confirm at once an ordinary packet of a flow that may pass.

        Nearly every packet is one; what `track` would say of it needs no object then.

        Args:
            entry: what `entry_of` the packet found.
            packet: the packet.
            now: monotonic seconds.

        Returns:
            False: it is none, and nothing has changed; `track` tells what it is.
        """
        if now >= entry.expires_at or packet.oddities:
            return False
        direction = 0 if packet.key == entry.key else 1
        finding = self._judge(entry, packet, direction, now)
        if not isinstance(finding, Update):
            return False
        self._change(entry, packet, direction, finding, now)
        return True

    def _judge(self, entry: Entry, packet: Packet, direction: int, now: float) -> Judgement:
        """Ask the protocol's machine about a packet of a flow."""
        protocol = packet.protocol
        if protocol == TCP:
            if entry.packed is not None:
                self._make_ready(entry)
            if self._strict:
                return tcp_strict.follow(entry, packet, direction, self.profile)
            return tcp_linux.follow(entry, packet, direction, self.profile)
        if protocol == SCTP:
            follow = sctp_strict.follow if self._strict else sctp_linux.follow
            return follow(entry, packet, direction, self.profile)
        return datagram.follow(entry, packet, direction, self.profile, now)

    def _make_ready(self, entry: Entry) -> None:
        """Unpack a flow's windows."""
        entry.unpack()
        self._keep_ready(entry)

    def _keep_ready(self, entry: Entry) -> None:
        """Note that a flow's windows are not packed, and pack those that are it for longest.

        So memory is bounded however many flows there are, and busy ones stay as they are.
        """
        self._ready.append(entry)
        if len(self._ready) > READY_COUNT:
            self._ready.popleft().pack()

    def track_first(self, packet: Packet, now: float, replaces: Entry | None = None) -> Tracked:
        """Classify a packet that has no flow, or whose flow it ends by opening another."""
        protocol = packet.protocol
        if protocol in (ICMP, ICMPV6):
            special = self._track_icmp(packet, now)
            if special is not None:
                return special
        finding = self._judge_first(packet, replaces)
        if isinstance(finding, Update):
            return _new(Tracked, (_CT_NEW, _ORIGINAL, None, "", packet, 0, finding, replaces))
        if not finding.valid:
            return self._refused(packet, replaces, finding.reason)
        return Tracked(
            CtState.NEW, _ORIGINAL, None, finding.reason, packet, 0, finding.update, replaces
        )

    def _judge_first(self, packet: Packet, replaces: Entry | None) -> Judgement:
        if self._strict:
            if packet.oddities:
                return invalid(_oddity(packet))
            # LAND; RFC 1122 section 3.2.1.3. An echo request to oneself is not its own answer.
            if packet.source == packet.destination and packet.key == reply_key(packet.key):
                return invalid("from itself to itself")
        if packet.protocol == TCP:
            if self._strict:
                return tcp_strict.first(packet, self.profile, self.loose, replaces)
            return tcp_linux.first(packet, self.profile, self.loose)
        if packet.protocol == SCTP:
            sctp_first = sctp_strict.first if self._strict else sctp_linux.first
            return sctp_first(packet, self.profile)
        return datagram.first(packet, self.profile)

    @staticmethod
    def _refused(
        packet: Packet, entry: Entry | None, reason: str, left: Update | None = None
    ) -> Tracked:
        direction = _REPLY if entry is not None and packet.key != entry.key else _ORIGINAL
        serial = 0 if entry is None else entry.serial
        return Tracked(CtState.INVALID, direction, entry, reason, packet, serial, left, None)

    # --- ICMP that is not a query ---------------------------------------------------------------

    def _track_icmp(self, packet: Packet, now: float) -> Tracked | None:
        """Errors are RELATED, discovery is UNTRACKED; None: an ordinary query or answer."""
        kind = packet.icmp_type
        if packet.version == 4:
            return self._track_error(packet, now) if kind in ICMP_ERRORS else None
        if kind < 128 or kind == ICMPV6_REDIRECT:  # RFC 4443 section 2.1: below 128 are errors
            return self._track_error(packet, now)
        leaves = kind == _ROUTER_LEAVES and self._strict
        if kind in _NEIGHBOUR or kind in _LISTENER or leaves:
            expected = 255 if kind in _NEIGHBOUR else 1
            if self._strict and packet.hop_limit != expected:
                # RFC 4861 section 6.1, RFC 3810 section 6.2: it cannot come from this link.
                return self._refused(packet, None, "discovery from beyond the link")
            return Tracked(CtState.UNTRACKED, _ORIGINAL, None, "discovery", packet, 0, None, None)
        return None

    def _track_error(self, packet: Packet, now: float) -> Tracked:
        fault = message_fault(packet, self._strict)
        if self._strict and packet.oddities:
            fault = _oddity(packet)
        quoted = packet.quoted
        if fault or quoted is None:
            return self._refused(packet, None, fault or "quotes no packet of a flow")
        entry = self._table.get(quoted.key)
        if entry is None or (now >= entry.expires_at and not entry.offloaded):
            return self._refused(packet, None, "quotes no tracked flow")
        if entry.packed is not None:
            self._make_ready(entry)
        fault = quote_fault(entry, packet, self._strict)
        if fault:
            return self._refused(packet, None, fault)
        towards_originator = quoted.key == entry.key
        ctstate = CtState.RELATED_REPLY if towards_originator else CtState.RELATED
        direction = _REPLY if towards_originator else _ORIGINAL
        return Tracked(ctstate, direction, entry, "", packet, entry.serial, None, None)

    # --- the change -----------------------------------------------------------------------------

    def confirm(self, tracked: Tracked, now: float) -> Entry | None:
        """Make the change that an accepted packet stands for.

        Args:
            tracked: an answer of `track`. INVALID and UNTRACKED have nothing to confirm.
            now: monotonic seconds.

        Returns:
            The packet's entry; None for INVALID and UNTRACKED, and if there is no room for a new
            flow (Cilium: `CT_MAP_INSERTION_FAILED`; the packet is to be dropped).
        """
        ctstate, direction, entry, _, packet, serial, update, _ = tracked
        if ctstate >= _CT_RELATED:
            if update is not None:
                self._leave_behind(tracked, update, now)
            return entry if ctstate <= CtState.RELATED_REPLY else None
        if entry is None:
            return self._admit(tracked, now)
        if entry.serial != serial:
            return self._confirm_again(packet, now)
        self._change(entry, packet, direction, update, now)
        return entry

    def _change(
        self, entry: Entry, packet: Packet, direction: int, update: Update | None, now: float
    ) -> None:
        """Count a packet in its entry, and write what it changes."""
        entry.serial += 1
        if direction:
            entry.reply_packets += 1
            entry.reply_bytes += packet.length
        else:
            entry.original_packets += 1
            entry.original_bytes += packet.length
        if update is not None:
            state, timeout_s, assured, answers, windows, memory, closes = update
            if entry.windows is None and windows is not None:
                self._make_ready(entry)
            entry.windows = windows
            entry.memory = memory
            if timeout_s >= 0:
                entry.expires_at = now + timeout_s
            if direction and answers:
                entry.seen_reply = True
            if state != entry.state or (assured and not entry.assured):
                entry.state = state
                entry.assured = entry.assured or assured
                self._limits.ranked(entry)
            if closes:
                self.remove(entry)

    def _leave_behind(self, tracked: Tracked, update: Update, now: float) -> None:
        """Write what an INVALID segment writes in Linux (`Profile.invalid_writes`)."""
        entry = tracked.entry
        if entry is None or entry.serial != tracked.serial:
            return
        entry.serial += 1
        if entry.packed is not None:
            self._make_ready(entry)
        entry.windows, entry.memory = update.windows, update.memory
        if update.timeout_s >= 0:
            entry.expires_at = min(entry.expires_at, now + update.timeout_s)

    def _confirm_again(self, packet: Packet, now: float) -> Entry | None:
        """The entry has changed since the packet was tracked: judge it by what holds now."""
        tracked = self.track(packet, now)
        return self.confirm(tracked, now)

    def _admit(self, tracked: Tracked, now: float) -> Entry | None:
        """Insert the flow of a first packet, unless another packet of it was quicker."""
        packet = tracked.packet
        update = tracked.update
        assert update is not None
        present = self._table.get(packet.key)
        if present is not None:
            if present is tracked.replaces:
                self.remove(present)
            elif now < present.expires_at or present.offloaded:
                return self._confirm_again(packet, now)
            else:
                self._forget(present)
        limits = self._limits
        if (
            self._table.count >= limits.limit_count or limits.source_limit_count is not None
        ) and not self._make_room(packet.key):
            self.counters.refused += 1
            return None
        entry = Entry(packet.key, packet.protocol, now)
        entry.state = update.state
        entry.expires_at = now + update.timeout_s
        if update.windows is not None:
            entry.windows = update.windows
            self._keep_ready(entry)
        entry.memory = update.memory
        entry.original_packets = 1
        entry.original_bytes = packet.length
        self._table.insert(entry)
        limits.inserted(entry)
        self.counters.inserted += 1
        return entry

    def _make_room(self, key: bytes) -> bool:
        """Whether one more entry fits, after evicting one if need be."""
        limits = self._limits
        if limits.is_crowding(key):
            victim = limits.own_victim(key)
        elif self._table.count >= limits.limit_count:
            victim = limits.victim()
        else:
            return True
        if victim is None:
            return False
        self.remove(victim)
        self.counters.evicted += 1
        return True

    # --- the table ------------------------------------------------------------------------------

    def find(self, flow: FlowTuple, *, icmp_type: int = 0) -> Entry | None:
        """The entry that packets of this tuple belong to, in either direction.

        Args:
            flow: the tuple; ICMP queries have their identifier as both ports.
            icmp_type: of an ICMP query or answer.
        """
        return self._table.get(key_of_tuple(flow, icmp_type=icmp_type))

    def remove(self, entry: Entry) -> None:
        """Forget a flow; its next packet is a first packet. Twice is not an error."""
        if self._table.remove(entry):
            self._limits.removed(entry)

    def _forget(self, entry: Entry) -> None:
        self.remove(entry)
        self.counters.expired += 1

    def expire(self, now: float, *, budget: int = DEFAULT_BUDGET_COUNT) -> int:
        """Remove some of the entries that have died of silence.

        Bounded work, continuing where the last call stopped, so that a worker may call it between
        two packets: examining a key costs 1 of the `budget`, removing an entry 20. What is dead
        and not yet swept does not exist for `track`.

        Returns:
            Number of entries removed.
        """
        count = 0
        oldest = now
        for entry in self._table.sweep():
            if entry.serial >= 0 and now >= entry.expires_at and not entry.offloaded:
                self.remove(entry)
                oldest = min(oldest, entry.expires_at)
                count += 1
                budget -= _REMOVAL_COST
            budget -= 1
            if budget <= 0:
                break
        self.counters.expired += count
        self.counters.lag_s = now - oldest
        return count

    def entries(self) -> Iterator[Entry]:
        """Every entry once, dead ones that are not yet swept included.

        The table may change between two of them: what has left it by then is passed over, and what
        is new may be or not be among them. No step takes longer than a 256th of the table.
        """
        return iter(self._table)

    def restore(
        self,
        original: FlowTuple,
        now: float,
        *,
        timeout_s: float,
        state: int = 0,
        seen_reply: bool = True,
        assured: bool = True,
        icmp_type: int = 0,
    ) -> Entry | None:
        """Take over a flow that another tracker (the kernel's) knows.

        Its TCP windows are learnt from the next segment. An entry that is there already is returned
        as it is.

        Args:
            original: the tuple of the first packet.
            now: monotonic seconds.
            timeout_s: how long the flow may still be silent.
            state: `TcpState` or `SctpState`; 0 for other protocols.
            seen_reply: the other side has answered.
            assured: it is not to be evicted.
            icmp_type: of the query, for ICMP.

        Returns:
            The entry, or None if the table is full of assured flows.
        """
        key = key_of_tuple(original, icmp_type=icmp_type)
        present = self._table.get(key)
        if present is not None:
            return present
        if not self._make_room(key):
            self.counters.refused += 1
            return None
        entry = Entry(key, original.protocol, now)
        entry.state = state
        entry.seen_reply = seen_reply
        entry.assured = assured
        entry.expires_at = now + timeout_s
        self._table.insert(entry)
        self._limits.inserted(entry)
        self.counters.inserted += 1
        return entry

    def settle(self, entry: Entry, state: int | None, now: float) -> None:
        """Believe somebody who has seen more of a TCP flow about the state that it is in.

        Its windows are learnt anew.

        Args:
            entry: the flow.
            state: `TcpState`; None: the other does not know the flow, which soon ends unless
                another packet comes.
            now: monotonic seconds.
        """
        timeouts = self.profile.timeouts.tcp
        if state is None:
            entry.expires_at = min(entry.expires_at, now + timeouts[TcpState.CLOSE])
            return
        self.relearn(entry)
        entry.memory = None
        entry.expires_at = now + timeouts[state]
        entry.state = state
        self._limits.ranked(entry)

    @staticmethod
    def relearn(entry: Entry) -> None:
        """Learn a TCP flow's windows anew, because packets have passed that were not seen here."""
        entry.windows = entry.packed = None
        entry.serial += 1


def _oddity(packet: Packet) -> str:
    """The first of a packet's oddities, in words."""
    for bit, words in _ODDITIES.items():
        if packet.oddities & bit:
            return words
    return ""
