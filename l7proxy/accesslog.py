"""Records of requests as flow events for the agent."""

from functools import lru_cache
from typing import NamedTuple

from conntrack.address import parse_address
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


SocketAddress = tuple[str, int] | tuple[str, int, int, int]
"""As the socket module has it: address and port, for IPv6 flow label and scope as well."""


class Ends(NamedTuple):
    """The two ends of a client connection: packed addresses, ports in host order.

    `upstream_port`: ours towards the server, 0 = there was no connection yet. `connection_id`: a
    number that no other connection of this worker has. `begun_at`: monotonic seconds.
    """

    source: bytes
    source_port: int
    destination: bytes
    destination_port: int
    upstream_port: int = 0
    connection_id: int = 0
    begun_at: float = 0.0


@lru_cache(maxsize=4096)  # a few clients and servers have most connections
def _packed(address: str) -> bytes:
    """Return the packed address, without the scope of a link-local one."""
    return parse_address(address.partition("%")[0])


def ends_of(
    client: SocketAddress, server: SocketAddress, connection_id: int = 0, begun_at: float = 0.0
) -> Ends:
    """Return the ends of a connection from the addresses that its socket gives."""
    source, destination = _packed(client[0]), _packed(server[0])
    return Ends(source, client[1], destination, server[1], 0, connection_id, begun_at)


def http_event(
    record: Record, ends: Ends, time_ns: int, connection: Judgement | None = None
) -> HttpEvent:
    """Return the flow event of a record; `time_ns` is the wall clock's.

    `connection`: what policy says of the connection, if it was not asked about the request; the
    event names its ends by it, and no rule.
    """
    judgement = record.judgement or _not_judged(connection)
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


def _not_judged(connection: Judgement | None) -> Judgement:
    if connection is None:
        return _NOT_JUDGED
    return connection._replace(
        allowed=False, drop_reason=0, allowed_by=(), denied_by=(), isolated_by=(), detail=""
    )


def is_final(record: Record) -> bool:
    """Whether nothing more will be said about this request: one text line is written then."""
    return record.kind is not _REQUEST or bool(record.detail)
