"""Flow metrics under Hubble's names, so that Hubble's dashboards work unchanged.

Names and labels: Documentation/observability/metrics.rst. HTTP is counted from the request's point
of view (Hubble's httpV2): once per request, with the status that the client got. Every label whose
values a peer chooses is bounded, or a stranger could fill our memory: unknown methods are "other",
and ports beyond the first `PORTS_MAX_COUNT` too.

Flows that are alike are counted together: which series a flow adds to depends on a few numbers of
its event, so each such set of numbers is counted, and the series grow when they are asked for.
"""

from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from firewall.flows.compact import MATCH_TEXT, TRACE_POINTS
from firewall.flows.event import DnsEvent, Event, HttpEvent, PacketEvent
from firewall.flows.flow import (
    EVENT_DROP,
    EVENT_L7,
    EVENT_POLICY_VERDICT,
    EVENT_TRACE,
    Flow,
    Layer4,
)
from firewall.flows.note import Note
from firewall.flows.summary import flag_names, icmp_text, rcode_text
from firewall.identities.reserved import is_world
from firewall.policy.verdict import DROP_TEXT, DropReason, TrafficDirection, Verdict

PORTS_MAX_COUNT = 1024
"""How many destination ports get a series of their own."""

WAITING_MAX_COUNT = 1024
"""Kinds of flows that are counted before the series grow: about 1 MB."""

METHODS = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
)
"""The methods of RFC 9110 and RFC 5789; all others are "other"."""

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Prometheus' default buckets, which Hubble uses."""

_TYPES = {
    EVENT_DROP: "Drop",
    EVENT_TRACE: "Trace",
    EVENT_POLICY_VERDICT: "PolicyVerdict",
    EVENT_L7: "L7",
}

M = TypeVar("M", Counter, Histogram)


class FlowMetrics:
    """Counts flows. One registry of its own; the agent joins it with the others."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._children: dict[tuple[str, ...], Counter | Histogram] = {}
        self._ports: set[tuple[str, str]] = set()
        self._waiting: dict[tuple[object, ...], _Alike] = {}
        counter = self._counter
        self._lost = counter("hubble_lost_events", "Flows that were lost", "source")
        self._flows = counter("hubble_flows_processed", "Flows", "type", "subtype", "verdict")
        self._drops = counter("hubble_drop", "Drops", "reason", "protocol")
        self._verdicts = counter(
            "hubble_policy_verdicts", "Policy verdicts", "direction", "match", "action"
        )
        self._requests = counter(
            "hubble_http_requests", "HTTP requests", "method", "protocol", "status", "reporter"
        )
        self._dns_queries = counter(
            "hubble_dns_queries", "DNS queries", "rcode", "qtypes", "ips_returned"
        )
        self._dns_responses = counter(
            "hubble_dns_responses", "DNS responses", "rcode", "qtypes", "ips_returned"
        )
        self._flags = counter("hubble_tcp_flags", "TCP flags of new flows", "flag", "family")
        self._icmp = counter("hubble_icmp", "ICMP messages", "family", "type")
        self._port_counts = counter(
            "hubble_port_distribution", "Flows by destination port", "protocol", "port"
        )
        self._world = counter(
            "hubble_flows_to_world", "Flows to outside the cluster", "protocol", "verdict"
        )
        self._durations = Histogram(
            "hubble_http_request_duration_seconds",
            "From request to response head",
            ("method", "reporter"),
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _child(self, metric: M, *values: str) -> M:
        """Return a labelled series, remembered: prometheus_client's own way takes a lock."""
        key = (metric._name, *values)  # noqa: SLF001 - the name given above, no accessor exists
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*values)
        return child  # type: ignore[return-value]

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        self.settle()
        return generate_latest(self.registry)

    def lost(self, source: str, count: int) -> None:
        """Count flows that were lost; `source` as in flow.proto."""
        self._child(self._lost, source.lower()).inc(count)

    def observe(self, note: Note) -> None:
        """Count one flow."""
        event = note.event
        key = _kind_of(event)
        alike = self._waiting.get(key)
        if alike is None:
            if len(self._waiting) >= WAITING_MAX_COUNT:
                self.settle()
            self._waiting[key] = _Alike(note)
        else:
            alike.count += 1
        if isinstance(event, HttpEvent) and event.latency_ns and event.verdict != Verdict.DROP:
            reporter = _reporter(ingress=event.direction != TrafficDirection.EGRESS)
            duration = self._child(self._durations, _method(event.method), reporter)
            duration.observe(event.latency_ns / 1e9)

    def settle(self) -> None:
        """Bring the series up to date."""
        waiting, self._waiting = self._waiting, {}
        for alike in waiting.values():
            self._count(alike.example.flow, alike.count)

    def _count(self, flow: Flow, count: int) -> None:
        """Count flows that are alike."""
        event = flow.event_type
        kind = "Unknown" if event is None else _TYPES.get(event.type, "Unknown")
        protocol = _protocol(flow)
        self._child(self._flows, kind, _subtype(flow), flow.verdict).inc(count)
        if flow.verdict == "DROPPED":
            self._child(self._drops, _reason(flow), protocol).inc(count)
        self._count_policy(flow, count)
        if _to_world(flow):
            self._child(self._world, protocol, flow.verdict).inc(count)
        if flow.l7 is not None:
            self._count_http(flow, count)
            self._count_dns(flow, count)
        elif flow.l4 is not None and flow.verdict in ("FORWARDED", "REDIRECTED"):
            self._count_layer4(flow, flow.l4, protocol, count)

    def _count_policy(self, flow: Flow, count: int) -> None:
        event = flow.event_type
        if event is not None and event.type == EVENT_POLICY_VERDICT:
            match = MATCH_TEXT.get(flow.policy_match_type, "none").lower()
        elif flow.l7 is not None and flow.l7.type == "REQUEST":
            match = f"l7/{_protocol(flow).lower()}"
        else:
            return
        direction = flow.traffic_direction.lower() or "unknown"
        self._child(self._verdicts, direction, match, flow.verdict.lower()).inc(count)

    def _count_layer4(self, flow: Flow, l4: Layer4, protocol: str, count: int) -> None:
        family = flow.ip.ip_version if flow.ip is not None else ""
        if l4.tcp is not None:
            names = flag_names(l4.tcp.flags)
            for name in names:
                if name in ("FIN", "RST"):
                    self._child(self._flags, name, family).inc(count)
                elif name == "SYN":  # told apart, so that SYNs nobody answered show
                    answered = "SYN-ACK" if "ACK" in names else name
                    self._child(self._flags, answered, family).inc(count)
        if l4.icmpv4 is not None:
            self._child(self._icmp, family, icmp_text(4, l4.icmpv4)).inc(count)
        if l4.icmpv6 is not None:
            self._child(self._icmp, family, icmp_text(6, l4.icmpv6)).inc(count)
        ports = l4.tcp or l4.udp or l4.sctp
        if ports is not None and not flow.is_reply:
            port = str(ports.destination_port)
            if (protocol, port) not in self._ports:
                if len(self._ports) >= PORTS_MAX_COUNT:
                    port = "other"
                else:
                    self._ports.add((protocol, port))
            self._child(self._port_counts, protocol, port).inc(count)

    def _count_http(self, flow: Flow, count: int) -> None:
        http = flow.l7.http if flow.l7 is not None else None
        if flow.l7 is None or http is None:
            return
        denied = flow.verdict == "DROPPED"
        if (flow.l7.type == "RESPONSE") == denied:
            return  # a request is counted by its answer; a denied one has no other than ours
        reporter = _reporter(ingress=flow.traffic_direction != "EGRESS")
        status = "403" if denied else str(http.code)
        labels = _method(http.method), http.protocol, status, reporter
        self._child(self._requests, *labels).inc(count)

    def _count_dns(self, flow: Flow, count: int) -> None:
        dns = flow.l7.dns if flow.l7 is not None else None
        if flow.l7 is None or dns is None:
            return
        counter, rcode = self._dns_queries, ""
        if flow.verdict == "DROPPED":
            rcode = _reason(flow)
        elif flow.l7.type == "RESPONSE":
            counter, rcode = self._dns_responses, rcode_text(dns.rcode)
        labels = rcode, ",".join(dns.qtypes), str(len(dns.ips))
        self._child(counter, *labels).inc(count)


class _Alike:
    """Flows that add to the same series, and one of them."""

    __slots__ = ("count", "example")

    def __init__(self, example: Note) -> None:
        self.example = example
        self.count = 1


def _kind_of(event: Event) -> tuple[object, ...]:
    """Return everything of an event that decides which series it adds to."""
    if isinstance(event, PacketEvent):
        return (
            event.verdict,
            event.drop_reason,
            event.audited,
            event.direction,
            event.match,
            event.protocol,
            event.tcp_flags,
            event.icmp_type,
            event.icmp_code,
            event.reply,
            len(event.source),
            event.destination_port,
            event.destination_identity,
        )
    if isinstance(event, DnsEvent):
        return (
            event.kind,
            event.verdict,
            event.drop_reason,
            event.direction,
            event.query_types,
            event.rcode,
            len(event.addresses),
            event.destination_identity,
        )
    return (
        event.kind,
        event.verdict,
        event.drop_reason,
        event.direction,
        _method(event.method),
        event.protocol,
        event.code,
        event.source_identity,
        event.destination_identity,
    )


def _method(method: str) -> str:
    return method if method in METHODS else "other"


def _reporter(*, ingress: bool) -> str:
    return "server" if ingress else "client"


def _protocol(flow: Flow) -> str:
    if flow.l7 is not None:
        return "HTTP" if flow.l7.http is not None else "DNS" if flow.l7.dns is not None else "L7"
    l4 = flow.l4
    if l4 is None:
        return "Unknown"
    names = ("TCP", "UDP", "ICMPv4", "ICMPv6", "SCTP")
    parts = (l4.tcp, l4.udp, l4.icmpv4, l4.icmpv6, l4.sctp)
    return next((name for name, part in zip(names, parts, strict=True) if part), "Unknown")


def _subtype(flow: Flow) -> str:
    if flow.l7 is not None:
        return _protocol(flow)
    event = flow.event_type
    if event is None or event.type != EVENT_TRACE:
        return ""
    return TRACE_POINTS.get(event.sub_type, str(event.sub_type))


def _reason(flow: Flow) -> str:
    try:
        return DROP_TEXT[DropReason(flow.drop_reason)]
    except ValueError:
        return flow.drop_reason_desc or "unknown"


def _to_world(flow: Flow) -> bool:
    """Whether a flow goes outside: replies of ours to the outside do not count."""
    if flow.is_reply or flow.destination is None:
        return False
    return is_world(flow.destination.identity) or any(
        label.startswith("reserved:world") for label in flow.destination.labels
    )
