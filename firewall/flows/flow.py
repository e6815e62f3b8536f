"""The flow record: Hubble's `flow.proto` as JSON, one object per line.

The structs mirror the message as proto3 prints it (api/v1/flow/flow.proto, api/v1/observer): enums
as their names, zero values left out, 64-bit integers as text, times in RFC 3339 with nanoseconds.
`is_reply` is a wrapped boolean, so False is printed and only "unknown" is left out. Whatever
Hubble has no field for stands under `extensions`, as the Any of a `google.protobuf.Struct`, so
that Hubble's own reader takes our lines and ours takes Hubble's.
"""

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import msgspec

EVENT_DROP = 1
EVENT_TRACE = 4
EVENT_POLICY_VERDICT = 5
EVENT_L7 = 129
"""`event_type.type` (pkg/monitor/api/types.go): what kind of event a flow was made from."""

NS_PER_S = 1_000_000_000


class TcpFlags(msgspec.Struct, frozen=True, omit_defaults=True):
    """The flags that were set, in the order in which Hubble lists them."""

    FIN: bool = False
    SYN: bool = False
    RST: bool = False
    PSH: bool = False
    ACK: bool = False
    URG: bool = False
    ECE: bool = False
    CWR: bool = False
    NS: bool = False


class Tcp(msgspec.Struct, frozen=True, omit_defaults=True):
    """TCP ports, host order."""

    source_port: int = 0
    destination_port: int = 0
    flags: TcpFlags | None = None


class Ports(msgspec.Struct, frozen=True, omit_defaults=True):
    """UDP or SCTP ports, host order."""

    source_port: int = 0
    destination_port: int = 0


class Icmp(msgspec.Struct, frozen=True, omit_defaults=True):
    """ICMP or ICMPv6 type and code."""

    type: int = 0
    code: int = 0


class Layer4(
    msgspec.Struct,
    frozen=True,
    omit_defaults=True,
    rename={"tcp": "TCP", "udp": "UDP", "icmpv4": "ICMPv4", "icmpv6": "ICMPv6", "sctp": "SCTP"},
):
    """Exactly one is set."""

    tcp: Tcp | None = None
    udp: Ports | None = None
    icmpv4: Icmp | None = None
    icmpv6: Icmp | None = None
    sctp: Ports | None = None


class Addresses(
    msgspec.Struct, frozen=True, omit_defaults=True, rename={"ip_version": "ipVersion"}
):
    """The addresses as text; `ip_version` "IPv4" or "IPv6"."""

    source: str = ""
    destination: str = ""
    ip_version: str = ""


class Workload(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a pod belongs to."""

    name: str = ""
    kind: str = ""


class FlowEndpoint(msgspec.Struct, frozen=True, omit_defaults=True, rename={"id": "ID"}):
    """One side: `id` of the managed endpoint (0 = not managed here) and its identity."""

    id: int = 0
    identity: int = 0
    cluster_name: str = ""
    namespace: str = ""
    labels: tuple[str, ...] = ()
    pod_name: str = ""
    workloads: tuple[Workload, ...] = ()


class Service(msgspec.Struct, frozen=True, omit_defaults=True):
    """A service that an address was reached by."""

    name: str = ""
    namespace: str = ""


class HttpHeader(msgspec.Struct, frozen=True, omit_defaults=True):
    """One header field."""

    key: str = ""
    value: str = ""


class Http(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request, or (`code` set) its response."""

    code: int = 0
    method: str = ""
    url: str = ""
    protocol: str = ""
    headers: tuple[HttpHeader, ...] = ()


class Dns(msgspec.Struct, frozen=True, omit_defaults=True):
    """A DNS question, or its answer."""

    query: str = ""
    ips: tuple[str, ...] = ()
    ttl: int = 0
    cnames: tuple[str, ...] = ()
    observation_source: str = ""
    rcode: int = 0
    qtypes: tuple[str, ...] = ()
    rrtypes: tuple[str, ...] = ()


class Layer7(msgspec.Struct, frozen=True, omit_defaults=True):
    """`type` REQUEST or RESPONSE; `latency_ns` as text."""

    type: str = ""
    latency_ns: str = ""
    dns: Dns | None = None
    http: Http | None = None


class EventType(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the flow was made from; `sub_type` is the drop reason or the trace point."""

    type: int = 0
    sub_type: int = 0


class Policy(msgspec.Struct, frozen=True, omit_defaults=True):
    """A policy that decided; `revision` as text."""

    name: str = ""
    namespace: str = ""
    labels: tuple[str, ...] = ()
    revision: str = ""
    kind: str = ""


class Interface(msgspec.Struct, frozen=True, omit_defaults=True):
    """The node's link on which the packet was seen."""

    index: int = 0
    name: str = ""


class RuleReference(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a rule was written; `line` and `column` from 1, 0 = not from a file."""

    kind: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""
    file: str = ""
    line: int = 0
    column: int = 0


class Explanation(msgspec.Struct, frozen=True, omit_defaults=True):
    """What only we can say about a decision.

    `why` is one sentence; `rules` decided; `isolated_by` switched default deny on.
    `policy_revision` decided, 0 = not known. `explanation` only on request: the whole walk
    (`firewall.policy.explanation.Explanation`). `server_name`: what the client's TLS asks for.
    `layer7`: "TLS" or "TCP" for a connection that the proxy lets pass unread; Hubble has no word.
    """

    why: str = ""
    rules: tuple[RuleReference, ...] = ()
    isolated_by: tuple[RuleReference, ...] = ()
    ct_state: str = ""
    detail: str = ""
    protocol: int = 0
    policy_revision: int = 0
    explanation: dict[str, Any] | None = None
    layer7: str = ""
    server_name: str = ""


class Extensions(msgspec.Struct, frozen=True, rename={"type_url": "@type"}):
    """`google.protobuf.Any` around a `google.protobuf.Struct`."""

    value: Explanation = Explanation()
    type_url: str = "type.googleapis.com/google.protobuf.Struct"


class Flow(
    msgspec.Struct,
    frozen=True,
    omit_defaults=True,
    kw_only=True,
    rename={"ip": "IP", "type": "Type", "summary": "Summary"},
):
    """One decision about a packet or a request; the fields are those of flow.proto."""

    time: str = ""
    uuid: str = ""
    verdict: str = ""
    drop_reason: int = 0
    auth_type: str = ""
    ip: Addresses | None = None
    l4: Layer4 | None = None
    source: FlowEndpoint | None = None
    destination: FlowEndpoint | None = None
    type: str = ""
    node_name: str = ""
    source_names: tuple[str, ...] = ()
    destination_names: tuple[str, ...] = ()
    l7: Layer7 | None = None
    event_type: EventType | None = None
    source_service: Service | None = None
    destination_service: Service | None = None
    traffic_direction: str = ""
    policy_match_type: int = 0
    trace_observation_point: str = ""
    drop_reason_desc: str = ""
    is_reply: bool | None = None
    interface: Interface | None = None
    proxy_port: int = 0
    egress_allowed_by: tuple[Policy, ...] = ()
    ingress_allowed_by: tuple[Policy, ...] = ()
    egress_denied_by: tuple[Policy, ...] = ()
    ingress_denied_by: tuple[Policy, ...] = ()
    policy_log: tuple[str, ...] = ()
    summary: str = ""
    extensions: Extensions | None = None


class LostEvents(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Flows that nobody will see: where they were lost, how many, first and last time."""

    source: str = ""
    num_events_lost: str = ""
    first: str = ""
    last: str = ""


class Response(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One line of output: observer.proto's GetFlowsResponse. One of the first two is set."""

    flow: Flow | None = None
    lost_events: LostEvents | None = None
    node_name: str = ""
    time: str = ""


class FlowError(ValueError):
    """The line is no flow; the message says what is wrong with it."""


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Response)


def to_json(item: Flow | Response) -> bytes:
    """Return the line for a flow, without its newline.

    Args:
        item: a flow, wrapped here as Hubble wraps it, or a response (lost events) as it is.
    """
    if isinstance(item, Flow):
        item = Response(flow=item, node_name=item.node_name, time=item.time)
    return _encoder.encode(item)


def from_json(line: bytes | str) -> Response:
    """Read one line, ours or `hubble observe -o json`'s; unknown fields are ignored.

    Raises:
        FlowError: it is neither a flow nor a count of lost ones.
    """
    try:
        response = _decoder.decode(line)
    except msgspec.MsgspecError as error:
        raise FlowError(f"not a flow: {error}") from error
    if response.flow is None and response.lost_events is None:
        raise FlowError("not a flow: neither 'flow' nor 'lost_events' is in the line")
    return response


def lost(source: str, count: int, *, first_ns: int, last_ns: int, node_name: str = "") -> Response:
    """Make the record of flows that were lost.

    Args:
        source: flow.proto LostEventSource: "HUBBLE_RING_BUFFER" (a reader was too slow) or
            "OBSERVER_EVENTS_QUEUE" (a worker could not deliver).
        count: how many.
        first_ns: wall clock of the first loss, nanoseconds.
        last_ns: of the last one.
        node_name: where.
    """
    events = LostEvents(
        source=source,
        num_events_lost=str(count),
        first=format_time(first_ns),
        last=format_time(last_ns),
    )
    return Response(lost_events=events, node_name=node_name, time=format_time(last_ns))


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def format_time(time_ns: int) -> str:
    """Write wall-clock nanoseconds as RFC 3339: `2026-11-22T13:31:12.123456789Z`."""
    seconds, nanoseconds = divmod(time_ns, NS_PER_S)
    return f"{_second(seconds)}.{nanoseconds:09d}Z"


def parse_time(text: str) -> int:
    """Read RFC 3339 as wall-clock nanoseconds.

    Raises:
        ValueError: it is none, or has no time zone.
    """
    head, point, rest = text.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))] if point else ""
    moment = datetime.fromisoformat(head + rest[len(digits) :])
    if moment.tzinfo is None or (point and not digits):
        raise ValueError(f"{text!r} is no RFC 3339 time: it needs a time zone")
    return int(moment.timestamp()) * NS_PER_S + int(digits[:9].ljust(9, "0"))
