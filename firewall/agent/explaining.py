"""Why: questions about flows that were decided, and about traffic that may come.

A recorded flow is explained by the snapshot that decided it, as long as `History` keeps it; a trace
always by the one in force. Both are the same walk (`firewall.policy.explain`). An answer never
contradicts the record silently: where the walk comes to another verdict than the flow has, the
answer says so.
"""

import time
from collections.abc import Iterator
from typing import Any

import msgspec

from firewall.agent.collector import Collector
from firewall.agent.engine import Engine, reader_settings
from firewall.agent.history import History, Past
from firewall.agent.policies import key_row
from firewall.agent.publisher import Publisher
from firewall.flows.asked import question_of
from firewall.flows.flow import EVENT_DROP, Extensions, Flow, parse_time
from firewall.flows.flow import Explanation as Recorded
from firewall.identities.labels import LabelFilter
from firewall.policy.explain import explain
from firewall.policy.explanation import Explanation
from firewall.policy.model import ObjectKey, Peer
from firewall.policy.name_match import NameMatcher
from firewall.policy.plan import Plan, Source, make_plan
from firewall.policy.question import Question
from firewall.policy.realm import Asked, Realm, ask
from firewall.policy.remedy import suggest
from firewall.policy.selectors import describe
from firewall.policy.snapshot import Snapshot
from firewall.policy.verdict import DROP_TEXT, DropReason, Verdict
from firewall.policy.view import View

LAST_DROP = "last-drop"
"""Stands for the newest dropped flow in place of an id."""

_REMEMBERED = 1024  # explanations, some kB each


class UnknownFlowError(LookupError):
    """No flow has this id (any more)."""


class FlowAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known about one recorded flow.

    Attributes:
        uuid: its id.
        flow: the record.
        flow_revision: the policy revision that decided it, 0 = the record does not say.
        explained_revision: the one that the explanation is made from.
        current_revision: the one in force.
        notes: what else to know, in sentences.
        explanation: None if policy did not decide, or the record cannot be read as traffic.
    """

    uuid: str
    flow: Flow
    flow_revision: int
    explained_revision: int
    current_revision: int
    notes: tuple[str, ...] = ()
    explanation: Explanation | None = None


class Explainer:
    """Answers for one agent.

    Args:
        engine: policies, identities and what is published.
        collector: the flows.
    """

    def __init__(self, engine: Engine, collector: Collector) -> None:
        self._engine = engine
        self._collector = collector
        self._history = History()
        self._explained: dict[tuple[int, *tuple[Any, ...]], Explanation] = {}
        self._publisher: Publisher = engine.publisher
        self._publisher.listeners.append(self._note)
        self._history.note(self._publisher.snapshot, engine.resolver.selectors, 0)
        collector.annotate = self.annotated

    def _note(self, snapshot: Snapshot) -> None:
        self._history.note(snapshot, self._engine.resolver.selectors, time.time_ns())

    # --- recorded flows -----------------------------------------------------------------------

    def find(self, uuid: str) -> Flow:
        """Return a flow by its id or the beginning of it, or the last dropped one.

        Raises:
            UnknownFlowError: there is none, or there are several.
        """
        notes = self._collector.notes()
        if uuid == LAST_DROP:
            for note in reversed(notes):
                if note.event.verdict == Verdict.DROP and note.flow.verdict == "DROPPED":
                    return note.flow
            raise UnknownFlowError("no flow was dropped, among those that are kept")
        found = {note.uuid: note for note in notes if note.uuid.startswith(uuid)}
        if len(found) > 1:
            raise UnknownFlowError(f"{len(found)} flows have an id that begins with {uuid}")
        if not found:
            raise UnknownFlowError(f"no flow {uuid} is kept; the ring holds the last {len(notes)}")
        return next(iter(found.values())).flow

    def why(self, flow: Flow) -> FlowAnswer:
        """Explain a recorded flow."""
        recorded = flow.extensions.value if flow.extensions is not None else Recorded()
        wanted = recorded.policy_revision
        current = self._publisher.snapshot.policy_revision
        past = self._history.at(wanted, parse_time(flow.time)) or self._latest()
        explained = past.snapshot.policy_revision
        notes = list(_revision_notes(wanted, explained, current))
        explanation = None
        if flow.event_type is not None and flow.event_type.type == EVENT_DROP:
            reason = _reason_text(flow.drop_reason)
            detail = f" ({recorded.detail})" if recorded.detail else ""
            notes = [f"no policy decided this: {reason}{detail}"]
        else:
            explanation = self._explain(past, flow)
            if explanation is None:
                notes = ["the record does not say who sent what to whom"]
            elif flow.l7 is not None and flow.l7.dns is not None:
                notes += self._about_name(past, flow, recorded.detail)
            else:
                notes += _disagreement(flow, explanation, recorded.detail)
                notes += _unseen_headers(flow, explanation)
        return FlowAnswer(
            uuid=flow.uuid,
            flow=flow,
            flow_revision=wanted,
            explained_revision=explained,
            current_revision=current,
            notes=tuple(notes),
            explanation=explanation,
        )

    def _about_name(self, past: Past, flow: Flow, detail: str) -> Iterator[str]:
        """Hold the dns rules against the name that was asked for."""
        question = question_of(flow)
        name = flow.l7.dns.query if flow.l7 is not None and flow.l7.dns is not None else ""
        if not name or question is None:
            if detail:
                yield f"the question could not be read: {detail}"
            return
        decision = self._history.view(past).decide(*question.traffic)
        for side in (decision.egress, decision.ingress):
            if side is None or side.l7 is None:
                continue
            for row in side.l7:
                for rule in row.dns:
                    item = rule.match_name or rule.match_pattern or ""
                    kind = "matchName" if rule.match_name else "matchPattern"
                    verb = "means" if NameMatcher((item,)).matches(name) else "does not mean"
                    yield f"dns rule {kind} {item}: {verb} {name}"
            if side.unrestricted:
                yield "a rule without names allows the same traffic, so no name is refused"

    def annotated(self, flow: Flow) -> Flow:
        """Return a flow with the whole explanation under `extensions`."""
        answer = self.why(flow)
        if answer.explanation is None:
            return flow
        extensions = flow.extensions or Extensions()
        value = msgspec.structs.replace(
            extensions.value, explanation=msgspec.to_builtins(answer.explanation)
        )
        return msgspec.structs.replace(
            flow, extensions=msgspec.structs.replace(extensions, value=value)
        )

    def _latest(self) -> Past:
        past = self._history.latest()
        assert past is not None
        return past

    def _explain(self, past: Past, flow: Flow) -> Explanation | None:
        question = question_of(flow)
        if question is None:
            return None
        key = past.snapshot.revision, *question
        known = self._explained.get(key)
        if known is None:
            view = self._history.view(past)
            known = explain(view, past.selectors, *question)
            if len(self._explained) >= _REMEMBERED:
                self._explained.clear()
            self._explained[key] = known
        return known

    # --- what rules mean now ------------------------------------------------------------------

    def selectors(self) -> list[dict[str, Any]]:
        """Return every peer that a rule names: who uses it, and which identities it means now."""
        past = self._latest()
        users: dict[Peer, list[str]] = {}
        for one in self._engine.book.repository.objects:
            for entry in one.entries:
                for peer in dict.fromkeys(entry.peers or ()):
                    users.setdefault(peer, []).append(str(one.key))
        identities: dict[int, list[int]] = {}
        for row in past.snapshot.identities:
            for number in row.selectors:
                identities.setdefault(number, []).append(row.number)
        return [
            {
                "selector": describe(peer),
                "labels": list(dict.fromkeys(users.get(peer, ()))),
                "users": len(users.get(peer, ())),
                "identities": identities.get(number, []),
            }
            for number, peer in sorted(past.selectors.items())
        ]

    # --- traffic that may come ----------------------------------------------------------------

    def realm(self) -> Realm:
        """Return what is in force."""
        past = self._latest()
        return Realm(
            self._history.view(past),
            past.selectors,
            self._engine.book.repository.objects,
            tuple(self._engine.book.resources.values()),
            self._engine.config.cluster_name,
            self._engine.names.addresses(),
        )

    def ask(self, question: Question) -> Asked:
        """Turn a question's words into numbers; raises QuestionError."""
        return ask(self.realm(), question, LabelFilter(self._engine.config.labels.filter))

    def ask_again(self, flow: Flow) -> Asked | None:
        """Return a recorded flow as a question to the policy in force; None: nothing to ask."""
        question = question_of(flow)
        if question is None or (flow.event_type and flow.event_type.type == EVENT_DROP):
            return None
        return Asked(self.realm(), *question)

    def suggest(self, asked: Asked) -> Plan:
        """Find the smallest change that lets traffic pass; slow, to be called in a thread.

        Raises:
            NoRemedyError: nothing helps.
        """
        settings = reader_settings(self._engine.config)
        realm = asked.realm
        # A view writes its memos on reading, so no two threads may have the same one.
        own = realm._replace(view=View(realm.view.snapshot))
        asked = asked._replace(realm=own)
        return make_plan(suggest(asked, settings), self._source_of, settings)

    def _source_of(self, key: ObjectKey) -> Source | None:
        found = self._engine.book.text_of(key_row(key))
        return None if found is None else Source(found.file, found.text)

    def trace(self, asked: Asked) -> dict[str, Any]:
        """Answer a question."""
        return {
            "policy_revision": self._publisher.snapshot.policy_revision,
            "explanation": msgspec.to_builtins(asked.answer()),
        }


def _revision_notes(wanted: int, explained: int, current: int) -> Iterator[str]:
    if wanted and wanted != explained:
        yield (
            f"policy has changed since: revision {wanted} decided this and is kept no more; "
            f"explained by revision {explained}"
        )
    elif explained != current:
        yield (
            f"policy has changed since: explained by revision {explained}, which decided this; "
            f"revision {current} is in force"
        )


def _disagreement(flow: Flow, explanation: Explanation, detail: str) -> Iterator[str]:
    """Say where the walk comes to another verdict than the record has."""
    dropped = flow.verdict == "DROPPED"
    if dropped == (explanation.verdict == "denied"):
        return
    more = f" ({detail})" if detail else ""
    if flow.l7 is not None:
        # Header rules were held against a request of which the record has only some headers.
        yield (
            f"the proxy recorded {flow.verdict}{more}; the record does not hold all that it saw, "
            "such as headers"
        )
    else:
        yield f"the flow was {flow.verdict}{more}; the policy explained here says otherwise"


def _unseen_headers(flow: Flow, explanation: Explanation) -> Iterator[str]:
    """Say that header rules could not be held against what was really sent."""
    sides = (side for side in (explanation.egress, explanation.ingress) if side is not None)
    asked = {
        condition.expected
        for side in sides
        for step in side.steps
        if step.decided
        for condition in step.conditions
        if condition.what in ("header", "headerMatch")
    }
    if flow.l7 is not None and asked:
        yield (
            f"rules ask for headers ({', '.join(sorted(asked))}); of those the record holds only "
            "what proxy.limits.log_headers names"
        )


def _reason_text(number: int) -> str:
    try:
        return DROP_TEXT[DropReason(number)]
    except ValueError:
        return f"drop reason {number}"
