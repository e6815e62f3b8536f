"""The tracker: which flow a packet belongs to, and whether it fits."""

from collections.abc import Iterator

from conntrack.entry import CtState, Entry, Tracked
from conntrack.flow import ICMP, ICMPV6, TCP, Direction, FlowTuple
from conntrack.keys import ICMP_ANSWER, ICMPV6_ANSWER, key_of_tuple, reply_key
from conntrack.packet import Packet, TcpFlag
from conntrack.profile import LINUX, STRICT, Profile
from conntrack.tcp_states import TcpState

__all__ = ["LINUX", "STRICT", "CtState", "Entry", "Profile", "Tracked", "Tracker"]

_UNTRACKED_ICMPV6 = frozenset((130, 131, 132, 133, 134, 135, 136, 143, 151, 152, 153))


class Counters:
    """Events since the tracker began."""

    __slots__ = ("evicted", "expired", "inserted", "invalid", "refused")

    def __init__(self) -> None:
        self.inserted = 0
        self.expired = 0
        self.evicted = 0
        self.refused = 0
        self.invalid = 0


class Tracker:
    """All flows of one worker."""

    def __init__(self, profile: Profile = STRICT, *, limit_count: int = 262144) -> None:
        self.profile = profile
        self.limit_count = limit_count
        self.loose = profile.loose
        self.counters = Counters()
        self._table: dict[bytes, Entry] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def track(self, packet: Packet, now: float) -> Tracked:
        """Classify one packet; nothing changes until it is confirmed."""
        entry = self._table.get(packet.key)
        if entry is not None and now >= entry.expires_at and not entry.offloaded:
            entry = None
        if entry is None:
            return self._track_first(packet, now)
        if packet.key == entry.key:
            state = CtState.ESTABLISHED if entry.seen_reply else CtState.NEW
            return Tracked(state, Direction.ORIGINAL, entry, "", packet, entry.serial, None)
        return Tracked(CtState.REPLY, Direction.REPLY, entry, "", packet, entry.serial, None)

    def _track_first(self, packet: Packet, now: float) -> Tracked:
        state, reason = CtState.NEW, ""
        if packet.protocol == TCP:
            if packet.tcp_flags & 0x17 != TcpFlag.SYN and not (
                self.loose and packet.tcp_flags & 0x17 == TcpFlag.ACK
            ):
                state, reason = CtState.INVALID, "first packet is not a SYN"
        elif packet.quoted is not None:
            return self._track_error(packet, now)
        elif packet.protocol == ICMP and packet.icmp_type not in ICMP_ANSWER:
            state, reason = CtState.INVALID, "not a query"
        elif packet.protocol == ICMPV6:
            if packet.icmp_type in _UNTRACKED_ICMPV6:
                state = CtState.UNTRACKED
            elif packet.icmp_type not in ICMPV6_ANSWER:
                state, reason = CtState.INVALID, "not a query"
        return Tracked(state, Direction.ORIGINAL, None, reason, packet, 0, None)

    def _track_error(self, packet: Packet, now: float) -> Tracked:
        quoted = packet.quoted
        assert quoted is not None
        entry = self._table.get(quoted.key)
        if entry is None or packet.destination != quoted.source or now >= entry.expires_at:
            reason = "quotes no tracked flow"
            return Tracked(CtState.INVALID, Direction.ORIGINAL, None, reason, packet, 0, None)
        if entry.key == quoted.key:
            state, direction = CtState.RELATED_REPLY, Direction.REPLY
        else:
            state, direction = CtState.RELATED, Direction.ORIGINAL
        return Tracked(state, direction, entry, "", packet, entry.serial, None)

    def confirm(self, tracked: Tracked, now: float) -> Entry | None:
        """Make the change that the packet stands for; None if the table is full."""
        entry = tracked.entry
        packet = tracked.packet
        if tracked.ctstate in (CtState.INVALID, CtState.UNTRACKED):
            return None
        if entry is None:
            if self._count >= self.limit_count:
                self.counters.refused += 1
                return None
            entry = Entry(packet.key, packet.protocol, now)
            self._table[packet.key] = entry
            self._table[reply_key(packet.key)] = entry
            self._count += 1
            self.counters.inserted += 1
        if tracked.ctstate in (CtState.RELATED, CtState.RELATED_REPLY):
            return entry
        if tracked.direction:
            entry.seen_reply = True
            entry.reply_packets += 1
            entry.reply_bytes += packet.length
        else:
            entry.original_packets += 1
            entry.original_bytes += packet.length
        entry.serial += 1
        if packet.protocol == TCP:
            if packet.tcp_flags & TcpFlag.SYN:
                entry.state = TcpState.SYN_RECV if tracked.direction else TcpState.SYN_SENT
                entry.expires_at = now + 120
            else:
                entry.state = TcpState.ESTABLISHED
                entry.assured = True
                entry.expires_at = now + 7440
        else:
            entry.expires_at = now + (120 if entry.seen_reply else 30)
        return entry

    def find(self, flow: FlowTuple, *, icmp_type: int = 0) -> Entry | None:
        """The entry that packets of this tuple belong to, in either direction."""
        return self._table.get(key_of_tuple(flow, icmp_type=icmp_type))

    def remove(self, entry: Entry) -> None:
        """Forget a flow; its next packet is a first packet."""
        if self._table.get(entry.key) is entry:
            del self._table[entry.key]
            self._table.pop(reply_key(entry.key), None)
            self._count -= 1
            entry.serial = -1

    def expire(self, now: float, *, budget: int = 2000) -> int:
        """Remove dead entries; examines at most `budget` of them."""
        del budget
        dead = [e for e in self.entries() if now >= e.expires_at and not e.offloaded]
        for entry in dead:
            self.remove(entry)
        self.counters.expired += len(dead)
        return len(dead)

    def entries(self) -> Iterator[Entry]:
        """Every entry once."""
        return (entry for key, entry in self._table.items() if key == entry.key)
