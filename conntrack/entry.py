"""One tracked flow, and what the tracker says about one packet of it.

An `Entry` is the only mutable value of this package; the tracker alone writes it, except for the
three slots at its end that belong to the caller. A `Tracked` is an answer in waiting: it holds the
change that the packet would make, and the change happens in `Tracker.confirm` or never.
"""

from enum import IntEnum
from typing import NamedTuple

from conntrack.chain import Link
from conntrack.flow import SCTP, TCP, Direction, FlowTuple
from conntrack.keys import tuple_of_key
from conntrack.packet import Packet
from conntrack.sctp_states import SctpState
from conntrack.tcp_states import TcpState
from conntrack.tcp_window import Window, pack, unpack


class CtState(IntEnum):
    """How a packet relates to the flows that are known.

    Operations:
        NEW, ESTABLISHED, REPLY, RELATED and RELATED_REPLY may be confirmed; the two RELATED ones
        change nothing when they are.
    Caveats:
        NEW does not mean "no entry yet": until the other side answers, every packet of the
        original direction is NEW, and `Tracked.entry` tells the two apart.
    """

    NEW = 0  # opens a flow, or continues one that nobody has answered
    ESTABLISHED = 1  # original direction of a flow that was answered
    REPLY = 2  # reply direction
    RELATED = 3  # ICMP error about a flow, travelling in its original direction
    RELATED_REPLY = 4  # ICMP error about a flow, travelling to its originator
    INVALID = 5  # belongs to no flow and may open none
    UNTRACKED = 6  # neighbour and multicast listener discovery: has no flow by design


class Entry(Link):
    """A flow that was accepted at least once.

    Attributes:
        key: flow key of the original direction (see `conntrack.packet`).
        protocol: upper-layer protocol number.
        state: `TcpState` or `SctpState` as a number; 0 for protocols without states.
        created_at: monotonic seconds of the first packet.
        expires_at: monotonic seconds from which on the entry is dead, unless offloaded.
        seen_reply: the other side has answered.
        assured: both sides take part; never evicted for a newer flow.
        rank: place in `conntrack.eviction`; -1: kept.
        serial: counts the changes; -1 once the entry has left the table.
        original_packets: packets confirmed, ORIGINAL direction.
        reply_packets: packets confirmed, REPLY direction.
        original_bytes: their IP lengths summed.
        reply_bytes: their IP lengths summed.
        windows: TCP only: what each side has sent and may send; None while unknown or packed.
        packed: the windows as bytes, while nobody needs them; None if they are not packed.
        memory: what the protocol's machine must remember besides; only it knows the meaning.
        decision: the caller's; the tracker never reads it.
        revision: the caller's; the tracker never reads it.
        offloaded: the caller's: the kernel carries the flow. While set, the entry does not expire
            and sequence numbers are not checked, because most packets are not seen here.
    """

    __slots__ = (
        "assured",
        "created_at",
        "decision",
        "expires_at",
        "key",
        "memory",
        "offloaded",
        "original_bytes",
        "original_packets",
        "packed",
        "protocol",
        "rank",
        "reply_bytes",
        "reply_packets",
        "revision",
        "seen_reply",
        "serial",
        "state",
        "windows",
    )

    def __init__(self, key: bytes, protocol: int, now: float) -> None:
        self.older = None
        self.newer = None
        self.key = key
        self.protocol = protocol
        self.rank = -1
        self.state = 0
        self.created_at = now
        self.expires_at = now
        self.seen_reply = False
        self.assured = False
        self.serial = 0
        self.original_packets = 0
        self.reply_packets = 0
        self.original_bytes = 0
        self.reply_bytes = 0
        self.windows: tuple[Window, Window] | None = None
        self.packed: bytes | None = None
        self.memory: tuple[int, ...] | None = None
        self.decision: object | None = None
        self.revision = 0
        self.offloaded = False

    def pack(self) -> None:
        """Keep the windows as bytes until `unpack`: a flow that rests takes half the memory."""
        if self.windows is not None:
            self.packed = pack(self.windows)
            self.windows = None

    def unpack(self) -> None:
        """Make the windows ready for the next segment."""
        if self.packed is not None:
            self.windows = unpack(self.packed)
            self.packed = None

    @property
    def numbers_unknown(self) -> bool:
        """Whether nobody here can say which numbers the flow's next packet must bear.

        So it is while the kernel carries it, and of a flow that was restored or taken back, until
        its next packet.
        """
        if self.offloaded:
            return True
        if self.protocol == TCP:
            return self.windows is None and self.packed is None
        return self.protocol == SCTP and self.memory is None

    @property
    def original(self) -> FlowTuple:
        """The tuple of the packet that opened the flow."""
        return tuple_of_key(self.key)

    @property
    def packets(self) -> tuple[int, int]:
        """Packets confirmed per direction: (original, reply)."""
        return self.original_packets, self.reply_packets

    @property
    def bytes(self) -> tuple[int, int]:
        """IP bytes confirmed per direction: (original, reply)."""
        return self.original_bytes, self.reply_bytes

    @property
    def tcp_state(self) -> TcpState | None:
        """State of a TCP flow; None for other protocols."""
        return TcpState(self.state) if self.protocol == TCP else None

    @property
    def sctp_state(self) -> SctpState | None:
        """State of an SCTP association; None for other protocols."""
        return SctpState(self.state) if self.protocol == SCTP else None

    @property
    def state_name(self) -> str:
        """Name of the protocol's state as the RFC writes it; empty where there are no states."""
        state = self.tcp_state or self.sctp_state
        return state.name if state is not None else ""

    def __repr__(self) -> str:
        marks = " assured" if self.assured else "" if self.seen_reply else " unreplied"
        state = self.state_name
        return f"<Entry {self.original}{' ' if state else ''}{state}{marks}>"


class Update(NamedTuple):
    """The change that one packet makes to its entry.

    Attributes:
        state: the protocol's next state.
        timeout_s: the entry expires that long after the confirmation; negative: as before.
        assured: both sides take part from now on.
        answers: a packet of the REPLY direction that proves the other side takes part.
        windows: TCP windows (original, reply).
        memory: what the protocol's machine remembers.
        closes: the entry leaves the table once the packet is confirmed.
    """

    state: int
    timeout_s: float
    assured: bool
    answers: bool
    windows: tuple[Window, Window] | None
    memory: tuple[int, ...] | None
    closes: bool


class Tracked(NamedTuple):
    """What one packet is, and the change it would make.

    Attributes:
        ctstate: the packet's class.
        direction: of the packet within its flow (for RELATED: of the flow towards its receiver).
        entry: the flow, or None if it has none (yet).
        reason: why the class is what it is; for INVALID the rule that refused it.
        packet: the packet that was tracked.
        serial: the entry's serial when it was tracked; a different one means it has changed since.
        update: the pending change; None if the packet passes without one.
        replaces: the flow that this NEW packet ends by opening its own.
    """

    ctstate: CtState
    direction: Direction
    entry: Entry | None
    reason: str
    packet: Packet
    serial: int
    update: Update | None
    replaces: Entry | None


class Finding(NamedTuple):
    """What a protocol's machine says about an unusual packet.

    For the ordinary packet, which passes and changes its flow, a machine returns its `Update` only.

    Attributes:
        valid: False: INVALID, for `reason`.
        reason: the rule that decided.
        update: the change, None if there is none.
        reopens: the packet is the first of a new flow that takes the place of this one.
    """

    valid: bool
    reason: str
    update: Update | None
    reopens: bool


Judgement = Finding | Update


def invalid(reason: str) -> Finding:
    """A packet that belongs to the flow's tuple but not to the flow."""
    return Finding(False, reason, None, False)


def passes(reason: str, update: Update | None = None) -> Finding:
    """A packet that may pass although it is unusual, with or without a change."""
    return Finding(True, reason, update, False)


REOPENS: Finding = Finding(True, "the port is used again", None, True)
