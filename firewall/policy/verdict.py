"""What policy may answer, in Cilium's and Hubble's own names and numbers.

Sources: flow.proto (`Verdict`, `DropReason`, `TrafficDirection`) and pkg/monitor/api/drop.go of
cilium/cilium; PolicyMatchType in pkg/monitor/api/policy.go.
"""

from enum import IntEnum


class Verdict(IntEnum):
    """The answer for one packet or request."""

    ACCEPT = 1
    DROP = 2
    REDIRECT = 5


class TrafficDirection(IntEnum):
    """Which endpoint's policy is meant: the destination's (INGRESS) or the source's (EGRESS)."""

    INGRESS = 1
    EGRESS = 2


class PolicyMatch(IntEnum):
    """How specific the deciding policy-map entry was (Hubble's `policy_match_type`)."""

    NONE = 0
    L3_ONLY = 1
    L3_L4 = 2
    L4_ONLY = 3
    ALL = 4
    L3_PROTO = 5
    PROTO_ONLY = 6


class DropReason(IntEnum):
    """Why a packet or request was dropped; numbers as in Cilium's DropReason enum."""

    INVALID_SOURCE_IP = 132
    POLICY_DENIED = 133
    INVALID_PACKET_DROPPED = 134
    CT_TRUNCATED_OR_INVALID_HEADER = 135
    CT_UNKNOWN_L4_PROTOCOL = 137
    UNSUPPORTED_L3_PROTOCOL = 139
    UNKNOWN_L4_PROTOCOL = 142
    STALE_OR_UNROUTABLE_IP = 151
    CT_MAP_INSERTION_FAILED = 155
    IP_FRAGMENTATION_NOT_SUPPORTED = 157
    UNKNOWN_CONNECTION_TRACKING_STATE = 163
    INVALID_IDENTITY = 171
    FORBIDDEN_ICMP6_MESSAGE = 176
    PROXY_REDIRECTION_NOT_SUPPORTED_FOR_PROTOCOL = 180
    POLICY_DENY = 181
    AUTH_REQUIRED = 189
    TTL_EXCEEDED = 196
    DROP_RATE_LIMITED = 198
    DROP_EP_NOT_READY = 203


DROP_TEXT: dict[DropReason, str] = {
    DropReason.INVALID_SOURCE_IP: "Invalid source ip",
    DropReason.POLICY_DENIED: "Policy denied",
    DropReason.INVALID_PACKET_DROPPED: "Invalid packet",
    DropReason.CT_TRUNCATED_OR_INVALID_HEADER: "CT: Truncated or invalid header",
    DropReason.CT_UNKNOWN_L4_PROTOCOL: "CT: Unknown L4 protocol",
    DropReason.UNSUPPORTED_L3_PROTOCOL: "Unsupported L3 protocol",
    DropReason.UNKNOWN_L4_PROTOCOL: "Unknown L4 protocol",
    DropReason.STALE_OR_UNROUTABLE_IP: "Stale or unroutable IP",
    DropReason.CT_MAP_INSERTION_FAILED: "CT: Map insertion failed",
    DropReason.IP_FRAGMENTATION_NOT_SUPPORTED: "IP fragmentation not supported",
    DropReason.UNKNOWN_CONNECTION_TRACKING_STATE: "Unknown connection tracking state",
    DropReason.INVALID_IDENTITY: "Invalid identity",
    DropReason.FORBIDDEN_ICMP6_MESSAGE: "Forbidden ICMPv6 message",
    DropReason.PROXY_REDIRECTION_NOT_SUPPORTED_FOR_PROTOCOL: (
        "Proxy redirection not supported for protocol"
    ),
    DropReason.POLICY_DENY: "Policy denied by denylist",
    DropReason.AUTH_REQUIRED: "Authentication required",
    DropReason.TTL_EXCEEDED: "TTL exceeded",
    DropReason.DROP_RATE_LIMITED: "Rate limited",
    DropReason.DROP_EP_NOT_READY: "Endpoint policy program not available",
}
"""The text that `cilium monitor` and `hubble observe` print for each reason."""
