"""Plays a case: every step, every chosen check, by one judge or by both."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from policytest.answer import Answer, differences, same
from policytest.case import Case, Check, Step
from policytest.model import Model

if TYPE_CHECKING:
    from policytest.field import Field

EXPLAINED_COUNT = 20
"""Failures of one file that are explained rule by rule; more would bury the first ones."""

Chosen = Callable[[Step, Check], bool]


class Result(NamedTuple):
    """One check with its answers.

    Attributes:
        file: of the test.
        step: the step's name, "" = the file is one step.
        check: what was asked.
        model: what the model answers, None = it was not asked.
        packets: what the packets met, None = none were sent.
        faults: what is not as expected, empty = nothing.
        explanation: rule by rule, for failures.
        flows: flow lines of the packets, for failures.
    """

    file: str
    step: str
    check: Check
    model: Answer | None
    packets: Answer | None
    faults: tuple[str, ...] = ()
    explanation: str = ""
    flows: tuple[str, ...] = ()

    @property
    def got(self) -> Answer:
        """The answer that counts: of real packets where there were some."""
        answer = self.packets or self.model
        assert answer is not None
        return answer

    @property
    def agrees(self) -> bool:
        """Whether the judges, if both were asked, answer the same."""
        return self.model is None or self.packets is None or same(self.model, self.packets)

    @property
    def passed(self) -> bool:
        """Whether everything is as expected, and the judges agree."""
        return not self.faults and self.agrees


def play(
    case: Case, chosen: Chosen, *, field: "Field | None" = None, compare: bool = True
) -> Iterator[Result]:
    """Yield the results of a case, in the order of the file.

    Args:
        case: what to play.
        chosen: which checks; a step after the last chosen one is not performed.
        field: where packets are sent, None = only the model is asked.
        compare: whether the model's answers count where packets were sent too. It explains
            failures in any case.

    Raises:
        ContradictionError: rules contradict each other.
        FieldError: packets cannot be sent, or nobody says what became of one.
        RefusedError: the daemon refuses what the readers accept.
    """
    model = Model(case)
    observer = None
    if field is not None:
        from policytest.packets import PacketJudge  # noqa: PLC0415 (the model needs no lab)

        observer = PacketJudge(field, case)
    wanted = [[check for check in step.checks if chosen(step, check)] for step in case.steps]
    explained = 0
    for step, checks in zip(case.steps, wanted, strict=True):
        if not any(wanted[step_number(case, step) :]):
            return
        model.perform(step)
        if observer is not None:
            observer.perform(step)
        if not checks:
            continue
        computed = model.answers(checks)
        seen = observer.answers(checks) if observer is not None else [None] * len(checks)
        for check, by_model, by_packets in zip(checks, computed, seen, strict=True):
            counted = by_model if compare or by_packets is None else None
            result = _result(case, step, check, counted, by_packets)
            if not result.passed and explained < EXPLAINED_COUNT:
                explained += 1
                flows = observer.evidence(check) if observer is not None else ()
                result = result._replace(explanation=model.explain(check), flows=flows)
            yield result


def step_number(case: Case, step: Step) -> int:
    """Return the place of a step in its case, from 0."""
    return next(at for at, other in enumerate(case.steps) if other is step)


def _result(
    case: Case, step: Step, check: Check, model: Answer | None, packets: Answer | None
) -> Result:
    faults: dict[str, None] = {}
    for judge, answer in (("model", model), ("packets", packets)):
        if answer is None:
            continue
        where = f" ({answer.address})" if answer.address else ""
        who = f"{judge}: " if model is not None and packets is not None else ""
        faults |= dict.fromkeys(
            f"{who}{text}{where}" for text in differences(check.expected, answer)
        )
    return Result(case.file, step.name, check, model, packets, tuple(faults))
