"""What flows say, as answers: the same words as the model's, so that the two can be compared."""

from firewall.flows.flow import Flow, Policy, RuleReference
from firewall.policy.snapshot import OriginRow
from firewall.policy.verdict import DropReason
from policytest.answer import (
    AUDIT,
    NO_POLICY,
    Answer,
    name_of,
    passed,
    refused,
    refused_hello,
    refused_request,
)

_PASSED = frozenset({"FORWARDED", "REDIRECTED"})
_REASONS = {reason.name: reason for reason in DropReason}


def of_packet(flow: Flow) -> Answer:
    """Return what a packet's flow says about it."""
    direction = flow.traffic_direction.lower()
    why = flow.extensions.value.why if flow.extensions is not None else ""
    if flow.verdict == "AUDIT":
        return Answer(True, (AUDIT,), direction=direction, why="audit mode lets it pass")
    if flow.verdict in _PASSED:
        by = _names((*flow.egress_allowed_by, *flow.ingress_allowed_by))
        return passed(direction, _rules(flow))._replace(
            by=by or (NO_POLICY,), why=why or "no policy restricts it"
        )
    reason = _REASONS.get(flow.drop_reason_desc)
    if reason is None:
        return Answer(False, (flow.drop_reason_desc,), flow.drop_reason_desc, direction, why)
    answer = refused(direction, reason, _rules(flow) if _denied(flow) else (), _isolating(flow))
    return answer._replace(by=_names(_denied(flow)) or answer.by, why=why or answer.why)


def of_request(packet: Flow, request: Flow, *, allowed: bool) -> Answer:
    """Return what the flows of a request through the proxy say.

    Args:
        packet: of the connection's first packet.
        request: of the request.
        allowed: whether the server was reached.
    """
    direction = request.traffic_direction.lower()
    if allowed:
        allowing = (*request.egress_allowed_by, *request.ingress_allowed_by)
        connection = of_packet(packet)
        names = dict.fromkeys((*connection.by, *_names(allowing)))
        rules = dict.fromkeys((*connection.rules, *_rules(request)))
        return passed(direction, tuple(rules))._replace(by=tuple(names))
    answer = refused_request(direction, _rules(request), request.drop_reason_desc)
    return answer._replace(by=_names(_denied(request)) or answer.by)


def of_hello(request: Flow) -> Answer:
    """Return what the flow of a refused server name says."""
    direction = request.traffic_direction.lower()
    answer = refused_hello(direction, _rules(request), request.drop_reason_desc)
    return answer._replace(by=_names(_denied(request)) or answer.by)


def _denied(flow: Flow) -> tuple[Policy, ...]:
    return (*flow.egress_denied_by, *flow.ingress_denied_by)


def _names(policies: tuple[Policy, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([name_of(one.namespace, one.name) for one in policies]))


def _rules(flow: Flow) -> tuple[OriginRow, ...]:
    return _origins(flow.extensions.value.rules) if flow.extensions is not None else ()


def _isolating(flow: Flow) -> tuple[OriginRow, ...]:
    return _origins(flow.extensions.value.isolated_by) if flow.extensions is not None else ()


def _origins(references: tuple[RuleReference, ...]) -> tuple[OriginRow, ...]:
    return tuple(
        OriginRow(
            kind=one.kind,
            namespace=one.namespace,
            name=one.name,
            path=one.path,
            file=one.file,
            line=one.line,
            column=one.column,
        )
        for one in references
    )
