"""Which flows to show: Hubble's filter flags over flow records.

The same flag given again widens (OR); different flags narrow (AND); a negated term that matches
takes the flow out, whatever else matches. `pod`, `namespace`, `label`, `ip`, `port`, `identity` and
`fqdn` mean either side; with `from-` or `to-` before them the sending or the receiving one.

A filter is compiled once, every value is checked then, and a wrong one says which flag it was for.
Source: hubble/cmd/observe (flags), pkg/hubble/filters (meaning).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import urlsplit

import re2

from conntrack.address import address_in, parse_address, parse_prefix
from firewall.flows.compact import TRACE_POINTS, deciding_policies
from firewall.flows.flow import (
    EVENT_DROP,
    EVENT_L7,
    EVENT_POLICY_VERDICT,
    EVENT_TRACE,
    Flow,
    FlowEndpoint,
)
from firewall.flows.summary import TCP_FLAG_NAMES, flag_names
from firewall.identities.labels import LabelError, LabelSet
from firewall.identities.reserved import NUMBERS
from firewall.identities.selector import Operator, Requirement, Selector, SelectorError, require
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


class FilterError(ValueError):
    """A filter's value cannot be used; the message names flag and value."""

    def __init__(self, flag: str, value: str, why: str) -> None:
        self.flag = flag
        self.value = value
        super().__init__(f"--{flag} {value!r}: {why}")


class Term(NamedTuple):
    """One flag with one value; `negated` by a `--not` before it."""

    flag: str
    value: str
    negated: bool = False


class Filter:
    """The compiled terms; call it with a flow.

    Args:
        terms: in any order.

    Raises:
        FilterError: an unknown flag or a value that the flag does not take.
    """

    def __init__(self, terms: Iterable[Term] = ()) -> None:
        wanted: dict[str, list[Predicate]] = {}
        self._unwanted: list[Predicate] = []
        for flag, value, negated in terms:
            predicate = compile_term(flag, value)
            if negated:
                self._unwanted.append(predicate)
            else:
                wanted.setdefault(flag, []).append(predicate)
        self._wanted = tuple(tuple(group) for group in wanted.values())

    def __call__(self, flow: Flow) -> bool:
        """Say whether the flow is to be shown."""
        for group in self._wanted:
            if not any(predicate(flow) for predicate in group):
                return False
        return not any(predicate(flow) for predicate in self._unwanted)

    def __bool__(self) -> bool:
        """Whether there is anything to check."""
        return bool(self._wanted or self._unwanted)


def compile_term(flag: str, value: str) -> Predicate:
    """Make the test for one flag and value.

    Raises:
        FilterError: an unknown flag or a value that the flag does not take.
    """
    try:
        if flag in _WHOLE:
            return _WHOLE[flag](value)
        side, dash, rest = flag.partition("-")
        if dash and side in ("from", "to") and rest in _SIDES:
            return _one_side(_SIDES[rest](value), sender=side == "from")
        if flag in _SIDES:
            test = _SIDES[flag](value)
            sends, receives = _one_side(test, sender=True), _one_side(test, sender=False)
            return lambda flow: sends(flow) or receives(flow)
    except FilterError:
        raise
    except (ValueError, LabelError, SelectorError) as error:
        raise FilterError(flag, value, str(error)) from error
    raise FilterError(flag, value, f"no such filter; there are {', '.join(flags())}")


def flags() -> list[str]:
    """Return every flag there is, sorted, `from-` and `to-` forms included."""
    sided = [f"{prefix}{name}" for name in _SIDES for prefix in ("", "from-", "to-")]
    return sorted((*_WHOLE, *sided))


# --- filters for a side of the flow -------------------------------------------------------------


class Side(NamedTuple):
    """The sender or the receiver of a flow."""

    endpoint: FlowEndpoint
    address: str
    port: int | None
    names: tuple[str, ...]


SideTest = Callable[[Side], bool]

_NOBODY = FlowEndpoint()


def _one_side(test: SideTest, *, sender: bool) -> Predicate:
    def matches(flow: Flow) -> bool:
        ports = None
        if flow.l4 is not None:
            ports = flow.l4.tcp or flow.l4.udp or flow.l4.sctp
        if sender:
            side = Side(
                flow.source or _NOBODY,
                flow.ip.source if flow.ip else "",
                ports.source_port if ports else None,
                flow.source_names,
            )
        else:
            side = Side(
                flow.destination or _NOBODY,
                flow.ip.destination if flow.ip else "",
                ports.destination_port if ports else None,
                flow.destination_names,
            )
        return test(side)

    return matches


def _pod(value: str) -> SideTest:
    """[namespace/]prefix of the name; without a namespace it is `default`."""
    namespace, slash, name = value.partition("/")
    if not slash:
        namespace, name = "default", value
    if not namespace and not name:
        raise ValueError("name a pod: [namespace/]name")

    def test(side: Side) -> bool:
        pod = side.endpoint.pod_name
        in_namespace = not namespace or side.endpoint.namespace == namespace
        return bool(pod) and in_namespace and pod.startswith(name)

    return test


def _namespace(value: str) -> SideTest:
    if not value:
        raise ValueError("name a namespace")
    return lambda side: side.endpoint.namespace == value


_IN = re.compile(r"(\S+)\s+(in|notin)\s*\(([^()]*)\)")
_COMMA = re.compile(r",(?![^()]*\))")


def parse_label_selector(text: str) -> Selector:
    """Read a selector as Hubble's `--label` and `kubectl -l` take it.

    Args:
        text: comma-separated `key`, `!key`, `key=value`, `key==value`, `key!=value`,
            `key in (a, b)`, `key notin (a, b)`; a key may have a source, `k8s:app`.

    Raises:
        ValueError: it is none of these.
    """
    return Selector(tuple(_label_requirement(part.strip()) for part in _COMMA.split(text)))


def _label_requirement(text: str) -> Requirement:
    if found := _IN.fullmatch(text):
        key, word, listed = found.groups()
        operator = Operator.IN if word == "in" else Operator.NOT_IN
        return require(key, operator, [value.strip() for value in listed.split(",")])
    if any(character in text for character in "() ") or not text:
        raise ValueError(f"{text!r} is no label term; write key=value, !key or key in (a, b)")
    if text.startswith("!"):
        return require(text[1:], Operator.DOES_NOT_EXIST)
    key, equals, value = text.partition("=")
    if not equals:
        return require(text, Operator.EXISTS)
    if key.endswith("!"):
        return require(key[:-1], Operator.NOT_IN, [value])
    return require(key, Operator.IN, [value.removeprefix("=")])


@lru_cache(maxsize=4096)
def _label_set(labels: tuple[str, ...]) -> LabelSet | None:
    try:
        return LabelSet.parse(labels)
    except LabelError:
        return None


def _label(value: str) -> SideTest:
    selector = parse_label_selector(value)

    def test(side: Side) -> bool:
        labels = _label_set(side.endpoint.labels)
        return labels is not None and selector.matches(labels)

    return test


@lru_cache(maxsize=4096)
def _packed(text: str) -> bytes:
    """Return a flow's address packed; empty if the record has none."""
    try:
        return parse_address(text)
    except ValueError:
        return b""


def _ip(value: str) -> SideTest:
    prefix = parse_prefix(value)

    def test(side: Side) -> bool:
        address = _packed(side.address)
        return len(address) == len(prefix.network) and address_in(address, prefix)

    return test


def _port(value: str) -> SideTest:
    if not value.isascii() or not value.isdecimal() or int(value) > 65535:
        raise ValueError("a port is a number 0-65535")
    number = int(value)
    return lambda side: side.port == number


def _identity(value: str) -> SideTest:
    """A number, or the name of a reserved identity, with or without `reserved:`."""
    name = value.removeprefix("reserved:")
    if name in NUMBERS:
        number = int(NUMBERS[name])
    elif value.isascii() and value.isdecimal():
        number = int(value)
    else:
        raise ValueError(f"neither a number nor one of {', '.join(NUMBERS)}")
    return lambda side: side.endpoint.identity == number and side.endpoint is not _NOBODY


def _fqdn(value: str) -> SideTest:
    """A name in which `*` stands for any characters; case and a final dot do not matter."""
    name = value.lower().removesuffix(".")
    if not name:
        raise ValueError("name a host; * stands for any characters")
    pattern = re.compile(".*".join(map(re.escape, name.split("*"))), re.DOTALL)
    return lambda side: any(pattern.fullmatch(n.lower().removesuffix(".")) for n in side.names)


_SIDES: dict[str, Callable[[str], SideTest]] = {
    "pod": _pod,
    "namespace": _namespace,
    "label": _label,
    "ip": _ip,
    "port": _port,
    "identity": _identity,
    "fqdn": _fqdn,
}


# --- filters for the whole flow ----------------------------------------------------------------


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


_WHOLE: dict[str, Callable[[str], Predicate]] = {
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
