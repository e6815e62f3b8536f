"""What a snapshot makes of connections between two ends, compiled once and kept.

One `Policy` per worker holds the snapshot in force. The pair (source, destination) is decided by
the same View that the datapath uses; a redirected connection has http rules on the egress side, the
ingress side, or both. Rules are compiled once per list and kept over snapshots that repeat it. What
rules make of TLS is the business of `firewall.policy.course`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from firewall.policy import course
from firewall.policy.course import Course, Form, Leg, Restriction
from firewall.policy.http_match import HeaderEdit, HttpMatch, HttpMatcher, SecretReader, edited
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

_MEMO_COUNT = 4096  # answers remembered per list of rules, at most 2 MB with their keys
MEMO_KEY_BYTES = 256
"""Longer targets are matched each time, or a client could fill the memory."""


class Rules:
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

    def evaluate(self, request: Request, edits: Sequence[HeaderEdit] = ()) -> HttpMatch:
        """Return the rule that allows a request after some edits, and what else to change in it."""
        method, target = request.method, request.target
        if self.uses_headers:
            headers = edited(request.headers, edits)
            return self._matcher.evaluate(method, target.wire, target.authority, headers)
        key = method, target.wire, target.authority
        found = self._memo.get(key)
        if found is None:
            found = self._matcher.evaluate(*key, ())
            if sum(map(len, key)) <= MEMO_KEY_BYTES:
                if len(self._memo) >= _MEMO_COUNT:
                    self._memo.clear()
                self._memo[key] = found
        return found


class Side(NamedTuple):
    """The http rules of one direction; `rules` None: this side restricts nothing.

    `leg`: what this side says to the connection's form. `written` says where each rule stands;
    `answers` keeps what was answered before, per rule.
    """

    direction: TrafficDirection
    verdict: DirectionVerdict
    leg: Leg
    rules: Rules | None
    audit: bool
    written: dict[HttpRuleRow, tuple[OriginRow, ...]]
    answers: dict[HttpRuleRow | None, Judgement]


class Plan(NamedTuple):
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
    sides: list[Side]
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
        self._rules: dict[tuple[HttpRuleRow, ...], Rules] = {}
        self._plans: dict[tuple[bytes, bytes, int, Form], Plan] = {}

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

    def plan(self, source: bytes, destination: bytes, port: int, form: Form) -> Plan | None:
        """Return what is to be done with such a connection; None: there is no snapshot."""
        key = source, destination, port, form
        found = self._plans.get(key)
        if found is None and self.view is not None:
            if len(self._plans) >= _PLAN_COUNT:
                self._plans.clear()
            self._plans[key] = found = self._planned(self.view, key)
        return found

    def _planned(self, view: View, key: tuple[bytes, bytes, int, Form]) -> Plan:
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
        return Plan(
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
    ) -> Side:
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
        return Side(direction, verdict, leg, rules if consulted else None, audit, written, {})

    def rules(self, rows: tuple[HttpRuleRow, ...]) -> Rules:
        """Return the compiled form of a list of rules."""
        rules = self._rules.get(rows)
        if rules is None:
            if len(self._rules) >= _MATCHER_COUNT:
                self._rules.clear()
            self._rules[rows] = rules = Rules(rows, self._secrets)
        return rules

    def allowed(self, decision: Decision, side: Side, rule: HttpRuleRow | None) -> Judgement:
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

    def denied(self, decision: Decision, side: Side) -> Judgement:
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
