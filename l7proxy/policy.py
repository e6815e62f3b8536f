"""Policy for one connection: a snapshot's answers about it and its requests.

A request must satisfy each side that has http rules. A connection is judged in the form in which it
began, and ends when a snapshot asks for more of it than what was begun.

Fail closed: without a snapshot, and by rules that this proxy does not enforce (any kind but "http"
and "tls"), nothing is allowed. Source: cilium/proxy, cilium_network_filter and cilium_l7policy:
first the connection, then each request.
"""

from firewall.policy.course import CLEAR, Course, Form, host_name
from firewall.policy.http_match import HeaderEdit
from firewall.policy.snapshot import HttpRuleRow
from firewall.policy.verdict import DropReason, TrafficDirection, Verdict
from firewall.policy.view import View
from l7proxy.judgement import Judgement
from l7proxy.plan import MEMO_KEY_BYTES, Plan, Policy, Side
from l7proxy.request import Request

_MEMO_COUNT = 64
"""Answers that each plan keeps, to a method, target and authority: about 30 MB for all plans."""

_NO_SNAPSHOT = Judgement(
    allowed=False,
    connected=False,
    direction=TrafficDirection.INGRESS,
    drop_reason=DropReason.DROP_EP_NOT_READY,
    revision=0,
    detail="no snapshot",
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
        self._plan: Plan | None = None
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
        plan = self._current()
        if plan is None:
            self._memo = self._taken = None
        else:
            self._memo, self._taken = plan.memo, plan.course
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

    def _is_astray(self, plan: Plan) -> bool:
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
            found = side.rules.evaluate(request, edits)
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

    def _remember(self, plan: Plan, key: tuple[bytes, bytes, bytes], judgement: Judgement) -> None:
        """Keep an answer that will be the same until the next snapshot."""
        self._memo = memo = plan.memo
        if sum(map(len, key)) <= MEMO_KEY_BYTES:
            if len(memo) >= _MEMO_COUNT:
                memo.clear()
            memo[key] = judgement

    def _answer(self, plan: Plan, side: Side, rule: HttpRuleRow | None) -> Judgement:
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

    def _current(self) -> Plan | None:
        view = self._policy.view
        if view is not self._view:
            self._view = view
            self._memo = None
            self._plan = self._policy.plan(self._source, self._destination, self._port, self._form)
        return self._plan
