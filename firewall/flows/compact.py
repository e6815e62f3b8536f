"""Flows as lines for people, laid out as `hubble observe` lays them out.

    Nov 22 13:31:12.129: default/xwing:54842 (ID:22654) -> default/deathstar:80 (ID:16530)
        policy-verdict:none INGRESS DENIED (TCP Flags: SYN)           (on one line)

The arrow is `->`; `<-` with the sides exchanged if the flow is a reply, so that the client always
stands first; `<>` if that is not known. Whatever a packet or a request put into a text is escaped:
no control character reaches the terminal. Source: hubble/pkg/printer.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, tzinfo
from typing import NamedTuple

from firewall.flows.flow import (
    EVENT_DROP,
    EVENT_POLICY_VERDICT,
    EVENT_TRACE,
    NS_PER_S,
    Flow,
    FlowEndpoint,
    LostEvents,
    Policy,
    Response,
    parse_time,
)
from firewall.identities.reserved import Reserved
from firewall.policy.verdict import DROP_TEXT, DropReason, PolicyMatch

MATCH_TEXT: dict[int, str] = {
    PolicyMatch.NONE: "none",
    PolicyMatch.L3_ONLY: "L3-Only",
    PolicyMatch.L3_L4: "L3-L4",
    PolicyMatch.L4_ONLY: "L4-Only",
    PolicyMatch.ALL: "all",
    PolicyMatch.L3_PROTO: "L3-Proto",
    PolicyMatch.PROTO_ONLY: "Proto-Only",
}
"""How specific the deciding entry was, in the words of pkg/monitor/api."""

TRACE_POINTS: dict[int, str] = {
    0: "to-endpoint", 1: "to-proxy", 2: "to-host", 3: "to-stack", 4: "to-overlay",
    5: "from-endpoint", 6: "from-proxy", 7: "from-host", 8: "from-stack", 9: "from-overlay",
    10: "from-network", 11: "to-network", 12: "from-crypto", 13: "to-crypto",
}  # fmt: skip
"""Where a traced packet was seen (pkg/monitor/api TraceObservationPoints)."""

TIME_FORMATS = (
    "StampMilli", "RFC3339", "RFC3339Milli", "RFC3339Micro", "RFC3339Nano", "RFC1123Z",
)  # fmt: skip
"""What `--time-format` takes; the names are Go's."""

_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
_DAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]

_POLICY_VERDICTS = {
    "FORWARDED": "ALLOWED",
    "REDIRECTED": "ALLOWED",
    "DROPPED": "DENIED",
    "ERROR": "DENIED",
    "AUDIT": "AUDITED",
}
"""The words for a policy verdict; every other event keeps its own."""

_COLOURS = {"host": 36, "port": 33, "identity": 35, "allowed": 32, "dropped": 31, "audit": 33}
"""SGR numbers (ECMA-48): cyan, yellow, magenta, green, red, yellow."""

_VERDICT_COLOUR = {
    "FORWARDED": "allowed",
    "DROPPED": "dropped",
    "ERROR": "dropped",
    "AUDIT": "audit",
    "TRACED": "audit",
    "TRANSLATED": "audit",
    "REDIRECTED": "allowed",
}

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {
    # What turns the reading direction hides text as well as a control character does.
    code: f"\\u{code:04x}"
    for code in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F)
}


class Style(NamedTuple):
    """How lines look.

    `numeric`: addresses instead of names. `zone` None = the machine's time zone, as in Hubble.
    """

    colour: bool = False
    numeric: bool = False
    policy_names: bool = False
    node_name: bool = False
    time_format: str = "StampMilli"
    zone: tzinfo | None = None


class Cells(NamedTuple):
    """The parts of a line; every layout puts together the same ones."""

    time: str
    node: str
    source: str
    source_identity: str
    arrow: str
    destination: str
    destination_identity: str
    type: str
    verdict: str
    summary: str


def escape(text: str) -> str:
    r"""Make control characters visible: ESC becomes `\x1b`."""
    return text if text.isascii() and text.isprintable() else text.translate(_CONTROLS)


def line(
    flow: Flow,
    *,
    colour: bool = False,
    numeric: bool = False,
    policy_names: bool = False,
    node_name: bool = False,
    time_format: str = "StampMilli",
    zone: tzinfo | None = None,
) -> str:
    """Render one flow in the compact layout, without newline; see `Style`."""
    style = Style(colour, numeric, policy_names, node_name, time_format, zone)
    cells = cells_of(flow, style)
    node = f" [{cells.node}]" if node_name else ""
    source = " ".join(filter(None, (cells.source, cells.source_identity)))
    destination = " ".join(filter(None, (cells.destination, cells.destination_identity)))
    summary = f" ({cells.summary})" if cells.summary else ""
    return (
        f"{cells.time}{node}: {source} {cells.arrow} {destination} "
        f"{cells.type} {cells.verdict}{summary}"
    )


def lost_line(
    response: Response,
    *,
    time_format: str = "StampMilli",
    zone: tzinfo | None = None,
) -> str:
    """Render lost flows, in the stream where they are missing."""
    events = response.lost_events or LostEvents()
    style = Style(time_format=time_format, zone=zone)
    times = [_time(text, style) for text in (events.first, events.last) if text]
    between = f" (first: {times[0]}, last: {times[-1]})" if times else ""
    stamp = _time(response.time, style) if response.time else "?"
    return f"{stamp} EVENTS LOST: {escape(events.source)} {events.num_events_lost}{between}"


DICT_SEPARATOR = "------------"


def dict_lines(flow: Flow, style: Style = Style()) -> list[str]:  # noqa: B008 - an immutable value
    """Render one flow as `KEY: value` lines; `DICT_SEPARATOR` goes between flows."""
    cells = cells_of(flow, style)
    pairs = [("TIMESTAMP", cells.time)]
    if style.node_name:
        pairs.append(("NODE", cells.node))
    pairs += [
        ("SOURCE", " ".join(filter(None, (cells.source, cells.source_identity)))),
        ("DESTINATION", " ".join(filter(None, (cells.destination, cells.destination_identity)))),
        ("TYPE", cells.type),
        ("VERDICT", cells.verdict),
        ("SUMMARY", cells.summary),
    ]
    return [f"{key:>11}: {value}" for key, value in pairs]


def table_lines(flows: Iterable[Flow], style: Style = Style()) -> list[str]:  # noqa: B008
    """Render flows as an aligned table: columns at least 2 wide, 3 apart, never coloured."""
    plain = style._replace(colour=False)
    header = ["TIMESTAMP", "SOURCE", "DESTINATION", "TYPE", "VERDICT", "SUMMARY"]
    rows: list[Sequence[str]] = []
    for flow in flows:
        cells = cells_of(flow, plain)
        row = [cells.time]
        row += [cells.node] if style.node_name else []
        row += [" ".join(filter(None, (cells.source, cells.source_identity)))]
        row += [" ".join(filter(None, (cells.destination, cells.destination_identity)))]
        rows.append([*row, cells.type, cells.verdict, cells.summary])
    if style.node_name:
        header.insert(1, "NODE")
    widths = [max(2, *map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


def cells_of(flow: Flow, style: Style) -> Cells:
    """Render the parts of a flow, the client first if it is a reply."""
    sides = [_side(flow, sender=True, style=style), _side(flow, sender=False, style=style)]
    if flow.is_reply:
        sides.reverse()
    arrow = {True: "<-", False: "->", None: "<>"}[flow.is_reply]
    return Cells(
        time=_time(flow.time, style),
        node=escape(flow.node_name),
        source=sides[0][0],
        source_identity=sides[0][1],
        arrow=arrow,
        destination=sides[1][0],
        destination_identity=sides[1][1],
        type=type_text(flow),
        verdict=_verdict(flow, style),
        summary=escape(flow.summary),
    )


def type_text(flow: Flow) -> str:
    """Name the kind of event: `policy-verdict:L3-L4 INGRESS`, `http-request`, `Policy denied`."""
    if flow.l7 is not None:
        kind = flow.l7.type.lower() or "unknown"
        if flow.l7.http is not None:
            return f"http-{kind}"
        if flow.l7.dns is not None:
            return f"dns-{kind} {escape(flow.l7.dns.observation_source)}".rstrip()
        word = flow.extensions.value.layer7.lower() if flow.extensions is not None else ""
        return f"{word or 'l7'}-{kind}"
    event = flow.event_type
    if event is None:
        return "unknown"
    if event.type == EVENT_POLICY_VERDICT:
        match = MATCH_TEXT.get(flow.policy_match_type, str(flow.policy_match_type))
        return f"policy-verdict:{match} {flow.traffic_direction}".rstrip()
    if event.type == EVENT_DROP:
        return _drop_text(event.sub_type or flow.drop_reason)
    if event.type == EVENT_TRACE:
        return TRACE_POINTS.get(event.sub_type, str(event.sub_type))
    return f"event-{event.type}"


def _drop_text(number: int) -> str:
    try:
        return DROP_TEXT[DropReason(number)]
    except ValueError:
        return str(number)


def identity_text(number: int) -> str:
    """Render an identity: `(ID:16530)`, or `(world)` if it is reserved."""
    try:
        return f"({Reserved(number).label})"
    except ValueError:
        return f"(ID:{number})"


def _paint(text: str, what: str, style: Style) -> str:
    return f"\x1b[{_COLOURS[what]}m{text}\x1b[0m" if style.colour and text else text


def _side(flow: Flow, *, sender: bool, style: Style) -> tuple[str, str]:
    """Render (host with port, identity) of the sender or the receiver."""
    endpoint = flow.source if sender else flow.destination
    address = "" if flow.ip is None else (flow.ip.source if sender else flow.ip.destination)
    host = address
    if not style.numeric:
        service = flow.source_service if sender else flow.destination_service
        dns = flow.source_names if sender else flow.destination_names
        if endpoint is not None and endpoint.pod_name:
            host = _joined(endpoint.namespace, endpoint.pod_name)
        elif service is not None and service.name:
            host = _joined(service.namespace, service.name)
        elif dns:
            host = ",".join(dns)
    shown = _paint(escape(host), "host", style)
    port = _port(flow, sender=sender)
    if port:
        number = _paint(str(port), "port", style)
        shown = f"[{shown}]:{number}" if ":" in host else f"{shown}:{number}"
    return shown, _identity(endpoint, style)


def _joined(namespace: str, name: str) -> str:
    return f"{namespace}/{name}" if namespace else name


def _identity(endpoint: FlowEndpoint | None, style: Style) -> str:
    return "" if endpoint is None else _paint(identity_text(endpoint.identity), "identity", style)


def _port(flow: Flow, *, sender: bool) -> int:
    if flow.l4 is None:
        return 0
    ports = flow.l4.tcp or flow.l4.udp or flow.l4.sctp
    if ports is None:
        return 0
    return ports.source_port if sender else ports.destination_port


def _verdict(flow: Flow, style: Style) -> str:
    word = flow.verdict
    if flow.event_type is not None and flow.event_type.type == EVENT_POLICY_VERDICT:
        word = _POLICY_VERDICTS.get(word, word)
    shown = _paint(word, _VERDICT_COLOUR.get(flow.verdict, "audit"), style)
    named = policies_text(flow) if style.policy_names else ""
    return f"{shown} BY {named}" if named else shown


def deciding_policies(flow: Flow) -> tuple[Policy, ...]:
    """Return the policies that decided: the deniers of a drop, else the side's allowers."""
    if flow.verdict in ("DROPPED", "AUDIT"):
        return flow.ingress_denied_by or flow.egress_denied_by
    if flow.traffic_direction == "EGRESS":
        return flow.egress_allowed_by
    return flow.ingress_allowed_by or flow.egress_allowed_by


def policies_text(flow: Flow) -> str:
    """Name the deciding policies: `name (Kind), other (Kind)`.

    For a default deny nobody decided; named is who isolated the endpoint, and that it is a default
    deny is said.
    """
    named = [f"{escape(p.name)} ({escape(p.kind)})" for p in deciding_policies(flow)]
    if named or flow.verdict not in ("DROPPED", "AUDIT") or flow.extensions is None:
        return ", ".join(named)
    isolating = flow.extensions.value.isolated_by
    names = dict.fromkeys(f"{escape(rule.name)} ({escape(rule.kind)})" for rule in isolating)
    return f"default deny of {', '.join(names)}" if names else ""


def _time(text: str, style: Style) -> str:
    try:
        return format_stamp(parse_time(text), style.time_format, style.zone)
    except ValueError:
        return escape(text)


def format_stamp(time_ns: int, time_format: str, zone: tzinfo | None = None) -> str:
    """Render wall-clock nanoseconds in one of `TIME_FORMATS`; locale-independent.

    Raises:
        ValueError: another format.
    """
    seconds, nanoseconds = divmod(time_ns, NS_PER_S)
    moment = datetime.fromtimestamp(seconds, UTC).astimezone(zone)
    month = _MONTHS[moment.month - 1]
    if time_format == "StampMilli":
        return f"{month} {moment.day:2d} {moment:%H:%M:%S}.{nanoseconds // 1_000_000:03d}"
    offset = f"{moment:%z}"[:5]
    if time_format == "RFC1123Z":
        return f"{_DAYS[moment.weekday()]}, {moment.day:02d} {month} {moment:%Y %H:%M:%S} {offset}"
    places = {"RFC3339": 0, "RFC3339Milli": 3, "RFC3339Micro": 6, "RFC3339Nano": 9}
    if time_format not in places:
        raise ValueError(f"unknown time format {time_format!r}; one of {', '.join(TIME_FORMATS)}")
    digits = f"{nanoseconds:09d}"[: places[time_format]]
    suffix = "Z" if offset == "+0000" else f"{offset[:3]}:{offset[3:]}"
    return f"{moment:%Y-%m-%dT%H:%M:%S}{'.' + digits if digits else ''}{suffix}"
