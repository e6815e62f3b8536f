r"""Records as flow events for the agent, and as text lines in Envoy's default format.

The default format of Envoy (access_log/usage.rst):
`[START_TIME] "METHOD PATH PROTOCOL" CODE FLAGS RECEIVED SENT DURATION UPSTREAM_TIME
"X-FORWARDED-FOR" "USER-AGENT" "X-REQUEST-ID" "AUTHORITY" "UPSTREAM_HOST"`, times in milliseconds,
`-` for what is not known. No byte of a request can forge a line: control and non-ASCII characters,
quotes and backslashes are written as `\xNN`.
"""

import re
from datetime import UTC, datetime
from typing import NamedTuple

from conntrack.address import format_address
from firewall.flows.event import HttpEvent
from firewall.policy.verdict import DropReason, TrafficDirection, Verdict
from l7proxy.commands import Record, RecordKind

_UNSAFE = re.compile(r"[^ !#-\[\]-~]")


class Ends(NamedTuple):
    """The two ends of a client connection: packed addresses, ports in host order."""

    source: bytes
    source_port: int
    destination: bytes
    destination_port: int


def http_event(record: Record, ends: Ends, time_ns: int) -> HttpEvent:
    """Return the flow event of a record; `time_ns` is the wall clock's."""
    judgement = record.judgement
    scheme = "https" if record.tls else "http"
    refused = record.kind is RecordKind.REQUEST and bool(record.detail)
    reason = 0
    if refused:
        reason = (judgement.drop_reason if judgement else 0) or DropReason.INVALID_PACKET_DROPPED
    return HttpEvent(
        time_ns=time_ns,
        kind="request" if record.kind is RecordKind.REQUEST else "response",
        verdict=Verdict.DROP if refused else Verdict.ACCEPT,
        drop_reason=int(reason),
        direction=int(judgement.direction if judgement else TrafficDirection.INGRESS),
        source=ends.source,
        destination=ends.destination,
        source_port=ends.source_port,
        destination_port=ends.destination_port,
        source_identity=judgement.source_identity if judgement else 0,
        destination_identity=judgement.destination_identity if judgement else 0,
        source_endpoint=judgement.source_endpoint if judgement else 0,
        destination_endpoint=judgement.destination_endpoint if judgement else 0,
        method=record.method,
        url=f"{scheme}://{record.authority}{record.path}" if record.authority else record.path,
        protocol=record.protocol,
        # Hubble's request has no code, whatever it was answered with.
        code=0 if record.kind is RecordKind.REQUEST else record.status,
        latency_ns=int(record.latency_s * 1e9),
        request_id=record.request_id,
        policy_revision=judgement.revision if judgement else 0,
        headers=record.headers,
        allowed_by=judgement.allowed_by if judgement else (),
        denied_by=judgement.denied_by if judgement else (),
        isolated_by=judgement.isolated_by if judgement else (),
        detail=record.detail or (judgement.detail if judgement else ""),
    )


def is_final(record: Record) -> bool:
    """Whether nothing more will be said about this request: one text line is written then."""
    return record.kind is RecordKind.RESPONSE or bool(record.detail)


def text_line(record: Record, ends: Ends, time_ns: int) -> str:
    """Return the line of Envoy's default format for a final record that ended at `time_ns`."""
    headers = dict(record.headers)
    begun_s = time_ns / 1e9 - record.duration_s
    begun = datetime.fromtimestamp(begun_s, UTC).isoformat(timespec="milliseconds")
    server = _host_port(ends.destination, ends.destination_port)
    return (
        f"[{begun.removesuffix('+00:00')}Z] "
        f'"{_safe(record.method)} {_safe(record.path)} {_safe(record.protocol)}" '
        f"{record.status} {record.flag or '-'} {record.received_bytes} {record.sent_bytes} "
        f"{round(record.duration_s * 1000)} "
        f"{round(record.latency_s * 1000) if record.latency_s else '-'} "
        f'"{_safe(headers.get("x-forwarded-for", ""))}" "{_safe(headers.get("user-agent", ""))}" '
        f'"{_safe(record.request_id)}" "{_safe(record.authority)}" "{server}"\n'
    )


def _safe(text: str) -> str:
    return _UNSAFE.sub(lambda found: f"\\x{ord(found[0]):02x}", text) or "-"


def _host_port(address: bytes, port: int) -> str:
    text = format_address(address)
    return f"[{text}]:{port}" if len(address) == 16 else f"{text}:{port}"
