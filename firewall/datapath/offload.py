"""Which flows the kernel carries past the worker, and how long they live. Pure.

Theory of operation. A flow that is established, accepted without L7 rules and without audit, is
offloaded: its next packet is marked, the mark becomes the flow's connmark, and the kernel accepts
what follows (`ruleset`, the bypass). The worker keeps the entry, or a reply would look like a new
flow; but it does not see the packets, so it cannot know when the flow falls silent. The kernel
does. Its table is dumped from time to time, and each offloaded flow that is found there learns the
kernel's expiry and counters. A flow that is not found is the worker's own again, with the expiry
that the kernel gave last: if silence has ended it, that time is over; if somebody deleted the
kernel's entry (`conntrack -F`), or the kernel never carried the flow (NOTRACK), it goes on.

Packets of an offloaded flow that come to the queue all the same are those that waited while the
mark was set; SYN, FIN and RST, with which the worker takes the flow back, as the rules have done;
and everything, once, after a change of the generation. If more than a few others come, the mark was
not saved, and is tried again now and then. A flow that is brought back to be looked at (`doubts`)
is not given again before it has been.
"""

from typing import Final

from conntrack.flow import SCTP, TCP
from conntrack.packet import TcpFlag
from conntrack.tcp_states import TcpState
from conntrack.tracker import Entry, Tracker
from firewall.datapath.ctnetlink import KernelFlow

AFTER_COUNT: Final = 16
"""Packets of a flow that are looked at before it is offloaded. A request on a connection of its own
takes about ten; to mark it before its end costs a third of what the worker does for it (bench
exchanges)."""

AGAIN_COUNT: Final = 64
"""Packets of an offloaded flow that come all the same before it is marked again: a queue's worth
may have waited when it was marked."""

LONGEST_PAUSE_S: Final = 10.0
"""Between two dumps; a silent flow outlives the kernel's entry by this at most."""

SHORTEST_PAUSE_S: Final = 1.0
"""Between two dumps, when a flow is about to end; the kernel's timeouts are whole seconds."""

_PAUSE_PER_DUMP: Final = 20.0  # a dump that takes long is made seldom: 5 % of the worker's time
_UNUSUAL: Final = int(TcpFlag.SYN | TcpFlag.FIN | TcpFlag.RST)
_ESTABLISHED: Final = int(TcpState.ESTABLISHED)


class Offloaded:
    """The flows of one tracker that the kernel carries.

    Attributes:
        next_dump_at: monotonic seconds at which the kernel is to be asked again.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._seen: dict[Entry, float] = {}
        self._kept: dict[Entry, int] = {}  # how many packets of it must have come
        self._began_at = 0.0
        self._pause_s = LONGEST_PAUSE_S
        self.next_dump_at = 0.0

    def __len__(self) -> int:
        return len(self._seen)

    def wants(self, entry: Entry) -> bool:
        """Say whether a flow whose ruling allows it should be marked by the packet at hand.

        The packet has been confirmed already.
        """
        if not entry.seen_reply or entry.protocol == SCTP:
            return False
        count = entry.original_packets + entry.reply_packets
        carried = entry.offloaded
        if count < AFTER_COUNT and not carried:
            return False
        if self._kept and count < self._kept.get(entry, 0):
            return False
        if entry.protocol == TCP and (entry.state != _ESTABLISHED or not entry.assured):
            return False
        return not carried or not count % AGAIN_COUNT

    def give(self, entry: Entry, now: float) -> None:
        """Note that a flow is being offloaded."""
        if not self._seen:
            self.next_dump_at = now + SHORTEST_PAUSE_S
        entry.offloaded = True
        self._seen[entry] = now
        self._kept.pop(entry, None)

    def take_back(self, entry: Entry, *, learnt: bool = False) -> None:
        """Follow a flow here again; its TCP numbers are learnt from what comes next.

        `learnt`: they have been learnt from the packet at hand already.
        """
        if entry.offloaded:
            entry.offloaded = False
            self._seen.pop(entry, None)
            if entry.protocol == TCP and entry.serial >= 0 and not learnt:
                self._tracker.relearn(entry)

    def keep(self, entry: Entry) -> None:
        """Take a flow back, and look at some packets before it is given again."""
        self.take_back(entry)
        self._kept[entry] = entry.original_packets + entry.reply_packets + AFTER_COUNT

    # --- what the kernel says -------------------------------------------------------------------

    def dump_begins(self, now: float) -> None:
        """Expect the kernel's flows from now on."""
        self._began_at = now
        self._pause_s = LONGEST_PAUSE_S

    def found(self, flow: KernelFlow, now: float) -> None:
        """Learn from one of the kernel's flows; those of other workers are nothing to us."""
        entry = self._tracker.find(flow.original, icmp_type=flow.icmp_type)
        if entry is None or entry not in self._seen:
            return
        self._seen[entry] = now
        entry.expires_at = now + flow.timeout_s
        self._pause_s = min(self._pause_s, flow.timeout_s)
        if flow.packets is not None and flow.bytes is not None:
            entry.original_packets, entry.reply_packets = flow.packets
            entry.original_bytes, entry.reply_bytes = flow.bytes

    def dump_ends(self, now: float, *, whole: bool = True) -> None:
        """Take back what was not found; nothing, unless the kernel gave its `whole` answer."""
        if whole:
            lost = [entry for entry, seen_at in self._seen.items() if seen_at < self._began_at]
            for entry in lost:
                self.take_back(entry)
        self._kept = {entry: count for entry, count in self._kept.items() if entry.serial >= 0}
        pause_s = max(self._pause_s, SHORTEST_PAUSE_S, _PAUSE_PER_DUMP * (now - self._began_at))
        self.next_dump_at = now + pause_s


def is_unusual(flags: int) -> bool:
    """Say whether a TCP segment bears SYN, FIN or RST: the rules have taken its flow back."""
    return bool(flags & _UNUSUAL)
