"""From what the pipeline reports to the event that travels to the agent. Pure."""

from typing import Final

from conntrack.packet import Packet
from firewall.datapath.verdict import Accept, Drop, Redirect, Report
from firewall.flows.event import PacketEvent
from firewall.policy.policymap import DirectionVerdict
from firewall.policy.verdict import PolicyMatch, TrafficDirection, Verdict
from firewall.policy.view import Decision, Peer, View

_UNKNOWN: Final = Peer(0, frozenset(), None)


def packet_event(report: Report, view: View, time_ns: int, payload: bytes = b"") -> PacketEvent:
    """Return the event of one report.

    Args:
        report: what the pipeline said.
        view: the snapshot by which it was decided.
        time_ns: nanoseconds since the epoch, wall clock.
        payload: the packet itself, if somebody wants to see it.
    """
    packet, decision = report.packet, report.decision
    source, destination = _peers(report, view)
    direction = _direction(decision, source, destination)
    side = _deciding_side(decision, direction)
    egress = decision.egress if decision is not None else None
    ingress = decision.ingress if decision is not None else None
    blamed = isinstance(report.verdict, Drop) or (decision is not None and decision.audited)
    return PacketEvent(
        time_ns=time_ns,
        verdict=_verdict(report),
        drop_reason=report.verdict.reason if isinstance(report.verdict, Drop) else 0,
        direction=direction,
        source=report.source,
        destination=report.destination,
        **_header(packet),
        source_identity=source.identity,
        destination_identity=destination.identity,
        source_endpoint=source.endpoint.id if source.endpoint is not None else 0,
        destination_endpoint=destination.endpoint.id if destination.endpoint is not None else 0,
        match=side.match if side is not None else PolicyMatch.NONE,
        audited=decision is not None and decision.audited,
        reply=report.reply,
        ct_state=report.ctstate.name.lower() if report.ctstate is not None else "",
        interface_index=report.interface_index,
        proxy_port=report.verdict.port if isinstance(report.verdict, Redirect) else 0,
        policy_revision=view.snapshot.policy_revision,
        egress_allowed_by=egress.allowed_by if egress is not None else (),
        ingress_allowed_by=ingress.allowed_by if ingress is not None else (),
        egress_denied_by=egress.denied_by if egress is not None else (),
        ingress_denied_by=ingress.denied_by if ingress is not None else (),
        isolated_by=side.isolated_by if side is not None and blamed else (),
        policy_log=_log(egress, ingress),
        detail=report.verdict.detail if isinstance(report.verdict, Drop) else "",
        packet=payload,
    )


def _verdict(report: Report) -> Verdict:
    match report.verdict:
        case Accept():
            return Verdict.ACCEPT
        case Redirect():
            return Verdict.REDIRECT
        case _:
            return Verdict.DROP


def _header(packet: Packet | None) -> dict[str, int]:
    """Return the fields that come out of the packet; without one, what "unknown" is."""
    if packet is None:
        return {
            "protocol": 0,
            "source_port": 0,
            "destination_port": 0,
            "tcp_flags": 0,
            "icmp_type": -1,
            "icmp_code": -1,
            "length": 0,
        }
    return {
        "protocol": packet.protocol,
        "source_port": packet.source_port,
        "destination_port": packet.destination_port,
        "tcp_flags": packet.tcp_flags,
        "icmp_type": packet.icmp_type,
        "icmp_code": packet.icmp_code,
        "length": packet.length,
    }


def _peers(report: Report, view: View) -> tuple[Peer, Peer]:
    """Return who talks to whom.

    Where policy was not asked, the sender is whoever is behind the interface: the source address
    of such a packet may be the very lie that it was dropped for.
    """
    if report.decision is not None:
        return report.decision.source, report.decision.destination
    destination = view.peer(report.destination) if report.destination else _UNKNOWN
    if not report.source:
        return _UNKNOWN, destination
    sender = view.endpoint_on(report.interface_index) if report.interface_index else None
    if sender is not None:
        return Peer(sender.identity, frozenset(), sender), destination
    claimed = view.peer(report.source)
    if claimed.endpoint is not None and claimed.endpoint.interface_index and report.interface_index:
        return _UNKNOWN, destination  # that endpoint is elsewhere: somebody uses its address
    return claimed, destination


def _direction(decision: Decision | None, source: Peer, destination: Peer) -> int:
    if decision is not None:
        return decision.direction or 0
    if source.endpoint is not None:
        return TrafficDirection.EGRESS
    return TrafficDirection.INGRESS if destination.endpoint is not None else 0


def _deciding_side(decision: Decision | None, direction: int) -> DirectionVerdict | None:
    if decision is None:
        return None
    return decision.egress if direction == TrafficDirection.EGRESS else decision.ingress


def _log(egress: DirectionVerdict | None, ingress: DirectionVerdict | None) -> tuple[str, ...]:
    """Return the log texts of both sides' deciding rules, each once."""
    texts = (*(egress.log if egress else ()), *(ingress.log if ingress else ()))
    return tuple(dict.fromkeys(texts))
