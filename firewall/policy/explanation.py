"""What is said about a decision: every rule that was considered, and the text of it for people.

`firewall.policy.explain` makes these values. Everything is data (`msgspec` structs, so that an API
can send it); `render` makes the text.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from firewall.policy.conditions import Condition
from firewall.policy.http_match import Header
from firewall.policy.model import Action

ACTIONS = {Action.ALLOW: "allow", Action.DENY: "deny", Action.PASS: "pass"}
"""What a rule does, as it is written."""


class Request(NamedTuple):
    """An http request to ask about; `path` with the query, `host` with the port if one was sent."""

    method: bytes
    path: bytes
    host: bytes = b""
    headers: Sequence[Header] = ()


class Written(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The place of a rule; `line` 0 = not from a file."""

    kind: str
    namespace: str = ""
    name: str
    path: str = ""
    file: str = ""
    line: int = 0
    column: int = 0

    @property
    def object_name(self) -> str:
        """`Kind namespace/name`."""
        name = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{self.kind} {name}"

    @property
    def place(self) -> str:
        """`file:line:column`, or nothing."""
        return f"{self.file}:{self.line}:{self.column}" if self.file else ""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One rule as it was considered.

    `conditions` belong to the peer, port and http item of the rule that come closest. `decided`:
    this rule is one of those that made the verdict.
    """

    rule: Written
    action: str
    tier: int
    priority: float
    conditions: tuple[Condition, ...]
    decided: bool = False

    @property
    def failed(self) -> tuple[Condition, ...]:
        """The conditions that do not hold."""
        return tuple(one for one in self.conditions if not one.held)

    @property
    def distance(self) -> int:
        """How much would have to be different."""
        return sum(one.weight for one in self.failed)


class Walk(msgspec.Struct, frozen=True, kw_only=True):
    """One side: the policy of one endpoint in one direction.

    `verdict` is "allowed", "denied", "redirected" or "audited"; `because` says it in words. `steps`
    are all rules in the order of the policy. `closest`, `failed` and `change` only for a refusal.
    """

    direction: str
    endpoint: str
    enforced: bool
    verdict: str
    because: str
    isolated_by: tuple[Written, ...] = ()
    steps: tuple[Step, ...] = ()
    closest: Step | None = None
    failed: Condition | None = None
    change: str = ""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Both sides. `verdict` is "allowed", "denied", "redirected" or "audited"."""

    verdict: str
    source: str
    destination: str
    protocol: str
    port: int
    request: str = ""
    form: str = ""
    egress: Walk | None = None
    ingress: Walk | None = None


def render(explanation: Explanation, *, rules_count: int = 0) -> str:
    """Write an explanation for people, without a newline at the end.

    The first line is the verdict; then, for each side that has a policy, who isolated the endpoint,
    which rule decided or came closest, and what to change.

    Args:
        explanation: what to write.
        rules_count: how many of the other rules that were considered are listed, nearest first.
    """
    lines = [_headline(explanation)]
    for side in (explanation.egress, explanation.ingress):
        if side is not None:
            lines += [*_side_lines(side), *_other_lines(side, rules_count)]
    return "\n".join(lines)


def _other_lines(side: Walk, rules_count: int) -> list[str]:
    """List the rules that neither decided nor came closest, each with why it does not apply."""
    others = [step for step in side.steps if not step.decided and step != side.closest]
    others.sort(key=lambda step: step.distance)
    lines = []
    for step in others[:rules_count]:
        lines.append(f"    considered    {_rule_text(step)}")
        reasons = step.failed or step.conditions
        lines += [f"                  {_condition_text(one)}" for one in reasons]
    if rules_count and len(others) > rules_count:
        lines.append(f"    considered    {len(others) - rules_count} more, each further away")
    return lines


def _headline(explanation: Explanation) -> str:
    port = port_text_of(explanation)
    request = f" {explanation.request}" if explanation.request else ""
    if explanation.form:
        request = f" ({explanation.form}){request}"
    verdict = explanation.verdict.upper()
    return f"{verdict} {explanation.source} -> {explanation.destination} {port}{request}"


def port_text_of(explanation: Explanation) -> str:
    """Render the port asked about: `80/TCP`."""
    if explanation.protocol.startswith("ICMP"):
        return f"type {explanation.port}/{explanation.protocol}"
    return f"{explanation.port}/{explanation.protocol}"


def _side_lines(side: Walk) -> list[str]:
    lines = [f"  {side.direction} of {side.endpoint}: {side.verdict}, {side.because}"]
    if not side.enforced:
        return lines
    lines += [
        f"    isolated by   {one.object_name}  {one.place}".rstrip() for one in side.isolated_by
    ]
    for step in side.steps:
        if step.decided:
            lines.append(f"    decided by    {_rule_text(step)}")
            lines += [f"                  {_condition_text(one)}" for one in _telling(step, side)]
    if side.closest is not None and side.failed is not None:
        if not side.closest.decided:
            lines.append(f"    closest rule  {_rule_text(side.closest)}")
        lines += [f"                  {_condition_text(one)}" for one in side.closest.conditions]
    if side.change:
        lines.append(f"    to allow      {side.change}")
    return lines


def _telling(step: Step, side: Walk) -> Iterable[Condition]:
    """Return what is worth saying about a rule that decided: why it denies, which request it takes.

    The conditions of the closest rule are written with it.
    """
    if step == side.closest and side.failed is not None:
        return ()
    if step.action == ACTIONS[Action.DENY]:
        return step.conditions
    return [one for one in step.conditions if one.what not in ("peer", "port", "authentication")]


def _rule_text(step: Step) -> str:
    rule = step.rule
    parts = (f"{step.action} by {rule.object_name}", rule.path, rule.place)
    return "  ".join(part for part in parts if part)


def _condition_text(one: Condition) -> str:
    if one.held:
        return f"{one.what} ok: {one.expected}"
    return f"{one.what} wanted {one.expected}, found {one.actual or 'nothing'}"
