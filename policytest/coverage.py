"""Which rules were never the reason for a verdict: what the tests do not test."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from policytest.answer import name_of
from policytest.case import Case
from policytest.play import Result


class Rule(NamedTuple):
    """One rule entry of a policy, by its place."""

    file: str
    line: int
    kind: str
    namespace: str
    name: str
    path: str

    def __str__(self) -> str:
        """Render as `file:line  Kind namespace/name  path`."""
        name = name_of(self.namespace, self.name)
        return f"{self.file}:{self.line}  {self.kind} {name}  {self.path}"


def rules(cases: Iterable[Case]) -> set[Rule]:
    """Return the rules of all policies that the cases apply at some time."""
    return {
        Rule(origin.file, origin.line, origin.kind, origin.namespace, origin.name, origin.path)
        for case in cases
        for source in (*case.sources, *(s for step in case.steps for s in step.apply))
        for policy in source.objects
        for origin in (entry.origin for entry in policy.entries)
    }


def decisive(results: Iterable[Result]) -> set[Rule]:
    """Return the rules that made some verdict, or the default deny that did."""
    return {
        Rule(origin.file, origin.line, origin.kind, origin.namespace, origin.name, origin.path)
        for result in results
        for answer in (result.model, result.packets)
        if answer is not None
        for origin in answer.rules
    }


def coverage(cases: Iterable[Case], results: Iterable[Result]) -> Iterator[str]:
    """Yield lines for people: how many rules decided something, and which did not."""
    every = rules(cases)
    unused = sorted(every - decisive(results))
    used = len(every) - len(unused)
    yield f"coverage: {used} of {len(every)} rules were the reason for a verdict"
    if unused:
        yield "never the reason for a verdict:"
        yield from (f"  {rule}" for rule in unused)
