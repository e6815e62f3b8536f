"""Policy for DNS questions: which names a client may ask a server for, by the snapshot in force.

A question is allowed if the connection is, and if on each side that has dns rules one of them means
the name, or an entry without L7 rules allows the same traffic. The record type is not looked at, as
in Cilium. Everything that is redirected is learnt from, also where nothing is refused.
"""

from typing import NamedTuple

from firewall.policy.name_match import NameMatcher, normalise
from firewall.policy.policymap import DirectionVerdict
from firewall.policy.snapshot import DnsRuleRow, L7Row, OriginRow
from firewall.policy.verdict import DropReason, TrafficDirection, Verdict
from firewall.policy.view import Decision, Peer, View
from l7proxy.judgement import Judgement

_MATCHERS = 4096  # compiled rules kept; one is about 10 kB if it is a pattern
_SIDES = 4096  # (client, server, protocol, port) whose rules are kept ready


class Traffic(NamedTuple):
    """Who asks whom: packed addresses, IANA protocol, port of the server in host order."""

    source: bytes
    destination: bytes
    protocol: int
    port: int


class _Pattern(NamedTuple):
    matcher: NameMatcher
    written: tuple[OriginRow, ...]


class _Rules(NamedTuple):
    """Where the rule for each plain name was written, and the patterns."""

    names: dict[str, tuple[OriginRow, ...]]
    patterns: tuple[_Pattern, ...]


class _Side(NamedTuple):
    """One direction's rules; `rules` None: it restricts no name."""

    direction: TrafficDirection
    verdict: DirectionVerdict
    rules: _Rules | None
    audit: bool


class _Ready(NamedTuple):
    decision: Decision
    sides: tuple[_Side, ...]
    is_dns: bool


class NamePolicy:
    """Answers from one snapshot at a time.

    `view` None: none was loaded yet, everything is refused.
    """

    def __init__(self) -> None:
        self._view: View | None = None
        self._ready: dict[Traffic, _Ready] = {}
        self._matchers: dict[str, NameMatcher] = {}

    def follow(self, view: View | None) -> None:
        """Decide by this view from now on."""
        if view is not self._view:
            self._view = view
            self._ready.clear()

    def is_dns(self, traffic: Traffic) -> bool:
        """Say whether traffic is redirected for its dns rules."""
        ready = self._of(traffic)
        return ready is not None and ready.is_dns

    def judge(self, traffic: Traffic, name: str) -> Judgement:
        """Say whether a name (lower case, trailing dot) may be asked for.

        `connected` False: the traffic is not allowed at all, or not redirected for dns rules (any
        more).
        """
        ready = self._of(traffic)
        if ready is None:
            return Judgement(
                allowed=False,
                connected=False,
                direction=TrafficDirection.EGRESS,
                drop_reason=DropReason.DROP_EP_NOT_READY,
                revision=0,
                detail="no snapshot",
            )
        decision = ready.decision
        if not ready.is_dns:
            reason = decision.reason or DropReason.POLICY_DENIED
            refuser = _refuser(ready)
            return self._judgement(ready, refuser, allowed=False, connected=False, reason=reason)
        found: Judgement | None = None
        for side in ready.sides:
            said = self._ask(ready, side, name)
            if not said.allowed:
                return said
            if found is None or side.rules is not None:
                found = said  # a server's ingress has no say about names
        assert found is not None
        return found

    def _ask(self, ready: _Ready, side: _Side, name: str) -> Judgement:
        if side.rules is None:
            return self._judgement(ready, side, allowed=True)
        written = side.rules.names.get(name)
        if written is not None:
            return self._judgement(ready, side, allowed=True, by=written)
        for pattern in side.rules.patterns:
            if pattern.matcher.matches(name):
                return self._judgement(ready, side, allowed=True, by=pattern.written)
        if side.verdict.unrestricted:
            return self._judgement(ready, side, allowed=True)
        refused = self._judgement(ready, side, allowed=False, reason=DropReason.POLICY_DENIED)
        if side.audit:
            return refused._replace(allowed=True, drop_reason=0, detail="audited")
        return refused

    def _of(self, traffic: Traffic) -> _Ready | None:
        view = self._view
        if view is None:
            return None
        ready = self._ready.get(traffic)
        if ready is None:
            if len(self._ready) >= _SIDES:
                self._ready.clear()
            ready = self._ready[traffic] = self._make(view, traffic)
        return ready

    def _make(self, view: View, traffic: Traffic) -> _Ready:
        decision = view.decide(*traffic)
        sides = tuple(
            self._side(view, direction, verdict, subject)
            for direction, verdict, subject in (
                (TrafficDirection.EGRESS, decision.egress, decision.source),
                (TrafficDirection.INGRESS, decision.ingress, decision.destination),
            )
            if verdict is not None
        )
        is_dns = decision.verdict is Verdict.REDIRECT and all(
            row.kind == "dns" for side in sides for row in side.verdict.l7 or ()
        )
        return _Ready(decision, sides, is_dns)

    def _side(
        self, view: View, direction: TrafficDirection, verdict: DirectionVerdict, subject: Peer
    ) -> _Side:
        written: dict[DnsRuleRow, tuple[OriginRow, ...]] = {}
        for entry in verdict.entries:
            if entry.l7 >= 0:
                origin = view.snapshot.origins[entry.origin]
                for row in view.snapshot.l7[entry.l7].dns:
                    written[row] = (*written.get(row, ()), origin)
        rules: _Rules | None = None
        if verdict.l7 is not None:
            rules = _Rules({}, ())
            patterns: list[_Pattern] = []
            for row in dict.fromkeys(_dns_rules(verdict.l7)):
                by = written.get(row, verdict.allowed_by)
                if row.match_pattern:
                    patterns.append(_Pattern(self._matcher(row.match_pattern), by))
                elif row.match_name:
                    rules.names[normalise(row.match_name)] = by
            rules = rules._replace(patterns=tuple(patterns))
        audit = view.snapshot.settings.policy_audit_mode or (
            subject.endpoint is not None and subject.endpoint.audit
        )
        return _Side(direction, verdict, rules, audit)

    def _matcher(self, pattern: str) -> NameMatcher:
        found = self._matchers.get(pattern)
        if found is None:
            if len(self._matchers) >= _MATCHERS:
                self._matchers.clear()
            found = self._matchers[pattern] = NameMatcher((pattern,))
        return found

    def _judgement(
        self,
        ready: _Ready,
        side: _Side | None,
        *,
        allowed: bool,
        connected: bool = True,
        reason: int = 0,
        by: tuple[OriginRow, ...] = (),
    ) -> Judgement:
        """Name as deniers the rules that let the traffic in but not this name."""
        decision, verdict = ready.decision, side.verdict if side is not None else None
        source, destination = decision.source, decision.destination
        permitting = verdict.allowed_by if verdict is not None else ()
        view = self._view
        return Judgement(
            allowed=allowed,
            connected=connected,
            direction=side.direction if side is not None else TrafficDirection.EGRESS,
            drop_reason=int(reason),
            revision=view.snapshot.policy_revision if view is not None else 0,
            source_identity=source.identity,
            destination_identity=destination.identity,
            source_endpoint=0 if source.endpoint is None else source.endpoint.id,
            destination_endpoint=0 if destination.endpoint is None else destination.endpoint.id,
            allowed_by=(by or permitting) if allowed else (),
            denied_by=() if allowed else (permitting if connected else _denied_by(verdict)),
            isolated_by=() if allowed or verdict is None else verdict.isolated_by,
        )


def _denied_by(verdict: DirectionVerdict | None) -> tuple[OriginRow, ...]:
    return verdict.denied_by if verdict is not None else ()


def _refuser(ready: _Ready) -> _Side | None:
    """Return the side that refuses the traffic itself."""
    return next((side for side in ready.sides if not side.verdict.allowed), None)


def _dns_rules(rows: tuple[L7Row, ...]) -> tuple[DnsRuleRow, ...]:
    return tuple(rule for row in rows if row.kind == "dns" for rule in row.dns)
