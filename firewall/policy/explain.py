"""Why a packet or request is allowed or refused, and what the smallest change would be.

The decision itself is the view's; this module walks the same rows again, slowly, and writes down
for every rule which of its conditions hold for this traffic: peer, port, authentication, and for a
request the fields of each http item. A rule that decided is marked. For a refusal the closest allow
is named: the one with the fewest failed conditions, of a peer's labels each counted alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from conntrack.address import Prefix, format_address
from firewall.identities.labels import LabelSet
from firewall.policy.advice import Gap, advice
from firewall.policy.conditions import (
    PROTOCOL_WORDS,
    Condition,
    Traffic,
    peer_condition,
    port_condition,
)
from firewall.policy.course import (
    CLEAR,
    Course,
    Form,
    Leg,
    Restriction,
    host_name,
    looks,
    named,
    plan,
)
from firewall.policy.explanation import (
    ACTIONS,
    Explanation,
    Request,
    Step,
    Walk,
    Written,
)
from firewall.policy.http_match import HttpMatcher
from firewall.policy.model import Action
from firewall.policy.model import Peer as PeerSpec
from firewall.policy.policymap import LOCAL_HOST_ENTRY, LOCAL_HOST_ORIGIN, DirectionVerdict
from firewall.policy.snapshot import DirectionRow, EntryRow, HttpRuleRow, L7Row, OriginRow
from firewall.policy.verdict import DROP_TEXT, DropReason, TrafficDirection
from firewall.policy.view import Decision, Peer, View


def explain(
    view: View,
    selectors: Mapping[int, PeerSpec],
    traffic: tuple[bytes, bytes, int, int],
    request: Request | None = None,
    form: Form | None = None,
) -> Explanation:
    """Walk the policies that a packet meets.

    Args:
        view: the snapshot to ask.
        selectors: what each selector number means (`Resolver.selectors`).
        traffic: source and destination (packed addresses), protocol, port, as for `View.decide`.
        request: the http request, None to ask about the connection only.
        form: how the connection begins; None: not asked, and clear text for a request.
    """
    source, destination, protocol, port = traffic
    decision = view.decide(source, destination, protocol, port)
    ends = (decision.source.identity, decision.destination.identity)
    labels = {
        row.number: LabelSet.parse(row.labels)
        for row in view.snapshot.identities
        if row.number in ends
    }
    walker = _Walker(view, selectors, labels, request, _beginning(decision, request, form))
    egress = ingress = None
    if decision.egress is not None:
        peer = _traffic(decision.destination, destination, labels, protocol, port)
        egress = walker.side(TrafficDirection.EGRESS, decision, decision.egress, peer)
    if decision.ingress is not None:
        peer = _traffic(decision.source, source, labels, protocol, port)
        ingress = walker.side(TrafficDirection.INGRESS, decision, decision.ingress, peer)
    return Explanation(
        verdict=_overall(egress, ingress),
        source=_name(decision.source, source, labels),
        destination=_name(decision.destination, destination, labels),
        protocol=PROTOCOL_WORDS.get(protocol, str(protocol)),
        port=port,
        request=_request_line(request),
        form=str(form) if form is not None else "",
        egress=egress,
        ingress=ingress,
    )


class _Beginning(NamedTuple):
    """What the sides make of the form that is asked about; legs of sides that are reached."""

    form: Form
    course: Course | None
    legs: dict[TrafficDirection, Leg]


def _beginning(decision: Decision, request: Request | None, form: Form | None) -> _Beginning | None:
    sides = {
        direction: Restriction(verdict.l7, verdict.unrestricted)
        for direction, verdict in (
            (TrafficDirection.EGRESS, decision.egress),
            (TrafficDirection.INGRESS, decision.ingress),
        )
        if verdict is not None
    }
    if form is None:
        if request is None or not looks(list(sides.values())):
            return None
        form = CLEAR
    course, legs = plan(list(sides.values()), form)
    return _Beginning(form, course, dict(zip(sides, legs, strict=False)))


def _overall(*sides: Walk | None) -> str:
    verdicts = {side.verdict for side in sides if side is not None}
    for verdict in ("denied", "redirected", "audited"):
        if verdict in verdicts:
            return verdict
    return "allowed"


def _traffic(
    peer: Peer, address: bytes, labels: Mapping[int, LabelSet], protocol: int, port: int
) -> Traffic:
    return Traffic(
        selectors=peer.selectors,
        labels=labels.get(peer.identity, LabelSet()),
        prefix=Prefix(address, 8 * len(address)),
        protocol=protocol,
        port=port,
    )


def _name(peer: Peer, address: bytes, labels: Mapping[int, LabelSet]) -> str:
    if peer.endpoint is not None:
        row = peer.endpoint
        named = not row.namespace or row.name.startswith(f"{row.namespace}/")
        return row.name if named else f"{row.namespace}/{row.name}"
    known = labels.get(peer.identity)
    words = [str(label) for label in known or () if label.source != "cidr"]
    return f"{format_address(address)} ({' '.join(words) or peer.identity})"


def _request_line(request: Request | None) -> str:
    if request is None:
        return ""
    parts = (request.method, request.host + request.path)
    return " ".join(part.decode("latin-1") for part in parts)


class _Considered(NamedTuple):
    """A step with the selector number of the row that speaks for it."""

    step: Step
    selector: int


class _Walker:
    """The walk of one question; holds what both sides need."""

    def __init__(
        self,
        view: View,
        selectors: Mapping[int, PeerSpec],
        labels: Mapping[int, LabelSet],
        request: Request | None,
        beginning: _Beginning | None,
    ) -> None:
        self._view = view
        self._selectors = selectors
        self._labels = labels
        self._request = request
        self._beginning = beginning
        self._leg: Leg | None = None
        self._origins = view.snapshot.origins
        self._names: frozenset[str] = frozenset()

    def side(
        self,
        direction: TrafficDirection,
        decision: Decision,
        verdict: DirectionVerdict,
        peer: Traffic,
    ) -> Walk:
        incoming = direction is TrafficDirection.INGRESS
        subject = decision.destination if incoming else decision.source
        assert subject.endpoint is not None
        policy = self._view.policy_of(subject.endpoint.identity)
        row = None if policy is None else (policy.ingress if incoming else policy.egress)
        name = _name(subject, b"", self._labels)
        word = direction.name.lower()
        if row is None or not verdict.enforced:
            because = "no policy for this direction" if verdict.allowed else "no policy yet"
            return Walk(
                direction=word,
                endpoint=name,
                enforced=verdict.enforced,
                verdict="allowed" if verdict.allowed else "denied",
                because=because,
            )
        self._names = self._view.port_names(decision, direction, peer.protocol, peer.port)
        self._leg = self._beginning.legs.get(direction) if self._beginning is not None else None
        considered = self._considered(row, verdict, peer)
        outcome, because = self._outcome(verdict)
        found = Walk(
            direction=word,
            endpoint=name,
            enforced=True,
            verdict=outcome,
            because=because,
            isolated_by=tuple(_written(self._origins[index]) for index in row.isolated_by),
            steps=tuple(one.step for one in considered),
        )
        if outcome not in ("denied", "audited"):
            return found
        return self._with_closest(found, verdict, peer, considered)

    def _outcome(self, verdict: DirectionVerdict) -> tuple[str, str]:
        if verdict.audited:
            return "audited", f"{_reason(verdict)}; audit mode lets it pass"
        if not verdict.allowed:
            return "denied", _reason(verdict)
        if verdict.l7 is None:
            return "allowed", "a rule allows it" if verdict.entries else "no rule denies it"
        if self._beginning is not None:
            return self._outcome_of_form(self._beginning)
        if verdict.unrestricted:
            return "redirected", "through the proxy, which refuses nothing here"
        if self._request is None:
            return "redirected", f"through the proxy, which decides {_decides(verdict.l7)}"
        return self._outcome_of_request(tuple(rule for part in verdict.l7 for rule in part.http))

    def _outcome_of_form(self, beginning: _Beginning) -> tuple[str, str]:
        """Say what the proxy does with the form that is asked about."""
        leg, form = self._leg, beginning.form
        if leg is None:
            return "redirected", "through the proxy, where the side before refuses already"
        if not leg.allowed:
            return "denied", f"the proxy resets the connection: no rule allows {form}"
        if self._request is not None and form.server_name:
            ends = beginning.course is not None and beginning.course.terminate is not None
            if ends and host_name(self._request.host) != form.server_name:
                return "denied", "the proxy answers 421: the host is not the server name"
        if leg.unread:
            return "redirected", "through the proxy, which lets every byte pass here"
        if self._request is None:
            return "redirected", "through the proxy, which decides each request"
        return self._outcome_of_request(leg.http)

    def _outcome_of_request(self, rows: tuple[HttpRuleRow, ...]) -> tuple[str, str]:
        assert self._request is not None
        if HttpMatcher(rows).match(*self._request) is not None:
            return "redirected", "through the proxy, where a rule allows the request"
        return "denied", "the proxy refuses the request: no http rule allows it"

    def _with_closest(
        self, walk: Walk, verdict: DirectionVerdict, peer: Traffic, considered: list[_Considered]
    ) -> Walk:
        """Add which rule came closest to allowing, what failed, and the smallest change."""
        incoming = walk.direction == "ingress"
        if verdict.denied_by:
            decisive = next((step for step in walk.steps if step.decided), None)
            change = "narrow that rule, or take it away"
            if verdict.reason is DropReason.AUTH_REQUIRED:
                change = "authenticate the peer, or take authentication out of that rule"
            return msgspec.structs.replace(walk, closest=decisive, change=change)
        # Where the proxy refused, only rules that let the connection through can be close.
        refused = verdict.allowed and not verdict.audited
        allows = [
            one
            for one in considered
            if one.step.action == "allow" and one.step.failed and (one.step.decided or not refused)
        ]
        if not allows and refused:
            return walk  # what was asked is wrong, not a rule
        if not allows:
            change = f"add an {advice(None, peer, incoming=incoming)}"
            return msgspec.structs.replace(walk, change=change)
        step, selector = min(allows, key=lambda one: one.step.distance)
        spec = self._selectors.get(selector)
        gap = Gap(step.rule.kind, step.rule.namespace, spec, step.conditions)
        change = f"add {advice(gap, peer, incoming=incoming)}"
        return msgspec.structs.replace(walk, closest=step, failed=step.failed[0], change=change)

    def _considered(
        self, row: DirectionRow, verdict: DirectionVerdict, peer: Traffic
    ) -> list[_Considered]:
        """Make one step per rule; of its rows (peers and ports) the closest one speaks."""
        groups: dict[tuple[int, int], list[EntryRow]] = {}
        for entry in row.entries:
            groups.setdefault((entry.origin, entry.l7), []).append(entry)
        decisive = {id(entry) for entry in verdict.entries}
        found = []
        for entries in groups.values():
            decided = any(id(entry) in decisive for entry in entries)
            walked = [_Considered(self._step(e, entries, peer), e.selector) for e in entries]
            step, selector = min(walked, key=lambda one: one.step.distance)
            found.append(_Considered(msgspec.structs.replace(step, decided=decided), selector))
        if LOCAL_HOST_ENTRY in verdict.entries:
            step = Step(
                rule=_written(LOCAL_HOST_ORIGIN),
                action="allow",
                tier=LOCAL_HOST_ENTRY.tier,
                priority=LOCAL_HOST_ENTRY.priority,
                conditions=(),
                decided=True,
            )
            found.append(_Considered(step, LOCAL_HOST_ENTRY.selector))
        return found

    def _step(self, entry: EntryRow, rule: Sequence[EntryRow], peer: Traffic) -> Step:
        others = len({row.selector for row in rule}) - 1
        conditions = [
            peer_condition(entry.selector, self._selectors.get(entry.selector), peer, others),
            port_condition(entry, peer, self._names),
        ]
        if entry.authentication in ("required", "test-always-fail"):
            conditions.append(
                Condition(
                    what="authentication",
                    expected=entry.authentication,
                    actual="no authenticated peer",
                    held=False,
                )
            )
        if entry.l7 >= 0 and not entry.observe:
            conditions += self._form_conditions(entry)
            conditions += self._http_conditions(entry)
        return Step(
            rule=_written(self._origins[entry.origin]),
            action=ACTIONS[Action(entry.action)],
            tier=entry.tier,
            priority=entry.priority,
            conditions=tuple(conditions),
        )

    def _form_conditions(self, entry: EntryRow) -> Iterable[Condition]:
        """Hold the form against what the L7 part of a rule applies to."""
        if self._beginning is None:
            return
        row, form = self._view.snapshot.l7[entry.l7], self._beginning.form
        wants_tls = row.kind == "tls" or row.terminating_tls is not None
        if row.originating_tls is not None and row.terminating_tls is None:
            wants_tls = False
        inside = self._leg is not None and self._leg.terminate is not None and row.kind == "http"
        yield Condition(
            what="TLS",
            expected="TLS" if wants_tls else "clear text",
            actual="TLS" if form.tls else "clear text",
            held=form.tls is wants_tls or (form.tls and inside),
        )
        if row.server_names:
            yield Condition(
                what="serverName",
                expected=" or ".join(row.server_names),
                actual=form.server_name,
                held=form.tls and named(row.server_names, form.server_name),
            )

    def _http_conditions(self, entry: EntryRow) -> Iterable[Condition]:
        """Hold the request against the http item that comes closest."""
        rows = self._view.snapshot.l7[entry.l7].http
        if not rows or self._request is None:
            return ()
        walked = HttpMatcher(rows).conditions(*self._request)
        best = min(walked, key=lambda found: sum(not one.held for one in found))
        return [
            Condition(what=one.field, expected=one.expected, actual=one.actual, held=one.held)
            for one in best
        ]


def _decides(rows: tuple[L7Row, ...]) -> str:
    """Say by what the proxy decides."""
    if not looks([Restriction(rows, unrestricted=False)]):
        return "each request"
    return "by how it begins" + (", and each request" if any(row.http for row in rows) else "")


def _reason(verdict: DirectionVerdict) -> str:
    match verdict.reason:
        case DropReason.POLICY_DENIED:
            return "default deny"
        case DropReason.POLICY_DENY:
            return "a deny rule"
        case None:
            return ""
        case reason:
            return DROP_TEXT[reason].lower()


def _written(row: OriginRow) -> Written:
    return Written(
        kind=row.kind,
        namespace=row.namespace,
        name=row.name,
        path=row.path,
        file=row.file,
        line=row.line,
        column=row.column,
    )
