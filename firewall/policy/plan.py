"""A suggestion as an operator carries it out: files to patch, objects to apply or to delete."""

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from firewall.policy.explanation import Explanation
from firewall.policy.model import ObjectKey
from firewall.policy.patch import patched
from firewall.policy.readers import ReaderSettings
from firewall.policy.remedy import Suggestion


class Source(NamedTuple):
    """The text that an object was read from, and its name."""

    file: str
    text: str


class FilePlan(msgspec.Struct, frozen=True, kw_only=True):
    """One file before and after."""

    file: str
    before: str
    after: str


class ObjectPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one object.

    Attributes:
        kind, namespace, name: which.
        says: what is done, one sentence per step.
        file: the file that holds it and is among the plan's, "" = none.
        document: the object as it will be, None = it is deleted.
    """

    kind: str
    namespace: str
    name: str
    says: tuple[str, ...]
    file: str
    document: dict[str, Any] | None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All changes, and the explanations before and after them."""

    before: Explanation
    after: Explanation
    objects: tuple[ObjectPlan, ...]
    files: tuple[FilePlan, ...]


def make_plan(
    suggestion: Suggestion,
    source_of: Callable[[ObjectKey], Source | None],
    settings: ReaderSettings,
) -> Plan:
    """Work a suggestion into the files that the objects come from.

    Args:
        suggestion: the steps.
        source_of: where an object was written, None if that is not known.
        settings: as the files are read.
    """
    by_object: dict[ObjectKey, list[int]] = {}
    for at, remedy in enumerate(suggestion.remedies):
        by_object.setdefault(remedy.key, []).append(at)
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    objects = []
    for key, steps in by_object.items():
        source = source_of(key)
        text = None if source is None else after.get(source.file, source.text)
        for at in steps:
            edits = suggestion.remedies[at].edits
            text = None if text is None else patched(text, key, edits, settings)
        if source is not None and text is not None:
            before.setdefault(source.file, source.text)
            after[source.file] = text
        objects.append(
            ObjectPlan(
                kind=key.kind,
                namespace=key.namespace,
                name=key.name,
                says=tuple(suggestion.remedies[at].says for at in steps),
                file=source.file if source is not None and text is not None else "",
                document=suggestion.remedies[steps[-1]].after,
            )
        )
    files = tuple(
        FilePlan(file=file, before=before[file], after=text) for file, text in after.items()
    )
    return Plan(
        before=suggestion.before, after=suggestion.after, objects=tuple(objects), files=files
    )
