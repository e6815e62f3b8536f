"""One packet's way from bytes to verdict. Pure: bytes, snapshot, tracker and `now` decide.

Theory of operation. The stages, each of which may end the way:

    parse         bytes that are no packet are dropped, by the table FAULT_REASON
    admission     spoofed sources are dropped; neighbour discovery passes without policy
    track         what is the packet to the flows that are known? (changes nothing yet)
    known flow    its cached ruling, or, if the snapshot has changed since, a new one on the tuple
                  of its first packet. Replies and ICMP errors need no policy of their own
    first packet  policy is asked; accept and redirect confirm the entry, a drop leaves none
    misfit        dropped, except what path MTU discovery and the proxy need

A ruling is policy's decision turned into a packet verdict; the tracker's entry carries it with the
revision by which it was made. So a packet of an accepted flow costs one parse, one look-up and one
comparison, and a permission that is gone stops the flow's next packet.

Redirected flows. The worker sees their first packet; what follows goes straight to the proxy's
socket and is not queued, nor is what the proxy sends. So the tracker cannot follow such a flow, and
its opinion on packets that still come is not asked: those of the originator go to the proxy, whose
kernel answers with RST if there is no socket; packets from the other side are forged, since the
server never saw this tuple; only our own kernel may answer (that RST).

Severed flows. A connection that passed directly when L7 rules came to apply to it has ends that
know nothing of a proxy. Its next packet, from either side, is answered with RST to both
(`settings.resets`), and so is what may still come, until its originator begins anew.

Offloaded flows (`offload`). The tracker does not compare the numbers of a flow that the kernel
carries, since it has not seen them all; what the kernel's own tracker calls INVALID of such a flow
is therefore dropped, and where it must be asked for more, a doubt is noted (`doubts`). The same
holds for a flow that was taken over from a dead worker, until its next packet.

`decide` is total: every input has a decision. An exception is a bug, and the worker's to answer.
"""

from collections import Counter
from enum import IntEnum
from typing import Final, NamedTuple

from conntrack.flow import ICMPV6, TCP, Direction
from conntrack.icmp_errors import UNSEEN
from conntrack.packet import Fault, Packet, PacketError, TcpFlag, parse, policy_port
from conntrack.tracker import CtState, Entry, Tracked, Tracker
from firewall.datapath.admission import DISCOVERY
from firewall.datapath.doubts import Cause, Doubts
from firewall.datapath.offload import Offloaded, is_unusual
from firewall.datapath.reset import resets
from firewall.datapath.ruling import Ground, Ruling
from firewall.datapath.verdict import (
    ACCEPT,
    DEFERRING,
    OFFLOAD,
    OFFLOADING,
    QUIETLY,
    Drop,
    PacketDecision,
    PacketVerdict,
    PassOn,
    Redirect,
    Report,
    Reset,
)
from firewall.identities.reserved import Reserved
from firewall.policy.verdict import DropReason
from firewall.policy.view import Decision, View

SETTLED: Final = -1  # PREROUTING behind the nat table, where destinations are final; ours alone
PREROUTING: Final = 0  # NF_INET_PRE_ROUTING, linux/netfilter.h
FORWARD: Final = 2  # NF_INET_FORWARD; INPUT is 1
OUTPUT: Final = 3  # NF_INET_LOCAL_OUT; POSTROUTING is 4
_STEERABLE: Final = frozenset({SETTLED, PREROUTING, OUTPUT})
"""Hooks from which a packet can still go to the proxy."""

FAULT_REASON: Final = {
    Fault.TRUNCATED: DropReason.CT_TRUNCATED_OR_INVALID_HEADER,
    Fault.BAD_VERSION: DropReason.UNSUPPORTED_L3_PROTOCOL,
    Fault.BAD_HEADER_LENGTH: DropReason.CT_TRUNCATED_OR_INVALID_HEADER,
    Fault.BAD_LENGTH: DropReason.INVALID_PACKET_DROPPED,
    Fault.BAD_OPTION: DropReason.INVALID_PACKET_DROPPED,
    Fault.FRAGMENT: DropReason.IP_FRAGMENTATION_NOT_SUPPORTED,  # reassembly refused or failed
    Fault.NO_TRANSPORT: DropReason.UNKNOWN_L4_PROTOCOL,
    Fault.WRONG_FAMILY: DropReason.UNKNOWN_L4_PROTOCOL,
    Fault.BAD_CHECKSUM: DropReason.INVALID_PACKET_DROPPED,
    Fault.UNKNOWN_L4: DropReason.CT_UNKNOWN_L4_PROTOCOL,
}
"""What bytes that are no packet are dropped with."""

_NOT_READY: Final = Drop(DropReason.DROP_EP_NOT_READY, "no snapshot has been loaded")
_BESIDE_PROXY: Final = Drop(
    DropReason.INVALID_PACKET_DROPPED, "answers a flow that only the proxy has seen"
)
_UNSEEN: Final = Drop(
    DropReason.INVALID_PACKET_DROPPED, "does not fit what the kernel has seen of its flow"
)
_TRANSLATED: Final = Drop(
    DropReason.PROXY_REDIRECTION_NOT_SUPPORTED_FOR_PROTOCOL,
    "translated, or switched by a bridge: where it is seen now, no proxy can have it",
)
_BRIDGED: Final = Drop(
    DropReason.PROXY_REDIRECTION_NOT_SUPPORTED_FOR_PROTOCOL,
    "came through a bridge, from which no proxy can have it",
)
_TABLE_FULL: Final = Drop(DropReason.CT_MAP_INSERTION_FAILED, "the table of flows is full")
_OLDER: Final = Drop(
    DropReason.PROXY_REDIRECTION_NOT_SUPPORTED_FOR_PROTOCOL,
    "the connection is older than the L7 rules for it, and is reset",
)
_INVALID: Final = CtState.INVALID  # a member of an enum costs 70 ns on CPython 3.11, a global 5
_NEW: Final = CtState.NEW
_REPLY: Final = Direction.REPLY
_new: Final = tuple.__new__  # builds a NamedTuple in a third of the time of calling its class
_FLAG_MASK: Final = int(TcpFlag.SYN | TcpFlag.RST | TcpFlag.ACK)
_FIN: Final = int(TcpFlag.FIN)
_RST: Final = int(TcpFlag.RST)
_ENDING: Final = _FIN | _RST


class Resets(IntEnum):
    """Which established TCP connections end by RST when their packets may no longer pass."""

    NONE = 0
    """None: their packets are dropped, and the ends find out by time."""
    L7 = 1
    """Those that L7 rules have come to apply to: they passed directly, and no proxy knows them."""
    ALL = 2
    """Those that lost their permission too."""


class PipelineSettings(NamedTuple):
    """What a worker knows about itself.

    Attributes:
        worker_count: how many workers share the traffic; an ICMP error may belong to another's
            flow, if there are others.
        bypass: the kernel may carry flows that need no look.
        defers: packets come again after the routing decision, if they are deferred (NAT).
        resets: which connections end by RST.
    """

    worker_count: int = 1
    bypass: bool = False
    defers: bool = False
    resets: Resets = Resets.L7


ALONE: Final = PipelineSettings()
"""One worker has all the traffic."""


class Counts:
    """What the pipeline did since the worker began.

    Attributes:
        forwarded_count: packets accepted.
        forwarded_bytes: their IP lengths summed.
        redirected_count: packets sent to the proxy.
        passed_on_count: packets sent to the next worker.
        ruled_anew_count: flows whose ruling was made again after a change of the snapshot.
        reset_count: packets among them that were answered with RST.
        dropped: packets by reason.
    """

    __slots__ = (
        "dropped",
        "forwarded_bytes",
        "forwarded_count",
        "passed_on_count",
        "redirected_count",
        "reset_count",
        "ruled_anew_count",
    )

    def __init__(self) -> None:
        self.forwarded_count = 0
        self.forwarded_bytes = 0
        self.redirected_count = 0
        self.reset_count = 0
        self.passed_on_count = 0
        self.ruled_anew_count = 0
        self.dropped: Counter[DropReason] = Counter()


class Arrival(NamedTuple):
    """A packet, where it came from, and the source address that policy is asked with."""

    packet: Packet
    source: bytes
    interface_index: int
    hook: int


class Pipeline:
    """Decides packets by one tracker and one snapshot at a time.

    Attributes:
        tracker: the flows.
        settings: what this worker is.
        counts: what was done.
        offloaded: the flows that the kernel carries.
        doubts: flows that the kernel is to be asked about.
    """

    def __init__(
        self, tracker: Tracker, view: View | None, settings: PipelineSettings = ALONE
    ) -> None:
        self.tracker = tracker
        self.settings = settings
        self.counts = Counts()
        self.offloaded = Offloaded(tracker)
        self.doubts = Doubts(tracker)
        self.view = view

    @property
    def view(self) -> View | None:
        """The snapshot by which packets are decided; assigning another one applies at once.

        None: there is none yet, and every packet is dropped (DROP_EP_NOT_READY).
        """
        return self._ground.view if self._ground is not None else None

    @view.setter
    def view(self, view: View | None) -> None:
        bypass = self.settings.bypass
        self._ground = Ground(view, bypass=bypass) if view is not None else None

    def decide(  # noqa: PLR0917 -- once per packet: keywords cost
        self,
        payload: bytes,
        interface_index: int,
        hook: int,
        now: float,
        complete: bool = True,
        suspect: bool = False,
    ) -> PacketDecision:
        """Decide one packet and note it in the tracker if it may pass.

        Args:
            payload: the packet from its IP header on, perhaps only its head.
            interface_index: where it arrived; 0 = sent by this node.
            hook: PREROUTING or OUTPUT; of translated flows also SETTLED, or FORWARD, INPUT,
                POSTROUTING where there is no such place (`translated`).
            now: monotonic seconds.
            complete: False if `payload` was cut.
            suspect: the kernel's tracker calls it INVALID.
        """
        ground = self._ground
        try:
            packet = parse(payload, complete=complete)
        except PacketError as error:
            return self._unreadable(payload, error.fault, interface_index)
        source = packet.source
        if ground is None:
            return self._drop(_NOT_READY, Arrival(packet, source, interface_index, hook))
        if packet.protocol == ICMPV6 and packet.icmp_type in DISCOVERY:
            return self._link_message(ground, Arrival(packet, source, interface_index, hook))
        if hook <= FORWARD and ground.homes.get(source) != interface_index:
            source, refused = ground.admission.check(packet, interface_index)
            if refused is not None:
                return self._drop(refused, Arrival(packet, source, interface_index, hook))
        tracker = self.tracker
        entry = tracker.entry_of(packet)
        if (
            entry is not None
            and entry.revision == ground.revision
            and not entry.offloaded
            and not ((suspect or packet.tcp_flags & _ENDING) and entry.numbers_unknown)
        ):
            ruling = entry.decision
            if (
                isinstance(ruling, Ruling)
                and ruling.verdict is ACCEPT
                and tracker.proceed(entry, packet, now)
            ):
                counts = self.counts
                counts.forwarded_count += 1
                counts.forwarded_bytes += packet.length
                if ruling.bypass and not suspect and self.offloaded.wants(entry):
                    self.offloaded.give(entry, now)
                    return OFFLOADING
                return QUIETLY
        arrival = _new(Arrival, (packet, source, interface_index, hook))
        known = entry is not None
        tracked = tracker.track(packet, now) if known else tracker.track_first(packet, now)
        entry = tracked.entry
        if entry is not None:
            return self._known_flow(ground, tracked, entry, arrival, now, suspect)
        if tracked.ctstate is _NEW:
            return self._first_packet(ground, tracked, arrival, now)
        return self._misfit(ground, tracked, arrival)

    def admit(
        self, payload: bytes, interface_index: int, *, complete: bool = True
    ) -> PacketDecision:
        """Say whether a packet may bear its source; nothing else of it is asked.

        For what belongs to a socket of the proxy: the tracker does not know its flows.
        """
        ground = self._ground
        try:
            packet = parse(payload, complete=complete)
        except PacketError as error:
            return self._unreadable(payload, error.fault, interface_index)
        arrival = Arrival(packet, packet.source, interface_index, PREROUTING)
        if ground is None:
            return self._drop(_NOT_READY, arrival)
        refused = ground.admission.check(packet, interface_index).refused
        return self._forward(packet) if refused is None else self._drop(refused, arrival)

    # --- packets without a flow ---------------------------------------------------------------

    def _unreadable(self, payload: bytes, fault: Fault, interface_index: int) -> PacketDecision:
        """Drop bytes that are no packet; say who sent them, where the header is there to tell."""
        drop = Drop(FAULT_REASON[fault], fault.name.lower().replace("_", " "))
        self.counts.dropped[drop.reason] += 1
        source, destination = _addresses(payload)
        return PacketDecision(drop, Report(drop, None, source, destination, interface_index))

    def _link_message(self, ground: Ground, arrival: Arrival) -> PacketDecision:
        """Judge neighbour and listener discovery; it opens no flow and is not reported."""
        refused = ground.admission.discovery(arrival.packet, arrival.interface_index)
        if refused is not None:
            return self._drop(refused, arrival)
        return self._forward(arrival.packet)

    def _misfit(self, ground: Ground, tracked: Tracked, arrival: Arrival) -> PacketDecision:
        """Answer a packet that belongs to no flow and may open none."""
        packet = arrival.packet
        drop = Drop(DropReason.INVALID_PACKET_DROPPED, tracked.reason)
        if packet.quoted is not None:
            unseen = tracked.reason == UNSEEN  # it is about a flow of this worker
            passes = ground.path_mtu_allowed and _is_path_mtu_message(packet)
            # What our own kernel reports, as a router, is about a packet that it had in its hands.
            passes = passes or (arrival.hook == OUTPUT and (unseen or _node_may(ground, arrival)))
            if self.settings.worker_count > 1 and not unseen:
                self.counts.passed_on_count += 1
                report = None if passes else _report(drop, arrival, tracked, None)
                return PacketDecision(PassOn(ACCEPT if passes else drop), report)
            if passes:
                return self._forward(packet)
            quoted = self.tracker.entry_quoted(packet) if unseen else None
            if quoted is not None and quoted.offloaded:
                self.doubts.note(quoted, Cause.QUOTED)
        elif packet.protocol == TCP:
            flags = packet.tcp_flags & _FLAG_MASK
            # Our kernel's answer to a segment that was sent to the proxy in vain.
            ours = arrival.hook == OUTPUT and flags & TcpFlag.RST
            if ours and ground.proxies(packet.destination, arrival.source, packet.source_port):
                return self._forward(packet)
            if not packet.tcp_flags & TcpFlag.SYN and _node_may(ground, arrival):
                return self._forward(packet)
        return self._drop(drop, arrival, tracked)

    # --- flows --------------------------------------------------------------------------------

    def _first_packet(
        self, ground: Ground, tracked: Tracked, arrival: Arrival, now: float
    ) -> PacketDecision:
        """Ask policy about a new flow, and begin to track it if it may be."""
        packet = arrival.packet
        port = policy_port(packet)
        ruling = ground.rule(arrival.source, packet.destination, packet.protocol, port)
        if isinstance(ruling.verdict, Drop):
            if self.settings.defers and _may_be_translated(ground, arrival):
                return DEFERRING
            return self._drop(ruling.verdict, arrival, tracked, ruling.decision)
        if isinstance(ruling.verdict, Redirect) and arrival.hook not in _STEERABLE:
            return self._drop(_TRANSLATED, arrival, tracked, ruling.decision)
        entry = self.tracker.confirm(tracked, now)
        if entry is None:
            return self._drop(_TABLE_FULL, arrival, tracked, ruling.decision)
        entry.decision = ruling
        entry.revision = ground.revision
        answer = self._carry_out(ground, ruling, packet)
        report = _report(answer.verdict, arrival, tracked, ruling.decision)
        return _new(PacketDecision, (answer.verdict, report))

    def _known_flow(  # noqa: PLR0917
        self,
        ground: Ground,
        tracked: Tracked,
        entry: Entry,
        arrival: Arrival,
        now: float,
        suspect: bool,
    ) -> PacketDecision:
        """Apply the flow's ruling, made anew if the snapshot has changed."""
        before = entry.decision
        ruling, anew = ground.ruling_of(entry)
        self.counts.ruled_anew_count += anew
        unknown = entry.numbers_unknown
        suspect = suspect and unknown
        answer = self._ruled(ground, tracked, entry, arrival, now, before, ruling, suspect)
        packet, offloaded = arrival.packet, self.offloaded
        if unknown and packet.tcp_flags & _ENDING and answer.verdict is ACCEPT:
            cause = Cause.RESET if packet.tcp_flags & _RST else Cause.FIN
            self.doubts.note(entry, cause)
        if entry.offloaded:
            if not ruling.bypass or (packet.protocol == TCP and is_unusual(packet.tcp_flags)):
                passed = answer.verdict is ACCEPT
                offloaded.take_back(entry, learnt=passed and bool(packet.tcp_flags & _FIN))
                return answer
            # After a change of the generation the flow's first packet marks it again.
            wanted = anew or offloaded.wants(entry)
        else:
            wanted = ruling.bypass and offloaded.wants(entry)
        if wanted and answer.verdict is ACCEPT:
            offloaded.give(entry, now)
            return PacketDecision(OFFLOAD, answer.report)
        return answer

    def _ruled(  # noqa: PLR0917
        self,
        ground: Ground,
        tracked: Tracked,
        entry: Entry,
        arrival: Arrival,
        now: float,
        before: object | None,
        ruling: Ruling,
        suspect: bool,
    ) -> PacketDecision:
        """Carry out a known flow's ruling for one packet; it was `before` until now."""
        if isinstance(before, Ruling) and self._severs(before, ruling, arrival):
            if _begins(arrival.packet) and before.severed:
                entry.decision = ruling._replace(severed=False)
            else:
                entry.decision = ruling._replace(severed=True)
                return self._reset(ruling, arrival, tracked)
        refused = _refused(ruling, tracked, entry, arrival)
        if refused is None and suspect:
            refused = _UNSEEN
        if refused is not None:
            return self._drop(refused, arrival, tracked, ruling.decision)
        if isinstance(ruling.verdict, Redirect) and arrival.packet.key != entry.key:
            return self._forward(arrival.packet)
        # The tracker cannot follow a redirected flow, but its entry shall live while it is used.
        self.tracker.confirm(tracked, now)
        answer = self._carry_out(ground, ruling, arrival.packet)
        if isinstance(before, Ruling) and (before.verdict != ruling.verdict or before.severed):
            report = _report(answer.verdict, arrival, tracked, ruling.decision)
            return PacketDecision(answer.verdict, report)
        return answer

    def _severs(self, before: Ruling, ruling: Ruling, arrival: Arrival) -> bool:
        """Say whether a packet belongs to a connection that passed until a ruling changed."""
        if arrival.packet.protocol != TCP or arrival.hook not in _STEERABLE:
            return False
        return self._resets(ruling) and (before.verdict is ACCEPT or before.severed)

    def _resets(self, ruling: Ruling) -> bool:
        """Say whether connections that passed until this ruling end by RST."""
        least = Resets.L7 if isinstance(ruling.verdict, Redirect) else Resets.ALL
        return ruling.verdict is not ACCEPT and self.settings.resets >= least

    def sever(self, entry: Entry) -> bool:
        """Say whether a TCP flow passed directly and may no longer, so that it ends by RST.

        Its next packet, whatever that is, is answered so. Other flows stay as they are.
        """
        ground, before, revision = self._ground, entry.decision, entry.revision
        if ground is None or entry.protocol != TCP or not isinstance(before, Ruling):
            return False
        if before.severed or before.verdict is not ACCEPT:
            return before.severed
        ruling, _ = ground.ruling_of(entry)
        severed = self._resets(ruling)
        if severed:
            entry.decision = ruling._replace(severed=True)
        else:
            entry.decision, entry.revision = before, revision  # its next packet tells what changed
        return severed

    # --- answers ------------------------------------------------------------------------------

    def _carry_out(self, ground: Ground, ruling: Ruling, packet: Packet) -> PacketDecision:
        """Let a packet go on, directly or to the proxy."""
        return self._forward(packet) if ruling.verdict is ACCEPT else self._redirect(ground)

    def _forward(self, packet: Packet) -> PacketDecision:
        self.counts.forwarded_count += 1
        self.counts.forwarded_bytes += packet.length
        return QUIETLY

    def beyond_proxy(self, report: Report | None) -> PacketDecision:
        """Drop what should be redirected, where TPROXY has no effect; `report`: as decided."""
        self.counts.redirected_count -= 1
        self.counts.dropped[_BRIDGED.reason] += 1
        return PacketDecision(
            _BRIDGED, None if report is None else report._replace(verdict=_BRIDGED)
        )

    def _redirect(self, ground: Ground) -> PacketDecision:
        self.counts.redirected_count += 1
        return PacketDecision(Redirect(ground.proxy_port), None)

    def _reset(self, ruling: Ruling, arrival: Arrival, tracked: Tracked) -> PacketDecision:
        """Stop a packet of a severed connection, and tell both ends."""
        drop = ruling.verdict if isinstance(ruling.verdict, Drop) else _OLDER
        self.counts.dropped[drop.reason] += 1
        self.counts.reset_count += 1
        report = _report(drop, arrival, tracked, ruling.decision)
        return PacketDecision(Reset(drop, resets(arrival.packet)), report)

    def _drop(
        self,
        drop: Drop,
        arrival: Arrival,
        tracked: Tracked | None = None,
        decision: Decision | None = None,
    ) -> PacketDecision:
        self.counts.dropped[drop.reason] += 1
        return PacketDecision(drop, _report(drop, arrival, tracked, decision))


def _begins(packet: Packet) -> bool:
    """Say whether a TCP packet is the first of a connection."""
    return packet.tcp_flags & _FLAG_MASK == TcpFlag.SYN


def _refused(ruling: Ruling, tracked: Tracked, entry: Entry, arrival: Arrival) -> Drop | None:
    """Return why a packet of a known flow may not pass, None if it may."""
    verdict = ruling.verdict
    if isinstance(verdict, Drop):
        return verdict  # also for what does not fit: the lost permission is what matters
    misfit = tracked.ctstate is _INVALID
    if isinstance(verdict, Redirect):
        if arrival.hook not in _STEERABLE:
            return _TRANSLATED
        if arrival.packet.key == entry.key or arrival.hook == OUTPUT:
            return None
        if not misfit:
            return _BESIDE_PROXY
    return Drop(DropReason.INVALID_PACKET_DROPPED, tracked.reason) if misfit else None


def _may_be_translated(ground: Ground, arrival: Arrival) -> bool:
    """Say whether the nat table may give a first packet another destination yet."""
    there = ground.view.endpoint_at(arrival.packet.destination)
    # The node's own address often stands for others: forwarded ports.
    fixed = there is not None and there.identity != Reserved.HOST
    return arrival.hook == PREROUTING and not fixed


def _report(
    verdict: PacketVerdict, arrival: Arrival, tracked: Tracked | None, decision: Decision | None
) -> Report:
    packet = arrival.packet
    ctstate = tracked.ctstate if tracked is not None else None
    reply: bool | None = None
    if tracked is not None and (tracked.entry is not None or ctstate is _NEW):
        reply = tracked.direction is _REPLY
    source, destination = packet.source, packet.destination
    place = arrival.interface_index
    return _new(Report, (verdict, packet, source, destination, place, ctstate, reply, decision))


def _node_may(ground: Ground, arrival: Arrival) -> bool:
    """Say whether policy allows what belongs to no known flow and concerns only this node.

    The node's own connections are older than we are, a remote login among them, and it reports
    errors about flows that nobody here manages: policy alone decides, as it does in Cilium.
    """
    packet = arrival.packet
    if not ground.is_node_alone(arrival.source, packet.destination):
        return False
    port = policy_port(packet)
    return ground.rule(arrival.source, packet.destination, packet.protocol, port).verdict is ACCEPT


def _is_path_mtu_message(packet: Packet) -> bool:
    """Say whether a packet is a router's word on the path MTU, sent to whom it quotes.

    RFC 1191 section 4: ICMP 3/4; RFC 4443 section 3.2: ICMPv6 2.
    """
    quoted = packet.quoted
    if quoted is None or quoted.source != packet.destination:
        return False
    if packet.version == 4:
        return (packet.icmp_type, packet.icmp_code) == (3, 4)
    return packet.icmp_type == 2


def _addresses(payload: bytes) -> tuple[bytes, bytes]:
    """Return source and destination of a header that may be cut; empty where they are not there."""
    version = payload[0] >> 4 if payload else 0
    if version == 4 and len(payload) >= 20:
        return payload[12:16], payload[16:20]
    if version == 6 and len(payload) >= 40:
        return payload[8:24], payload[24:40]
    return b"", b""
