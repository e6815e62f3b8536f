"""From a worker's event to a flow record: numbers become names.

A worker reports numbers, because it has no time for more; here, in the agent, they get the labels
of their identities, the names of their endpoints and the policies that decided. The result is a
pure function of the event and of `Names`, its id too: the same event makes the same record.

Which Hubble event a decision is: a policy decision is a policy verdict (type 5); a packet dropped
for what it is, not for who sends it, is a drop (type 1); a packet that concerns no managed endpoint
is a trace to the stack (type 4); a request or response is an L7 access log entry (type 129).
"""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import msgspec

from conntrack.address import format_address
from firewall.flows.event import DnsEvent, Event, HttpEvent, PacketEvent
from firewall.flows.flow import (
    EVENT_DROP,
    EVENT_L7,
    EVENT_POLICY_VERDICT,
    EVENT_TRACE,
    Addresses,
    Dns,
    EventType,
    Explanation,
    Extensions,
    Flow,
    FlowEndpoint,
    FlowError,
    Http,
    HttpHeader,
    Icmp,
    Interface,
    Layer4,
    Layer7,
    Policy,
    Ports,
    Response,
    RuleReference,
    Tcp,
    TcpFlags,
    format_time,
    from_json,
    lost,
    parse_time,
    to_json,
)
from firewall.flows.summary import TCP_FLAG_NAMES, flow_text
from firewall.identities.labels import K8S, POD_NAMESPACE
from firewall.policy.snapshot import OriginRow
from firewall.policy.verdict import DROP_TEXT, DropReason, PolicyMatch, TrafficDirection, Verdict

__all__ = [
    "EndpointName",
    "Flow",
    "FlowError",
    "Names",
    "Response",
    "format_time",
    "from_json",
    "lost",
    "parse_time",
    "to_json",
]

RULES_MAX_COUNT = 16
"""How many rules a record names per list; with 64 KiB a line is too long for Go's scanners."""

_TCP = 6

TRACE_TO_STACK = 3
"""Trace point "to-stack" (pkg/monitor/api TraceToStack)."""

_POLICY_REASONS = frozenset(
    {DropReason.POLICY_DENIED, DropReason.POLICY_DENY, DropReason.AUTH_REQUIRED}
)

_VERDICTS: dict[int, str] = {
    Verdict.ACCEPT: "FORWARDED",
    Verdict.DROP: "DROPPED",
    Verdict.REDIRECT: "REDIRECTED",
}

_REASONS = {reason.value: reason for reason in DropReason}
_DIRECTIONS = {direction.value: direction.name for direction in TrafficDirection}
_UNREAD = ("TLS", "TCP")
"""Protocols of connections that the proxy lets pass without reading them."""
_NAMESPACE_LABEL = f"{K8S}:{POD_NAMESPACE}="


class EndpointName(NamedTuple):
    """What people call a managed endpoint; `labels` as `source:key=value`."""

    name: str
    namespace: str
    labels: tuple[str, ...] = ()


class Names(Protocol):
    """Where the names come from; every answer may be empty."""

    @property
    def node_name(self) -> str:
        """The name of this node."""

    def labels(self, identity: int) -> tuple[str, ...]:
        """Return the labels of an identity number as `source:key=value`, sorted."""

    def endpoint(self, number: int, address: bytes) -> EndpointName | None:
        """Return the managed endpoint with this id, None if it is gone.

        For the id 0 it is another node's endpoint with this address, None if none is known.
        """

    def dns_names(self, address: bytes) -> tuple[str, ...]:
        """Return the names that DNS answered with this address."""


class Ends(NamedTuple):
    """What the two ends of an event are called, and where it was seen.

    Attributes:
        node_name: the node.
        source: who an event's `source` is; of HTTP events the client, in a response too.
        destination: as `source`.
        source_names: what DNS called the source.
        destination_names: as `source_names`.
    """

    node_name: str
    source: FlowEndpoint
    destination: FlowEndpoint
    source_names: tuple[str, ...] = ()
    destination_names: tuple[str, ...] = ()


def record(event: Event, ends: Ends) -> Flow:
    """Make the flow record of an event."""
    if isinstance(event, PacketEvent):
        return _of_packet(event, ends)
    if isinstance(event, DnsEvent):
        return _of_dns(event, ends)
    return _of_http(event, ends)


def _of_packet(event: PacketEvent, ends: Ends) -> Flow:
    reason = _REASONS.get(event.drop_reason)
    kind, point = _event_type(event, reason)
    flow = Flow(
        time=format_time(event.time_ns),
        uuid=event_id(event),
        verdict="AUDIT" if event.audited else _verdict(event.verdict),
        drop_reason=0 if event.audited else int(event.drop_reason),
        drop_reason_desc="" if event.audited else _reason_name(event.drop_reason),
        ip=_addresses(event.source, event.destination),
        l4=_layer4(event),
        source=ends.source,
        destination=ends.destination,
        type="L3_L4",
        node_name=ends.node_name,
        source_names=ends.source_names if event.source else (),
        destination_names=ends.destination_names if event.destination else (),
        event_type=kind,
        trace_observation_point=point,
        traffic_direction=_DIRECTIONS.get(event.direction, ""),
        policy_match_type=int(event.match),
        is_reply=event.reply,
        interface=Interface(index=event.interface_index) if event.interface_index else None,
        proxy_port=event.proxy_port,
        egress_allowed_by=_policies(event.egress_allowed_by, event.policy_revision),
        ingress_allowed_by=_policies(event.ingress_allowed_by, event.policy_revision),
        egress_denied_by=_policies(event.egress_denied_by, event.policy_revision),
        ingress_denied_by=_policies(event.ingress_denied_by, event.policy_revision),
        policy_log=event.policy_log,
        extensions=_explain_packet(event, reason),
    )
    return msgspec.structs.replace(flow, summary=flow_text(flow))


def _of_http(event: HttpEvent, ends: Ends) -> Flow:
    if event.protocol in _UNREAD:
        return _of_exchange(event, ends, _TCP)
    headers = tuple(HttpHeader(key=key, value=value) for key, value in event.headers)
    http = Http(
        code=event.code if event.kind == "response" else 0,
        method=event.method,
        url=event.url,
        protocol=event.protocol,
        headers=headers,
    )
    return _of_exchange(event, ends, _TCP, http=http)


def _of_dns(event: DnsEvent, ends: Ends) -> Flow:
    dns = Dns(
        query=event.query,
        ips=tuple(map(format_address, event.addresses)),
        ttl=event.ttl_s,
        cnames=event.cnames,
        observation_source="proxy",
        rcode=event.rcode,
        qtypes=event.query_types,
        rrtypes=event.answer_types,
    )
    return _of_exchange(event, ends, event.transport, dns=dns)


def _of_exchange(
    event: HttpEvent | DnsEvent,
    ends: Ends,
    transport: int,
    *,
    http: Http | None = None,
    dns: Dns | None = None,
) -> Flow:
    """Make the flow of a request or its response."""
    response = event.kind == "response"
    node_name, source, destination, source_names, destination_names = ends
    addresses = _addresses(event.source, event.destination)
    ports = (event.source_port, event.destination_port)
    if response:  # the event keeps client and server; Hubble's source is who sends
        source, destination = destination, source
        source_names, destination_names = destination_names, source_names
        addresses = _addresses(event.destination, event.source)
        ports = (event.destination_port, event.source_port)
    ingress = event.direction == TrafficDirection.INGRESS
    allowed = _policies(event.allowed_by, event.policy_revision)
    denied = _policies(event.denied_by, event.policy_revision)
    flow = Flow(
        time=format_time(event.time_ns),
        uuid=event_id(event),
        verdict=_verdict(event.verdict),
        drop_reason=int(event.drop_reason),
        drop_reason_desc=_reason_name(event.drop_reason),
        ip=addresses,
        l4=Layer4(tcp=Tcp(*ports)) if transport == _TCP else Layer4(udp=Ports(*ports)),
        source=source,
        destination=destination,
        type="L7",
        node_name=node_name,
        source_names=source_names,
        destination_names=destination_names,
        l7=Layer7(
            type="RESPONSE" if response else "REQUEST",
            latency_ns=str(event.latency_ns) if event.latency_ns else "",
            http=http,
            dns=dns,
        ),
        event_type=EventType(type=EVENT_L7),
        traffic_direction=_DIRECTIONS.get(event.direction, ""),
        is_reply=response,
        ingress_allowed_by=allowed if ingress else (),
        egress_allowed_by=() if ingress else allowed,
        ingress_denied_by=denied if ingress else (),
        egress_denied_by=() if ingress else denied,
        extensions=_explain_exchange(event),
    )
    return msgspec.structs.replace(flow, summary=flow_text(flow))


# --- parts ------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()


def event_id(event: Event) -> str:
    """Derive a record's id from its the event (RFC 9562 version 8: 122 bits of our own making)."""
    digest = bytearray(hashlib.blake2b(_encoder.encode(event), digest_size=16).digest())
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    text = digest.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _verdict(number: int) -> str:
    return _VERDICTS.get(number, "ERROR")


def _reason_name(number: int) -> str:
    if not number:
        return ""
    return _REASONS[number].name if number in _REASONS else "DROP_REASON_UNKNOWN"


def _event_type(event: PacketEvent, reason: DropReason | None) -> tuple[EventType, str]:
    if event.drop_reason and reason not in _POLICY_REASONS:
        return EventType(type=EVENT_DROP, sub_type=int(event.drop_reason)), ""
    if not event.direction:
        return EventType(type=EVENT_TRACE, sub_type=TRACE_TO_STACK), "TO_STACK"
    return EventType(type=EVENT_POLICY_VERDICT), ""


def _addresses(source: bytes, destination: bytes) -> Addresses | None:
    if not source:
        return None
    return Addresses(
        source=format_address(source),
        destination=format_address(destination),
        ip_version="IPv4" if len(source) == 4 else "IPv6",
    )


def _tcp_flags(bits: int) -> TcpFlags | None:
    set_flags = {name: True for bit, name in enumerate(TCP_FLAG_NAMES) if bits >> bit & 1}
    return TcpFlags(**set_flags) if set_flags else None


def _layer4(event: PacketEvent) -> Layer4 | None:
    match event.protocol:
        case 6:
            return Layer4(
                tcp=Tcp(event.source_port, event.destination_port, _tcp_flags(event.tcp_flags))
            )
        case 17:
            return Layer4(udp=Ports(event.source_port, event.destination_port))
        case 132:
            return Layer4(sctp=Ports(event.source_port, event.destination_port))
        case 1:
            return Layer4(icmpv4=Icmp(max(event.icmp_type, 0), max(event.icmp_code, 0)))
        case 58:
            return Layer4(icmpv6=Icmp(max(event.icmp_type, 0), max(event.icmp_code, 0)))
        case _:
            return None


def endpoint(
    number: int, identity: int, labels: tuple[str, ...], known: EndpointName | None
) -> FlowEndpoint:
    """Show one side: the endpoint `number` (0 = none) with its name, if it is known, and labels."""
    if known is not None:
        return FlowEndpoint(
            id=number,
            identity=identity,
            namespace=known.namespace,
            labels=labels or known.labels,
            pod_name=known.name,
        )
    namespace = next((t for t in labels if t.startswith(_NAMESPACE_LABEL)), "")
    return FlowEndpoint(
        id=number,
        identity=identity,
        namespace=namespace.removeprefix(_NAMESPACE_LABEL),
        labels=labels,
    )


def _policies(origins: Iterable[OriginRow], revision: int) -> tuple[Policy, ...]:
    """Name each policy once, however many of its rules agree."""
    found: dict[tuple[str, str, str], Policy] = {}
    for origin in origins:
        key = (origin.kind, origin.namespace, origin.name)
        if key not in found and len(found) < RULES_MAX_COUNT:
            found[key] = Policy(
                name=origin.name,
                namespace=origin.namespace,
                labels=origin.labels,
                revision=str(revision) if revision else "",
                kind=origin.kind,
            )
    return tuple(found.values())


# --- explanation ------------------------------------------------------------------------------


def _references(origins: tuple[OriginRow, ...]) -> tuple[RuleReference, ...]:
    return tuple(
        RuleReference(
            kind=origin.kind,
            namespace=origin.namespace,
            name=origin.name,
            path=origin.path,
            file=origin.file,
            line=origin.line,
            column=origin.column,
        )
        for origin in origins[:RULES_MAX_COUNT]
    )


def _called(origins: tuple[OriginRow, ...]) -> str:
    """Name the first rule as people find it, and count the others."""
    if not origins:
        return ""
    first = origins[0]
    place = f"{first.file}:{first.line}" if first.line else first.file or first.path
    others = f" and {len(origins) - 1} more" if len(origins) > 1 else ""
    return f"{first.name} ({first.kind}) {place}".rstrip() + others


def _why(
    direction: int,
    reason: DropReason | None,
    allowed: tuple[OriginRow, ...],
    denied: tuple[OriginRow, ...],
    isolated: tuple[OriginRow, ...],
    *,
    match: int = PolicyMatch.NONE,
) -> str:
    word = _DIRECTIONS.get(direction, "").lower()
    if reason is DropReason.POLICY_DENY and denied:
        return f"denied by {_called(denied)}"
    if reason is DropReason.POLICY_DENIED:
        by = f"default deny by {_called(isolated)}" if isolated else "default deny"
        return f"no {word} rule allows it: {by}"
    if reason is not None:
        return DROP_TEXT[reason]
    if allowed:
        return f"allowed by {_called(allowed)}"
    if word and match == PolicyMatch.ALL:
        return f"no policy restricts {word} of the endpoint"
    return ""


def _extensions(explanation: Explanation) -> Extensions | None:
    return None if explanation == Explanation() else Extensions(value=explanation)


def _explain_packet(event: PacketEvent, reason: DropReason | None) -> Extensions | None:
    ingress = event.direction == TrafficDirection.INGRESS
    allowed = event.ingress_allowed_by if ingress else event.egress_allowed_by
    denied = event.ingress_denied_by if ingress else event.egress_denied_by
    if event.audited and reason is None:  # what it would have been dropped for
        reason = DropReason.POLICY_DENY if denied else DropReason.POLICY_DENIED
    return _extensions(
        Explanation(
            why=_why(
                event.direction, reason, allowed, denied, event.isolated_by, match=event.match
            ),
            rules=_references(denied if reason is not None else allowed),
            isolated_by=_references(event.isolated_by),
            ct_state=event.ct_state,
            detail=event.detail,
            protocol=0 if _layer4(event) else event.protocol,
            policy_revision=event.policy_revision,
        )
    )


def _explain_exchange(event: HttpEvent | DnsEvent) -> Extensions | None:
    reason = _REASONS.get(event.drop_reason)
    http = event if isinstance(event, HttpEvent) else None
    return _extensions(
        Explanation(
            why=_why(event.direction, reason, event.allowed_by, event.denied_by, event.isolated_by),
            rules=_references(event.denied_by if reason is not None else event.allowed_by),
            isolated_by=_references(event.isolated_by),
            detail=event.detail,
            policy_revision=event.policy_revision,
            layer7=http.protocol if http is not None and http.protocol in _UNREAD else "",
            server_name=http.server_name if http is not None else "",
        )
    )
