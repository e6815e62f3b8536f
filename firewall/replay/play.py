"""Frames through the real pipeline, one row per frame. Pure: frames and a view decide.

Theory of operation. The capture's own time is the clock; it never runs backwards (frames of several
interfaces are not always in order). Each frame loses its link header, fragments are put together,
and the packet goes to `datapath.pipeline.Pipeline`, the same that a worker runs. A `Witness` stands
between pipeline and tracker and remembers what the tracker said, because the pipeline reports only
what is news.

What a capture does not tell, and what is assumed
    - Where a packet arrived. No interface is guarded, so nothing is dropped as spoofed; what comes
      from the node's own address is taken as sent by it, all else as arriving.
    - What the proxy would do. A redirected flow goes to the proxy, and what answers in the
      capture is taken as the proxy's answer: it is shown and tracked, not dropped as forged.
    - Whether checksums are right: captures on the sender hold packets whose checksum its card fills
      in, so none is verified.
    - A packet that was captured twice (an "any" capture of a router) is seen twice.
"""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from conntrack.address import format_address
from conntrack.flow import TCP, FlowTuple, protocol_name
from conntrack.packet import Packet, PacketError, parse, policy_port
from conntrack.tracker import CtState, Entry, Tracked, Tracker
from firewall.datapath.pipeline import OUTPUT, PREROUTING, Pipeline
from firewall.datapath.ruling import Ruling
from firewall.datapath.verdict import (
    ACCEPT,
    Accept,
    Defer,
    Drop,
    Offload,
    PacketDecision,
    PassOn,
    Redirect,
    Reset,
)
from firewall.policy.policymap import DirectionVerdict
from firewall.policy.snapshot import OriginRow
from firewall.policy.verdict import DropReason, TrafficDirection, Verdict
from firewall.policy.view import Decision, View
from firewall.replay.capture import Frame
from firewall.replay.link import open_frame
from firewall.replay.reassembly import Reassembly, Waits

_SECOND_NS: Final = 1_000_000_000
_SWEEP_COUNT: Final = 64  # keys looked at per packet, to forget what is dead
_MAX_PACKET_BYTES: Final = 65575  # an IPv6 header and the largest payload it can state

_CLASSES: Final = {
    CtState.NEW: "NEW",
    CtState.ESTABLISHED: "ESTABLISHED",
    CtState.REPLY: "REPLY",
    CtState.RELATED: "RELATED",
    CtState.RELATED_REPLY: "RELATED",
    CtState.INVALID: "INVALID",
    CtState.UNTRACKED: "UNTRACKED",
}


class Row(NamedTuple):
    """What became of one frame.

    Attributes:
        number: of the frame in the capture.
        time_ns: nanoseconds since the epoch.
        source: `address:port`, `[address]:port`, or an address; "" if there is no packet.
        destination: as `source`.
        protocol: `tcp`, `udp`, ...; "" if there is no packet.
        conntrack: NEW, ESTABLISHED, REPLY, RELATED, INVALID, UNTRACKED; "" if there is no packet.
        state: state of the TCP flow (or SCTP association) after the packet; "" if it has none.
        verdict: accept, drop or redirect; "" if there is nothing to decide.
        reason: the `DropReason` of a drop; "policy", "established" or "related" of what passes.
        detail: what the reason alone does not say.
        direction: "ingress" or "egress", the side of policy that decided; "" = none.
        rules: the rules that decided, `kind namespace/name file:line`.
    """

    number: int
    time_ns: int
    source: str
    destination: str
    protocol: str
    conntrack: str
    state: str
    verdict: str
    reason: str
    detail: str
    direction: str
    rules: tuple[str, ...]


class Witness(Tracker):
    """A tracker that remembers its latest answer; `entry` is the packet's once it is confirmed."""

    latest: Tracked | None = None
    entry: Entry | None = None
    is_confirmed = False

    def forget(self) -> None:
        """Begin another packet."""
        self.latest, self.entry, self.is_confirmed = None, None, False

    def track(self, packet: Packet, now: float) -> Tracked:
        """As `Tracker.track`."""
        self.latest = super().track(packet, now)
        self.entry = self.latest.entry
        return self.latest

    def track_first(self, packet: Packet, now: float, replaces: Entry | None = None) -> Tracked:
        """As `Tracker.track_first`."""
        self.latest = super().track_first(packet, now, replaces)
        self.entry = self.latest.entry
        return self.latest

    def proceed(self, _entry: Entry, _packet: Packet, _now: float) -> bool:
        """Decline, so that `track` is asked, whose answer can be remembered."""
        return False

    def confirm(self, tracked: Tracked, now: float) -> Entry | None:
        """As `Tracker.confirm`."""
        self.is_confirmed = True
        self.entry = super().confirm(tracked, now)
        return self.entry


class Replay:
    """One capture against one view.

    Args:
        view: what policy says.
        witness: the tracker, with the profile that is wanted.
    """

    def __init__(self, view: View, witness: Witness) -> None:
        self._pipeline = Pipeline(witness, view)
        self._witness = witness
        self._own = frozenset(view.snapshot.settings.local_addresses)
        self._reassembly = Reassembly()
        self._began_ns: int | None = None
        self._now = 0.0

    def rows(self, frames: Iterable[Frame]) -> Iterator[Row]:
        """Yield one row per frame, as soon as it is decided; errors of `frames` pass through."""
        for frame in frames:
            yield self._play(frame)

    def _play(self, frame: Frame) -> Row:
        if self._began_ns is None:
            self._began_ns = frame.time_ns
        # Relative, because a float holds nanoseconds of a day but not of the epoch.
        self._now = max(self._now, (frame.time_ns - self._began_ns) / _SECOND_NS)
        data, cut, missing = open_frame(frame)
        if missing:
            return _nothing(frame, missing)
        whole = self._reassembly.add(data + bytes(min(cut, _MAX_PACKET_BYTES)), self._now)
        if isinstance(whole, Waits):
            return _nothing(frame, whole.why, verdict="drop" if whole.lost else "")
        if cut and whole[: len(data)] == data:
            whole = data  # not made of fragments: the bytes that are missing are not needed
        return self._decide(frame, whole, complete=not cut)

    def _decide(self, frame: Frame, data: bytes, *, complete: bool) -> Row:
        witness, now = self._witness, self._now
        witness.forget()
        try:
            packet = parse(data, complete=complete)
        except PacketError:
            packet = None
        hook = OUTPUT if packet is not None and self._from_node(packet) else PREROUTING
        decision = self._pipeline.decide(data, 0, hook, now, complete)
        if packet is not None:
            passes = not isinstance(_final(decision), Drop)
            if witness.latest is None:
                witness.track(packet, now)  # the pipeline had no need to ask
            elif passes and not witness.is_confirmed and witness.entry is not None:
                witness.confirm(witness.latest, now)  # the proxy's side of a redirected flow
        row = _row(frame, packet, decision, witness)
        witness.expire(now, budget=_SWEEP_COUNT)
        return row

    def _from_node(self, packet: Packet) -> bool:
        """Whether this node sends the packet: from its address, or the proxy in a server's name."""
        if packet.source in self._own:
            return True
        if packet.protocol != TCP:
            return False
        entry = self._witness.find(
            FlowTuple(
                packet.source, packet.destination, TCP, packet.source_port, packet.destination_port
            )
        )
        if entry is None or packet.key == entry.key:
            return False
        if Tracker.track(self._witness, packet, self._now).ctstate is not CtState.REPLY:
            return False  # not what the proxy's kernel would send
        ruling = entry.decision
        return isinstance(ruling, Ruling) and isinstance(ruling.verdict, Redirect)


def _final(decision: PacketDecision) -> Accept | Drop | Redirect:
    verdict = decision.verdict
    if isinstance(verdict, Offload | Defer):
        return ACCEPT  # neither comes here: this pipeline may do neither
    if isinstance(verdict, Reset):
        return verdict.drop
    return verdict.otherwise if isinstance(verdict, PassOn) else verdict


def _nothing(frame: Frame, why: str, verdict: str = "") -> Row:
    """A frame without a packet that could be decided."""
    reason = "IP_FRAGMENTATION_NOT_SUPPORTED" if verdict else ""
    return Row(frame.number, frame.time_ns, "", "", "", "", "", verdict, reason, why, "", ())


def _row(frame: Frame, packet: Packet | None, decision: PacketDecision, witness: Witness) -> Row:
    verdict = _final(decision)
    entry = witness.entry
    tracked = witness.latest
    ctstate = CtState.INVALID if tracked is None else tracked.ctstate
    policy = decision.report.decision if decision.report is not None else None
    if policy is None and entry is not None and isinstance(entry.decision, Ruling):
        policy = entry.decision.decision
    dropped = isinstance(verdict, Drop)
    if ctstate is CtState.INVALID and policy is not None and policy.verdict is not Verdict.DROP:
        policy = None  # the tracker refused it: the rules of its flow are not to blame
    source, destination = ("", "")
    if packet is not None:
        source = _end(packet.source, packet.source_port)
        destination = _end(packet.destination, packet.destination_port)
    elif decision.report is not None:
        source = _end(decision.report.source, 0)
        destination = _end(decision.report.destination, 0)
    return Row(
        number=frame.number,
        time_ns=frame.time_ns,
        source=source,
        destination=destination,
        protocol=_protocol(packet),
        conntrack=_CLASSES[ctstate],
        state=entry.state_name if entry is not None else "",
        verdict={Drop: "drop", Redirect: "redirect"}.get(type(verdict), "accept"),
        reason=verdict.reason.name if isinstance(verdict, Drop) else _why_it_passes(ctstate),
        detail=verdict.detail or _blame(verdict, policy)
        if isinstance(verdict, Drop)
        else _remark(tracked, policy),
        direction=_direction(policy),
        rules=tuple(map(_place, _rules(policy, dropped=dropped))),
    )


def _why_it_passes(ctstate: CtState) -> str:
    match ctstate:
        case CtState.NEW:
            return "policy"
        case CtState.ESTABLISHED | CtState.REPLY:
            return "established"
        case CtState.RELATED | CtState.RELATED_REPLY:
            return "related"
        case _:
            return "discovery" if ctstate == CtState.UNTRACKED else "exempt"


def _blame(drop: Drop, policy: Decision | None) -> str:
    """What the reason of policy's drop does not say."""
    if drop.reason is not DropReason.POLICY_DENIED or policy is None:
        return ""
    return f"no {_direction(policy)} rule allows it"


def _remark(tracked: Tracked | None, policy: Decision | None) -> str:
    """What is unusual about a packet that passes."""
    if policy is not None and policy.audited:
        return "audit mode lets it pass"
    return tracked.reason if tracked is not None else ""


def _protocol(packet: Packet | None) -> str:
    if packet is None:
        return ""
    name = protocol_name(packet.protocol)
    return f"{name} type {policy_port(packet)}" if packet.icmp_type >= 0 else name


def _end(address: bytes, port: int) -> str:
    if not address:
        return ""
    text = format_address(address)
    if not port:
        return text
    return f"[{text}]:{port}" if len(address) == 16 else f"{text}:{port}"


def _direction(policy: Decision | None) -> str:
    if policy is None or policy.direction is None:
        return ""
    return policy.direction.name.lower()


def _rules(policy: Decision | None, *, dropped: bool) -> tuple[OriginRow, ...]:
    """The rules that decided: that allow; of a drop those that deny, or else isolate."""
    if policy is None:
        return ()
    if dropped or policy.audited:
        egress = policy.direction is TrafficDirection.EGRESS
        side = policy.egress if egress else policy.ingress
        return () if side is None else side.denied_by or side.isolated_by
    sides: list[DirectionVerdict] = [s for s in (policy.egress, policy.ingress) if s is not None]
    return tuple(dict.fromkeys(origin for side in sides for origin in side.allowed_by))


def _place(origin: OriginRow) -> str:
    name = f"{origin.namespace}/{origin.name}" if origin.namespace else origin.name
    where = f"{origin.file}:{origin.line}" if origin.line else origin.path
    return f"{origin.kind} {name} {where}".rstrip()
