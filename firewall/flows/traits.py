"""Filters for what a flow is as a whole: its verdict, type, protocol, request.

Each makes a test of one value, which is checked then: ValueError says what is wrong with it.
"""

from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import re2

from firewall.flows.compact import TRACE_POINTS, deciding_policies
from firewall.flows.flow import (
    EVENT_DROP,
    EVENT_L7,
    EVENT_POLICY_VERDICT,
    EVENT_TRACE,
    Flow,
)
from firewall.flows.summary import TCP_FLAG_NAMES, flag_names
from firewall.policy.verdict import DropReason

Predicate = Callable[[Flow], bool]

VERDICTS = ("FORWARDED", "DROPPED", "AUDIT", "REDIRECTED", "ERROR", "TRACED", "TRANSLATED")
"""What `--verdict` takes, in any case."""

TYPES: dict[str, int] = {
    "drop": EVENT_DROP,
    "trace": EVENT_TRACE,
    "policy-verdict": EVENT_POLICY_VERDICT,
    "l7": EVENT_L7,
}
"""What `--type` takes before the colon."""

PROTOCOLS = ("tcp", "udp", "sctp", "icmp", "icmpv4", "icmpv6", "http", "dns", "tls")
"""What `--protocol` takes."""


def _choice(value: str, choices: Sequence[str]) -> str:
    for choice in choices:
        if choice.lower() == value.lower():
            return choice
    raise ValueError(f"one of {', '.join(choices)}")


def _verdict(value: str) -> Predicate:
    verdict = _choice(value, VERDICTS)
    return lambda flow: flow.verdict == verdict


def _type(value: str) -> Predicate:
    """TYPE or TYPE:SUBTYPE; a drop's subtype is its reason, a trace's where it was seen.

    Cilium reports a packet that policy drops twice, as a verdict and as a drop. We report it once,
    as a verdict, and whoever asks for drops gets it.
    """
    name, colon, detail = value.partition(":")
    number = TYPES[_choice(name, list(TYPES))]
    if number == EVENT_DROP:
        reason = _reason_number(detail) if colon else None
        return lambda flow: (
            flow.verdict == "DROPPED"
            and flow.event_type is not None
            and flow.event_type.type in (EVENT_DROP, EVENT_POLICY_VERDICT)
            and reason in (None, flow.drop_reason)
        )
    if not colon:
        return lambda flow: flow.event_type is not None and flow.event_type.type == number
    if number == EVENT_TRACE:
        points = {text: point for point, text in TRACE_POINTS.items()}
        subtype = points[_choice(detail, list(points))]
    elif detail.isascii() and detail.isdecimal():
        subtype = int(detail)
    else:
        raise ValueError(f"type {name} has no subtype {detail!r}")
    return lambda flow: (
        flow.event_type is not None
        and flow.event_type.type == number
        and flow.event_type.sub_type == subtype
    )


def _reason_number(value: str) -> int:
    if value.isascii() and value.isdecimal():
        return int(value)
    return DropReason[_choice(value, [reason.name for reason in DropReason])]


def _drop_reason(value: str) -> Predicate:
    reason = _choice(value, [reason.name for reason in DropReason])
    return lambda flow: flow.drop_reason_desc == reason


def _protocol(value: str) -> Predicate:
    name = _choice(value, PROTOCOLS)
    if name == "http":
        return lambda flow: flow.l7 is not None and flow.l7.http is not None
    if name == "dns":
        return lambda flow: flow.l7 is not None and flow.l7.dns is not None
    if name == "tls":
        return lambda flow: (
            flow.extensions is not None
            and (flow.extensions.value.layer7 == "TLS" or bool(flow.extensions.value.server_name))
        )
    if name == "icmp":
        return lambda flow: flow.l4 is not None and bool(flow.l4.icmpv4 or flow.l4.icmpv6)
    return lambda flow: flow.l4 is not None and getattr(flow.l4, name) is not None


def _tcp_flags(value: str) -> Predicate:
    """Comma-separated; all of them must be set, others may be."""
    known = (*TCP_FLAG_NAMES, "NS")
    wanted = {_choice(name.strip(), known) for name in value.split(",")}

    def matches(flow: Flow) -> bool:
        tcp = flow.l4.tcp if flow.l4 is not None else None
        return tcp is not None and wanted <= set(flag_names(tcp.flags))

    return matches


def _direction(value: str) -> Predicate:
    direction = _choice(value, ("INGRESS", "EGRESS"))
    return lambda flow: flow.traffic_direction == direction


def _ip_version(value: str) -> Predicate:
    versions = {"none": "", "v4": "IPv4", "v6": "IPv6", "4": "IPv4", "6": "IPv6",
                "ipv4": "IPv4", "ipv6": "IPv6"}  # fmt: skip
    version = versions[_choice(value, list(versions))]
    return lambda flow: (flow.ip.ip_version if flow.ip else "") == version


def _http_method(value: str) -> Predicate:
    method = value.upper()
    return lambda flow: (
        flow.l7 is not None and flow.l7.http is not None and flow.l7.http.method.upper() == method
    )


def _regex(value: str) -> "re2._Regexp":
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(value, options)
    except re2.error as error:
        reason = error.args[0] if error.args else error
        text = reason.decode() if isinstance(reason, bytes) else reason
        raise ValueError(f"no regular expression (RE2): {text}") from error


def _http_path(value: str) -> Predicate:
    """RE2, found anywhere in the path (without the query)."""
    pattern = _regex(value)

    def matches(flow: Flow) -> bool:
        if flow.l7 is None or flow.l7.http is None:
            return False
        try:
            path = urlsplit(flow.l7.http.url).path
        except ValueError:
            return False
        return pattern.search(path) is not None

    return matches


def _http_url(value: str) -> Predicate:
    pattern = _regex(value)
    return lambda flow: (
        flow.l7 is not None
        and flow.l7.http is not None
        and pattern.search(flow.l7.http.url) is not None
    )


def _http_status(value: str) -> Predicate:
    """A whole code, or a beginning of one: `404`, `4+`."""
    digits = value.removesuffix("+")
    if not digits.isascii() or not digits.isdecimal() or len(digits) > 3:
        raise ValueError("a status is three digits, or fewer and a plus sign: 404, 40+, 5+")
    if not value.endswith("+") and len(digits) != 3:
        raise ValueError("a status has three digits; for a beginning write a plus sign: 4+")

    def matches(flow: Flow) -> bool:
        http = flow.l7.http if flow.l7 is not None else None
        return http is not None and bool(http.code) and str(http.code).startswith(digits)

    return matches


def _http_header(value: str) -> Predicate:
    """`name:value`; the name in any case, the value exactly."""
    name, colon, content = value.partition(":")
    if not colon or not name:
        raise ValueError("write name:value")
    wanted = (name.lower(), content.strip())

    def matches(flow: Flow) -> bool:
        http = flow.l7.http if flow.l7 is not None else None
        return http is not None and any(
            (header.key.lower(), header.value) == wanted for header in http.headers
        )

    return matches


def _reply(value: str) -> Predicate:
    wanted = _choice(value or "true", ("true", "false")) == "true"
    return lambda flow: flow.is_reply is wanted


def _policy(value: str) -> Predicate:
    """[namespace/]name of a policy that decided, or that isolated the endpoint of a default deny.

    Hubble has no such filter; it answers "what does this policy do right now?".
    """
    namespace, slash, name = value.rpartition("/")
    if not name:
        raise ValueError("name a policy: [namespace/]name")

    def named(policy_namespace: str, policy_name: str) -> bool:
        return policy_name == name and (not slash or policy_namespace == namespace)

    def matches(flow: Flow) -> bool:
        if any(named(policy.namespace, policy.name) for policy in deciding_policies(flow)):
            return True
        if flow.verdict not in ("DROPPED", "AUDIT") or flow.extensions is None:
            return False
        return any(named(r.namespace, r.name) for r in flow.extensions.value.isolated_by)

    return matches


TRAITS: dict[str, Callable[[str], Predicate]] = {
    "verdict": _verdict,
    "type": _type,
    "drop-reason-desc": _drop_reason,
    "protocol": _protocol,
    "tcp-flags": _tcp_flags,
    "traffic-direction": _direction,
    "ip-version": _ip_version,
    "http-method": _http_method,
    "http-path": _http_path,
    "http-url": _http_url,
    "http-status": _http_status,
    "http-header": _http_header,
    "reply": _reply,
    "policy": _policy,
    "uuid": lambda value: lambda flow: flow.uuid == value,
    "node-name": lambda value: lambda flow: flow.node_name == value,
}
"""By flag."""
