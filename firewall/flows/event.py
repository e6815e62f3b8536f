"""What a worker reports about one decision, in the fewest bytes that lose nothing.

Workers know numbers, the agent knows names: an event carries packed addresses and identity numbers,
and `firewall.flows.record` makes a Hubble flow of it. Times are nanoseconds of the wall clock.
"""

import msgspec

from firewall.policy.snapshot import OriginRow


class PacketEvent(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A packet that opened a flow, was dropped, or whose flow was decided anew.

    Addresses are packed; empty `source` = the packet could not be parsed. `verdict`
    is `Verdict`, `drop_reason` is `DropReason` or 0, `direction` is `TrafficDirection` or 0,
    `match` is `PolicyMatch`. `tcp_flags` are the header's flag bits (CWR=128 .. FIN=1). Ports are
    host order; for ICMP `icmp_type`/`icmp_code` are set. `audited`: would have been dropped.
    `allowed_by`/`denied_by` of each direction name the deciding rules; `isolated_by` who switched
    default deny on. `reply` None = unknown. `detail` says more than the drop reason, or "".
    `packet` is its head, from the IP header on, while somebody watches; else empty.
    """

    time_ns: int
    verdict: int
    drop_reason: int
    direction: int
    source: bytes
    destination: bytes
    protocol: int
    source_port: int
    destination_port: int
    tcp_flags: int
    icmp_type: int
    icmp_code: int
    length: int
    source_identity: int
    destination_identity: int
    source_endpoint: int
    destination_endpoint: int
    match: int
    audited: bool
    reply: bool | None
    ct_state: str
    interface_index: int
    proxy_port: int
    policy_revision: int
    egress_allowed_by: tuple[OriginRow, ...] = ()
    ingress_allowed_by: tuple[OriginRow, ...] = ()
    egress_denied_by: tuple[OriginRow, ...] = ()
    ingress_denied_by: tuple[OriginRow, ...] = ()
    isolated_by: tuple[OriginRow, ...] = ()
    policy_log: tuple[str, ...] = ()
    detail: str = ""
    packet: bytes = b""


class HttpEvent(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """One HTTP request as decided (`code` 0), or its response (`code` the status).

    `source` is the client and `destination` the server, in a response too.
    `kind` is "request" or "response". `verdict` as in PacketEvent; `latency_ns` from request head
    to response head. `url` is scheme://authority/path as matched. `headers` may be redacted.
    `server_name`: what the client's TLS asks for. `protocol` "TLS" or "TCP": a connection whose
    bytes pass unread, as decided and at its end; it has no request, and its name as `url`.
    """

    time_ns: int
    kind: str
    verdict: int
    drop_reason: int
    direction: int
    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    source_identity: int
    destination_identity: int
    source_endpoint: int
    destination_endpoint: int
    method: str
    url: str
    protocol: str
    code: int
    latency_ns: int
    request_id: str
    policy_revision: int
    headers: tuple[tuple[str, str], ...] = ()
    allowed_by: tuple[OriginRow, ...] = ()
    denied_by: tuple[OriginRow, ...] = ()
    isolated_by: tuple[OriginRow, ...] = ()
    detail: str = ""
    server_name: str = ""


class DnsEvent(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """One DNS question as decided, or its answer.

    `source` is the client and `destination` the server, in an answer too. `kind` is "request" or
    "response"; `transport` the IANA protocol. `query` is the name in lower case with a trailing
    dot, "" = unreadable; `addresses` are packed; `rcode` of a refused question is the one it was
    refused with. The rest as in HttpEvent.
    """

    time_ns: int
    kind: str
    verdict: int
    drop_reason: int
    direction: int
    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    source_identity: int
    destination_identity: int
    source_endpoint: int
    destination_endpoint: int
    transport: int
    query: str
    query_types: tuple[str, ...]
    rcode: int
    addresses: tuple[bytes, ...]
    ttl_s: int
    cnames: tuple[str, ...]
    answer_types: tuple[str, ...]
    latency_ns: int
    policy_revision: int
    allowed_by: tuple[OriginRow, ...] = ()
    denied_by: tuple[OriginRow, ...] = ()
    isolated_by: tuple[OriginRow, ...] = ()
    detail: str = ""


Event = PacketEvent | HttpEvent | DnsEvent
