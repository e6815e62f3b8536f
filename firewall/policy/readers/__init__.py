"""Readers: policy files in every accepted format to `PolicyObject`s.

`read` composes the documents of a text (see composition.py), finds the reader of each object's kind
in one table (kinds.py), and answers with the objects that are right and every problem of those that
are not. An object with one error is refused whole; the others stay. No object is read with another
in mind, so the order of documents has no meaning; two versions of one object refuse each other.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from firewall.policy.model import PolicyObject
from firewall.policy.objects import Resource, resource_key
from firewall.policy.problem import Problem
from firewall.policy.readers.cilium import read_bare_rules, rule_name
from firewall.policy.readers.composition import Mapping, Mark, Pair, Scalar, Sequence, compose
from firewall.policy.readers.document import Report, Value
from firewall.policy.readers.kinds import KINDS, read_object
from firewall.policy.readers.settings import CAPABILITIES, ENFORCED, SWITCHED, ReaderSettings

__all__ = [
    "CAPABILITIES",
    "ENFORCED",
    "SWITCHED",
    "Problem",
    "ReadResult",
    "ReaderSettings",
    "merge",
    "read",
]

_RULE_SIGNS = ("endpointSelector", "nodeSelector")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadResult:
    """What a text holds: accepted policies, accepted other objects, and every problem."""

    objects: tuple[PolicyObject, ...] = ()
    resources: tuple[Resource, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that refused something."""
        return tuple(p for p in self.problems if p.severity == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """The problems that refused nothing."""
        return tuple(p for p in self.problems if p.severity == "warning")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    value: PolicyObject | Resource
    mark: Mark

    @property
    def key(self) -> tuple[str, str, str]:
        if isinstance(self.value, PolicyObject):
            key = self.value.key
            return (key.kind, key.namespace, key.name)
        return resource_key(self.value)

    @property
    def content(self) -> object:
        return self.value.document if isinstance(self.value, PolicyObject) else self.value


def read(text: str, file: str, *, settings: ReaderSettings | None = None) -> ReadResult:
    """Read every object of a YAML or JSON text.

    Args:
        text: any number of documents: objects, `kind: List` and typed lists, bare rules or lists
            of them.
        file: the name that problems and origins carry.
        settings: defaults of the namespace and so on, and what can be enforced.

    Returns:
        Never raises for what the text holds: everything wrong with it is in `problems`, in the
        order of the file.
    """
    chosen = settings or ReaderSettings()
    report = Report(file)
    found: list[_Found] = []
    rules: list[Value] = []
    for document in compose(text, file, report.problems):
        for value in _objects_of(Value(document.root, "", report)):
            if _is_rule(value):
                if document.spoiled:
                    read_bare_rules(rule_name(value), [value], chosen)
                else:
                    rules.append(value)
                continue
            before = report.error_count
            read_value = read_object(value, chosen)
            is_good = report.error_count == before and not document.spoiled
            if read_value is not None and is_good:
                found.append(_Found(value=read_value, mark=value.mark))
    found += _read_rules(rules, chosen, report)
    kept = _refuse_doubles(found, report)
    return ReadResult(
        objects=tuple(f.value for f in kept if isinstance(f.value, PolicyObject)),
        resources=tuple(f.value for f in kept if not isinstance(f.value, PolicyObject)),
        problems=tuple(sorted(dict.fromkeys(report.problems), key=lambda p: (p.line, p.column))),
    )


def _read_rules(rules: list[Value], settings: ReaderSettings, report: Report) -> Iterator[_Found]:
    groups: dict[str, list[Value]] = {}
    for rule in rules:
        groups.setdefault(rule_name(rule), []).append(rule)
    for name, members in groups.items():
        before = report.error_count
        policy = read_bare_rules(name, members, settings)
        if report.error_count == before:
            yield _Found(value=policy, mark=members[0].mark)


def _is_rule(value: Value) -> bool:
    return (
        value.is_mapping
        and value.child("kind") is None
        and any(value.child(sign) for sign in _RULE_SIGNS)
    )


def _objects_of(root: Value) -> Iterator[Value]:
    """Yield the objects of one document: itself, the items of a list kind, or of a bare list."""
    if isinstance(root.node, Sequence):
        for item in root.items():
            yield from _objects_of(item) if item.is_mapping else iter((item,))
        return
    kind = root.child("kind")
    name = kind.node.text if kind is not None and isinstance(kind.node, Scalar) else ""
    item_kind = name.removesuffix("List")
    if item_kind == name or (item_kind and item_kind not in KINDS):
        yield root
        return
    fields = root.fields(("apiVersion", "kind", "metadata", "items"))
    for item in fields["items"].items() if "items" in fields else ():
        if item_kind:
            yield _typed(item, item_kind, root.child("apiVersion"))
        else:
            yield from _objects_of(item) if item.is_mapping else iter((item,))


def _typed(item: Value, kind: str, version: Value | None) -> Value:
    """Give an item of a typed list the type it leaves out, as the API server prints them."""
    node = item.node
    if not isinstance(node, Mapping):
        return item
    pairs = dict(node.pairs)
    if "kind" not in pairs:
        pairs["kind"] = Pair(node.mark, Scalar(node.mark, kind, plain=False))
    if "apiVersion" not in pairs and version is not None:
        pairs["apiVersion"] = Pair(node.mark, version.node)
    return item._replace(node=replace(node, pairs=pairs))


def _refuse_doubles(found: list[_Found], report: Report) -> list[_Found]:
    by_key: dict[tuple[str, str, str], list[_Found]] = {}
    for item in found:
        by_key.setdefault(item.key, []).append(item)
    kept = []
    for key, items in by_key.items():
        first = items[0]
        same = all(item.content == first.content for item in items)
        note = report.warning if same else report.error
        for item in items[1:] if same else items:
            others = ", ".join(str(other.mark.line) for other in items if other is not item)
            note(item.mark, "", f"{_name(key)} is given more than once; also in line {others}")
        if same:
            kept.append(first)
    return kept


def _name(key: tuple[str, str, str]) -> str:
    return "/".join(part for part in key if part)


def merge(results: Iterable[ReadResult]) -> ReadResult:
    """Put the results of several texts together; an object of two texts refuses both."""
    listed = tuple(results)
    files: dict[tuple[str, str, str], list[_Found]] = {}
    unknown = Mark(0, 0)
    for result in listed:
        for value in (*result.objects, *result.resources):
            found = _Found(value=value, mark=unknown)
            files.setdefault(found.key, []).append(found)
    problems = [problem for result in listed for problem in result.problems]
    kept = []
    for key, items in files.items():
        if len(items) == 1:
            kept.append(items[0].value)
            continue
        names = " and ".join(item.value.file for item in items)
        problems += [
            Problem.error(
                item.value.file, 0, 0, "", f"{_name(key)} is given more than once: in {names}"
            )
            for item in items
        ]
    return ReadResult(
        objects=tuple(value for value in kept if isinstance(value, PolicyObject)),
        resources=tuple(value for value in kept if not isinstance(value, PolicyObject)),
        problems=tuple(problems),
    )
