"""What a judge answers to a check, in words that both judges share."""

from collections.abc import Iterable
from typing import NamedTuple

from firewall.flows.record import RULES_MAX_COUNT
from firewall.policy.policymap import DirectionVerdict
from firewall.policy.snapshot import OriginRow
from firewall.policy.verdict import DROP_TEXT, DropReason, TrafficDirection
from firewall.policy.view import Decision
from policytest.case import Expected

DEFAULT_DENY = "default-deny"
"""`by` of what no rule allows."""

NO_POLICY = "no-policy"
"""`by` of what passes because nothing is enforced."""

AUDIT = "audit"
"""`by` of what policy would drop and audit mode lets pass."""


class Answer(NamedTuple):
    """One answer.

    Attributes:
        allowed: whether the traffic may pass.
        by: names of the policies that decided (`namespace/name`, or `name` of a cluster-wide one),
            or one of the words above.
        reason: name of the `DropReason`, "" if it passes.
        direction: "ingress" or "egress", the side that decided, "" = neither is under policy.
        why: one sentence.
        rules: where the deciding rules were written.
        address: for which pair of addresses, "" = there is only one.
    """

    allowed: bool
    by: tuple[str, ...]
    reason: str = ""
    direction: str = ""
    why: str = ""
    rules: tuple[OriginRow, ...] = ()
    address: str = ""

    @property
    def word(self) -> str:
        """`allow` or `deny`, as test files say it."""
        return "allow" if self.allowed else "deny"


def name_of(namespace: str, name: str) -> str:
    """Return what `by` calls a policy."""
    return f"{namespace}/{name}" if namespace else name


def names(origins: Iterable[OriginRow]) -> tuple[str, ...]:
    """Return the names of the policies that hold these rules, each once."""
    return tuple(dict.fromkeys([name_of(origin.namespace, origin.name) for origin in origins]))


def places(origins: tuple[OriginRow, ...]) -> str:
    """Name the first rule as people find it, and count the others."""
    if not origins:
        return ""
    first = origins[0]
    place = f"{first.file}:{first.line}" if first.line else first.path
    others = f" and {len(origins) - 1} more" if len(origins) > 1 else ""
    return f"{first.kind} {name_of(first.namespace, first.name)} {place}".rstrip() + others


def refused(
    direction: str,
    reason: DropReason,
    denied_by: tuple[OriginRow, ...],
    isolated_by: tuple[OriginRow, ...],
) -> Answer:
    """Make the answer for traffic that one side drops."""
    if denied_by:
        why = f"{direction} denied by {places(denied_by)}"
        return Answer(False, names(denied_by), reason.name, direction, why, denied_by)
    if reason is DropReason.POLICY_DENIED:
        because = f" by {places(isolated_by)}" if isolated_by else ""
        why = f"no {direction} rule allows it: default deny{because}"
        return Answer(False, (DEFAULT_DENY,), reason.name, direction, why, isolated_by)
    why = f"{direction}: {DROP_TEXT[reason].lower()}"
    return Answer(False, (reason.name,), reason.name, direction, why)


def refused_request(
    direction: str, rules: tuple[OriginRow, ...], reason: str = DropReason.POLICY_DENIED.name
) -> Answer:
    """Make the answer for a request that the proxy refuses because no http rule allows it."""
    why = f"{direction}: no http rule allows the request: {places(rules)}"
    return Answer(False, names(rules) or (DEFAULT_DENY,), reason, direction, why, rules)


def refused_hello(
    direction: str, rules: tuple[OriginRow, ...], reason: str = DropReason.POLICY_DENIED.name
) -> Answer:
    """Make the answer for a server name that no rule allows."""
    why = f"{direction}: no rule allows the server name: {places(rules)}"
    return Answer(False, names(rules) or (DEFAULT_DENY,), reason, direction, why, rules)


def passed(direction: str, rules: tuple[OriginRow, ...]) -> Answer:
    """Make the answer for traffic that passes; no rules = nothing restricts it."""
    if not rules:
        return Answer(True, (NO_POLICY,), direction=direction, why="no policy restricts it")
    why = f"allowed by {places(rules)}"
    return Answer(True, names(rules), direction=direction, why=why, rules=rules)


def of_decision(decision: Decision) -> Answer:
    """Make the answer for a connection from what the view decided."""
    direction = decision.direction
    word = direction.name.lower() if direction is not None else ""
    side = decision.egress if direction is TrafficDirection.EGRESS else decision.ingress
    if decision.reason is not None and side is not None:
        return refused(word, decision.reason, side.denied_by, side.isolated_by)
    if decision.audited:
        return Answer(True, (AUDIT,), direction=word, why="audit mode lets it pass")
    sides = [one for one in (decision.egress, decision.ingress) if one is not None]
    return passed(word, _allowing(sides))


def _allowing(sides: list[DirectionVerdict]) -> tuple[OriginRow, ...]:
    return tuple(dict.fromkeys([origin for side in sides for origin in side.allowed_by]))


def differences(expected: Expected, got: Answer) -> list[str]:
    """Say in what an answer is not as expected; nothing = it is."""
    if expected.allowed is not got.allowed:
        word = "allow" if expected.allowed else "deny"
        return [f"expected {word}, got {got.word}: {got.why}"]
    found = []
    if expected.by and not _named(expected.by, got.by):
        found.append(f"expected it by {expected.by}, got it by {', '.join(got.by)}: {got.why}")
    if expected.reason and expected.reason != got.reason:
        found.append(f"expected the reason {expected.reason}, got {got.reason}: {got.why}")
    if expected.direction and expected.direction != got.direction:
        direction = got.direction or "neither side"
        found.append(f"expected {expected.direction} to decide, got {direction}: {got.why}")
    return found


def _named(wanted: str, by: tuple[str, ...]) -> bool:
    """Say whether a name is among those; `Kind/namespace/name` works too."""
    return wanted in by or (wanted.count("/") == 2 and wanted.partition("/")[2] in by)


def same(one: Answer, other: Answer) -> bool:
    """Say whether two judges mean the same; a flow record names a bounded number of policies."""
    fewer, more = sorted((set(one.by), set(other.by)), key=len)
    named = fewer == more or (len(fewer) >= RULES_MAX_COUNT and fewer < more)
    return named and (one.allowed, one.reason) == (other.allowed, other.reason)
