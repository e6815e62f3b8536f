"""Policy for the proxy: a snapshot's answers about connections and requests.

One `Policy` per worker holds the snapshot in force; one `ConnectionJudge` per client connection
asks it. The pair (source, destination) is decided by the same View that the datapath uses; a
redirected connection has http rules on the egress side, the ingress side, or both, and a request
must satisfy each side that has some. Rules are compiled once per list and kept over snapshots that
repeat it.

What rules make of TLS is the business of `firewall.policy.course`: a connection is judged in the
form in which it began, and ends when a snapshot asks for more of it than what was begun.

Fail closed: without a snapshot, and by rules that this proxy does not enforce (any kind but "http"
and "tls"), nothing is allowed. Source: cilium/proxy, cilium_network_filter and cilium_l7policy:
first the connection, then each request.
"""

from collections.abc import Iterator
from typing import NamedTuple

from firewall.policy import course
from firewall.policy.course import CLEAR, Course, Form, Leg, Restriction, host_name
from firewall.policy.http_match import HeaderEdit, HttpMatch, HttpMatcher, SecretReader
from firewall.policy.policymap import DirectionVerdict
from firewall.policy.snapshot import HttpRuleRow, OriginRow, Snapshot
from firewall.policy.verdict import DropReason, TrafficDirection, Verdict
from firewall.policy.view import Decision, Peer, View
from l7proxy.judgement import Judgement
from l7proxy.request import Request

TCP = 6
"""IANA protocol number."""

_MATCHER_COUNT = 1024  # compiled lists kept; a list of ten rules is about 20 kB of RE2 programs

_PLAN_COUNT = 1024
"""Pairs of ends whose plan is kept until the next snapshot, about 2 kB each without the answers."""
_PLAN_MEMO_COUNT = 64
"""Answers that each of them keeps, to a method, target and authority: about 30 MB for all."""

_MEMO_COUNT = 4096  # answers remembered per list of rules, at most 2 MB with their keys
_MEMO_KEY_BYTES = 256  # longer targets are matched each time, or a client could fill the memory


_NO_SNAPSHOT = Judgement(
    allowed=False,
    connected=False,
    direction=TrafficDirection.INGRESS,
    drop_reason=DropReason.DROP_EP_NOT_READY,
    revision=0,
    detail="no snapshot",
)


class _Rules:
    """A compiled list of http rules, with the answers that depend on nothing but the key."""

    __slots__ = ("_matcher", "_memo", "secret_headers", "uses_headers")

    def __init__(self, rows: tuple[HttpRuleRow, ...], secrets: SecretReader | None) -> None:
        self._matcher = HttpMatcher(rows, secrets=secrets)
        self._memo: dict[tuple[bytes, bytes, bytes], HttpMatch] = {}
        self.uses_headers = any(row.headers or row.header_matches for row in rows)
        self.secret_headers = frozenset(
            match.name.lower().encode()
            for row in rows
            for match in row.header_matches
            if match.secret_name is not None
        )

    def evaluate(self, request: Request) -> HttpMatch:
        """Return the rule that allows a request, and what to change in it."""
        method, target = request.method, request.target
        if self.uses_headers:
            return self._matcher.evaluate(method, target.wire, target.authority, request.headers)
        key = method, target.wire, target.authority
        found = self._memo.get(key)
        if found is None:
            found = self._matcher.evaluate(*key, ())
            if sum(map(len, key)) <= _MEMO_KEY_BYTES:
                if len(self._memo) >= _MEMO_COUNT:
                    self._memo.clear()
                self._memo[key] = found
        return found


class _Side(NamedTuple):
    """The http rules of one direction; `rules` None: this side restricts nothing.

    `leg`: what this side says to the connection's form. `written` says where each rule stands;
    `answers` keeps what was answered before, per rule.
    """

    direction: TrafficDirection
    verdict: DirectionVerdict
    leg: Leg
    rules: _Rules | None
    audit: bool
    written: dict[HttpRuleRow, tuple[OriginRow, ...]]
    answers: dict[HttpRuleRow | None, Judgement]


class _Plan(NamedTuple):
    """What the snapshot in force makes of a pair of ends, a port and a form.

    `connection` as a judge answers; `looks` and `passes_unread` of the sides that have a policy;
    `course` and `sides` as for the form, `uses_headers` and `redacted` as in a judgement. `memo`:
    what was answered to a method, target and authority, where nothing else matters.
    """

    decision: Decision
    connection: Judgement
    looks: bool
    passes_unread: bool
    course: Course | None
    sides: list[_Side]
    uses_headers: bool
    redacted: frozenset[bytes]
    memo: dict[tuple[bytes, bytes, bytes], Judgement]


class Policy:
    """The snapshot in force and what was compiled from it.

    `view` None: none was loaded yet, everything is refused.
    """

    def __init__(self, secrets: SecretReader | None = None) -> None:
        self.view: View | None = None
        self._secrets = secrets
        self._rules: dict[tuple[HttpRuleRow, ...], _Rules] = {}
        self._plans: dict[tuple[bytes, bytes, int, Form], _Plan] = {}

    @property
    def revision(self) -> int:
        """The snapshot's revision, 0 = none."""
        return 0 if self.view is None else self.view.revision

    @property
    def policy_revision(self) -> int:
        """The revision of the policies in the snapshot, 0 = none."""
        return 0 if self.view is None else self.view.snapshot.policy_revision

    def install(self, snapshot: Snapshot) -> None:
        """Decide by this snapshot from now on."""
        self.view = View(snapshot, self.view)
        self._plans.clear()

    def plan(self, source: bytes, destination: bytes, port: int, form: Form) -> _Plan | None:
        """Return what is to be done with such a connection; None: there is no snapshot."""
        key = source, destination, port, form
        found = self._plans.get(key)
        if found is None and self.view is not None:
            if len(self._plans) >= _PLAN_COUNT:
                self._plans.clear()
            self._plans[key] = found = self._planned(self.view, key)
        return found

    def _planned(self, view: View, key: tuple[bytes, bytes, int, Form]) -> _Plan:
        source, destination, port, form = key
        decision = view.decide(source, destination, TCP, port)
        restrictions = [
            Restriction(verdict.l7, verdict.unrestricted, _audits(view, subject))
            for _, verdict, subject in _asked(decision)
        ]
        found, legs = course.plan(restrictions, form)
        # Without a course the last leg is the one that refuses.
        sides = [
            self._side(view, *side, leg) for side, leg in zip(_asked(decision), legs, strict=False)
        ]
        uses_headers = any(side.rules is not None and side.rules.uses_headers for side in sides)
        redacted = frozenset[bytes]().union(
            *(side.rules.secret_headers for side in sides if side.rules is not None)
        )
        return _Plan(
            decision,
            self._connection(decision),
            course.looks(restrictions),
            course.passes_unread(restrictions),
            found,
            sides,
            uses_headers,
            redacted,
            {},
        )

    def _connection(self, decision: Decision) -> Judgement:
        allowed = decision.verdict is not Verdict.DROP
        side = _deciding_side(decision)
        return self._judgement(
            decision,
            allowed=allowed,
            connected=allowed,
            direction=decision.direction or TrafficDirection.INGRESS,
            drop_reason=decision.reason or 0,
            allowed_by=side.allowed_by if side else (),
            denied_by=side.denied_by if side else (),
            isolated_by=side.isolated_by if side else (),
        )

    def _side(
        self,
        view: View,
        direction: TrafficDirection,
        verdict: DirectionVerdict,
        subject: Peer,
        leg: Leg,
    ) -> _Side:
        rules = self.rules(leg.http)
        # Header actions of a rule apply even where nothing is refused.
        consulted = verdict.l7 is not None and (not leg.unread or rules.uses_headers)
        written: dict[HttpRuleRow, tuple[OriginRow, ...]] = {}
        for entry in verdict.entries:
            if entry.l7 >= 0:
                origin = view.snapshot.origins[entry.origin]
                for row in view.snapshot.l7[entry.l7].http:
                    written[row] = (*written.get(row, ()), origin)
        audit = _audits(view, subject)
        return _Side(direction, verdict, leg, rules if consulted else None, audit, written, {})

    def rules(self, rows: tuple[HttpRuleRow, ...]) -> _Rules:
        """Return the compiled form of a list of rules."""
        rules = self._rules.get(rows)
        if rules is None:
            if len(self._rules) >= _MATCHER_COUNT:
                self._rules.clear()
            self._rules[rows] = rules = _Rules(rows, self._secrets)
        return rules

    def allowed(self, decision: Decision, side: _Side, rule: HttpRuleRow | None) -> Judgement:
        """Name the rules that allow a request, or without one the connection."""
        by = side.verdict.allowed_by if rule is None else side.written.get(rule)
        return self._judgement(
            decision,
            allowed=True,
            connected=True,
            direction=side.direction,
            drop_reason=0,
            allowed_by=by or side.verdict.allowed_by,
        )

    def denied(self, decision: Decision, side: _Side) -> Judgement:
        """Name as deniers the rules that let the connection in but not this request."""
        return self._judgement(
            decision,
            allowed=False,
            connected=True,
            direction=side.direction,
            drop_reason=DropReason.POLICY_DENIED,
            denied_by=side.verdict.allowed_by,
            isolated_by=side.verdict.isolated_by,
        )

    def _judgement(
        self,
        decision: Decision,
        *,
        allowed: bool,
        connected: bool,
        direction: TrafficDirection,
        drop_reason: int,
        allowed_by: tuple[OriginRow, ...] = (),
        denied_by: tuple[OriginRow, ...] = (),
        isolated_by: tuple[OriginRow, ...] = (),
    ) -> Judgement:
        source, destination = decision.source, decision.destination
        return Judgement(
            allowed=allowed,
            connected=connected,
            direction=direction,
            drop_reason=int(drop_reason),
            revision=self.policy_revision,
            source_identity=source.identity,
            destination_identity=destination.identity,
            source_endpoint=0 if source.endpoint is None else source.endpoint.id,
            destination_endpoint=0 if destination.endpoint is None else destination.endpoint.id,
            allowed_by=allowed_by,
            denied_by=denied_by,
            isolated_by=isolated_by,
        )


class ConnectionJudge:
    """Policy for the connection of `source` to `destination`, a `judgement.Judge`.

    Args:
        policy: the worker's policy; a later snapshot counts from the next question on.
        source: the client's packed address.
        destination: packed address the client connected to.
        port: destination port.
    """

    __slots__ = (
        "_destination", "_form", "_memo", "_plan", "_policy", "_port", "_server_name", "_source",
        "_taken", "_view",
    )  # fmt: skip

    def __init__(self, policy: Policy, source: bytes, destination: bytes, port: int) -> None:
        self._policy = policy
        self._source = source
        self._destination = destination
        self._port = port
        self._view: View | None = None
        self._plan: _Plan | None = None
        self._form = CLEAR
        self._taken: Course | None = None
        self._server_name = ""
        self._memo: dict[tuple[bytes, bytes, bytes], Judgement] | None = None

    # --- the connection --------------------------------------------------------------------------

    @property
    def looks(self) -> bool:
        """Whether it must be known how the connection begins before it can be served."""
        plan = self._current()
        return plan is not None and plan.looks

    @property
    def passes_unread(self) -> bool:
        """Whether the connection may pass unread whatever it begins with."""
        plan = self._current()
        return plan is not None and plan.passes_unread

    @property
    def server_name(self) -> str:
        """What a server that TLS is spoken to must prove to be; "": it has the right address.

        The name in the client's hello, or without one the host of the first request allowed.
        """
        return self._server_name

    def take(self, form: Form) -> Course | None:
        """Judge the connection in the form in which it began; None: nothing allows it."""
        if form != self._form:
            self._form = form
            self._view = None
        self._server_name = form.server_name
        self._memo = None
        plan = self._current()
        self._taken = None if plan is None else plan.course
        return self._taken

    def opening(self) -> Judgement:
        """Say who allows or refuses the form taken."""
        plan = self._current()
        if plan is None or plan.decision.verdict is Verdict.DROP or not plan.sides:
            return self.connection()
        if plan.course is None:
            return self._policy.denied(plan.decision, plan.sides[-1])
        asked = [side for side in plan.sides if side.verdict.l7 is not None]
        answer = self._policy.allowed(plan.decision, (asked or plan.sides)[-1], None)
        audited = any(side.leg.audited for side in plan.sides)
        return answer._replace(detail="audited") if audited else answer

    def connection(self) -> Judgement:
        """Say whether the connection itself is allowed now."""
        plan = self._current()
        if plan is None:
            return _NO_SNAPSHOT
        if plan.connection.allowed and self._is_astray(plan):
            return self._policy.denied(plan.decision, plan.sides[-1])._replace(connected=False)
        return plan.connection

    def _is_astray(self, plan: _Plan) -> bool:
        """Whether the snapshot in force asks for more than what was begun with the form taken."""
        begun, wanted = self._taken, plan.course
        if begun is None or begun is wanted:
            return False
        return (
            wanted is None
            or (wanted.http and not begun.http)
            or wanted.terminate not in (None, begun.terminate)
            or wanted.originate not in (None, begun.originate)
        )

    # --- a request -------------------------------------------------------------------------------

    def request(self, request: Request) -> Judgement:
        """Say whether this request is allowed now: the connection, then each side's rules."""
        target = request.target
        key = request.method, target.wire, target.authority
        if self._memo is not None and self._policy.view is self._view:
            known = self._memo.get(key)
            if known is not None:
                return known
        plan = self._current()
        if plan is None or plan.decision.verdict is Verdict.DROP or self._is_astray(plan):
            return self.connection()
        taken = self._taken
        host = ""
        tls = taken is not None and (taken.terminate or taken.originate)
        if tls:
            host = host_name(target.authority)
            if self._server_name not in ("", host):
                return self.connection()._replace(allowed=False, misdirected=True)
        judgement: Judgement | None = None
        edits: list[HeaderEdit] = []
        for side in plan.sides:
            if side.rules is None:
                continue
            found = side.rules.evaluate(request)
            judgement = self._answer(plan, side, found.rule)
            if not judgement.allowed:
                break
            edits += found.edits
        if judgement is None:
            judgement = self.connection()
        if not tls and not plan.uses_headers:
            self._remember(plan, key, judgement)
        if not judgement.allowed:
            return judgement
        if host:
            self._server_name = host
        return judgement._replace(edits=tuple(edits)) if edits else judgement

    def _remember(self, plan: _Plan, key: tuple[bytes, bytes, bytes], judgement: Judgement) -> None:
        """Keep an answer that will be the same until the next snapshot."""
        self._memo = memo = plan.memo
        if sum(map(len, key)) <= _MEMO_KEY_BYTES:
            if len(memo) >= _PLAN_MEMO_COUNT:
                memo.clear()
            memo[key] = judgement

    def _answer(self, plan: _Plan, side: _Side, rule: HttpRuleRow | None) -> Judgement:
        """Return one side's answer to a request that `rule` (None: no rule) matched."""
        answer = side.answers.get(rule)
        if answer is None:
            if rule is not None or side.leg.unread:
                answer = self._policy.allowed(plan.decision, side, rule)
            else:
                answer = self._policy.denied(plan.decision, side)
                if side.audit:
                    answer = answer._replace(allowed=True, drop_reason=0, detail="audited")
            answer = answer._replace(uses_headers=plan.uses_headers, redacted=plan.redacted)
            side.answers[rule] = answer
        return answer

    def _current(self) -> _Plan | None:
        view = self._policy.view
        if view is not self._view:
            self._view = view
            self._memo = None
            self._plan = self._policy.plan(self._source, self._destination, self._port, self._form)
        return self._plan


def _audits(view: View, subject: Peer) -> bool:
    everywhere = view.snapshot.settings.policy_audit_mode
    return everywhere or (subject.endpoint is not None and subject.endpoint.audit)


def _asked(
    decision: Decision,
) -> Iterator[tuple[TrafficDirection, DirectionVerdict, Peer]]:
    """Yield the sides that have a policy, with whose it is; egress first."""
    if decision.egress is not None:
        yield TrafficDirection.EGRESS, decision.egress, decision.source
    if decision.ingress is not None:
        yield TrafficDirection.INGRESS, decision.ingress, decision.destination


def _deciding_side(decision: Decision) -> DirectionVerdict | None:
    if decision.direction is TrafficDirection.EGRESS:
        return decision.egress
    return decision.ingress
