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
from l7proxy.judgement import Judgement

_REQUEST = RecordKind.REQUEST
_TOWARDS = TrafficDirection.INGRESS
_INGRESS, _EGRESS = int(TrafficDirection.INGRESS), int(TrafficDirection.EGRESS)
_DROP, _ACCEPT = int(Verdict.DROP), int(Verdict.ACCEPT)
_INVALID = int(DropReason.INVALID_PACKET_DROPPED)
_NOT_JUDGED = Judgement(
    allowed=False,
    connected=False,
    direction=TrafficDirection.INGRESS,
    drop_reason=0,
    revision=0,
)
"""For requests that policy never saw."""

_UNSAFE = re.compile(r"[^ !#-\[\]-~]")


class Ends(NamedTuple):
    """The two ends of a client connection: packed addresses, ports in host order."""

    source: bytes
    source_port: int
    destination: bytes
    destination_port: int


def http_event(record: Record, ends: Ends, time_ns: int) -> HttpEvent:
    """Return the flow event of a record; `time_ns` is the wall clock's."""
    judgement = record.judgement or _NOT_JUDGED
    is_request = record.kind is _REQUEST
    refused = is_request and bool(record.detail)
    scheme = "https" if record.tls else "http"
    url = f"{scheme}://{record.authority}{record.path}" if record.authority else record.path
    return HttpEvent(  # by position: twice as quick, and done twice for each request
        time_ns,
        "request" if is_request else "response",
        _DROP if refused else _ACCEPT,
        (judgement.drop_reason or _INVALID) if refused else 0,
        _INGRESS if judgement.direction is _TOWARDS else _EGRESS,
        ends.source,
        ends.destination,
        ends.source_port,
        ends.destination_port,
        judgement.source_identity,
        judgement.destination_identity,
        judgement.source_endpoint,
        judgement.destination_endpoint,
        record.method,
        url,
        record.protocol,
        0 if is_request else record.status,  # Hubble's request has no code
        int(record.latency_s * 1e9),
        record.request_id,
        judgement.revision,
        record.headers,
        judgement.allowed_by,
        judgement.denied_by,
        judgement.isolated_by,
        record.detail or judgement.detail,
        record.server_name,
    )


def is_final(record: Record) -> bool:
    """Whether nothing more will be said about this request: one text line is written then."""
    return record.kind is not _REQUEST or bool(record.detail)


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
