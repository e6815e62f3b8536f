"""The smallest change of the policies in force that lets refused traffic pass, tried before shown.

Theory of operation. The two ends are judged one after the other; while one refuses, candidates are
tried in the order of their size: each is read by the very reader that would read it from a file,
and the question is asked again with it. The first that helps is kept. What is suggested has
therefore worked, deny rules, tiers and proxies included, or there is no suggestion.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conntrack.address import Prefix
from firewall.identities.labels import LabelSet
from firewall.policy.candidates import Candidate, Case, candidates
from firewall.policy.edits import Edit, EditError, applied
from firewall.policy.explanation import Explanation, Walk
from firewall.policy.model import ObjectKey, PolicyObject
from firewall.policy.patch import written
from firewall.policy.readers import SWITCHED, ReaderSettings, read
from firewall.policy.realm import Asked, rehearsed

_ROUNDS = 24  # both directions, and as many overlapping deny rules as anybody would write

_PASSES = ("allowed", "redirected")


class NoRemedyError(Exception):
    """No change of policy helps; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """One step of a suggestion.

    Attributes:
        key: the object to change, make or delete.
        says: what is done, for people.
        edits: in their order; () for a new object, None if the object goes.
        before: the document as it is, None = a new one.
        after: the document as it will be, None = it goes.
        file: where the object was written, "" = not known.
    """

    key: ObjectKey
    says: str
    edits: tuple[Edit, ...] | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """What to change, and the explanation before and after."""

    remedies: tuple[Remedy, ...]
    before: Explanation
    after: Explanation


def suggest(asked: Asked, settings: ReaderSettings | None = None) -> Suggestion:
    """Find the smallest change that lets traffic pass.

    Args:
        asked: the traffic, and the realm that refuses it.
        settings: how changed documents are read.

    Returns:
        The steps; none if nothing refuses the traffic.

    Raises:
        NoRemedyError: nothing helps.
    """
    settings = settings or ReaderSettings(
        cluster_name=asked.realm.cluster, assumed=frozenset(SWITCHED)
    )
    objects = {one.key: one for one in asked.realm.objects}
    first = before = asked.answer()
    remedies: list[Remedy] = []
    for _ in range(_ROUNDS):
        side = _refusing(before)
        if side is None:
            return Suggestion(remedies=tuple(remedies), before=first, after=before)
        case = _case(asked, before, side, objects)
        for candidate in candidates(case):
            changed = _with(objects, candidate, settings)
            if changed is None:
                continue
            after = _answer(asked, changed)
            if _helps(side, _side(after, side.direction)):
                break
        else:
            raise NoRemedyError(f"{side.direction} of {side.endpoint}: {_hopeless(side)}")
        remedies.append(_remedy(objects, changed, candidate))
        objects, before = changed, after
    raise NoRemedyError(f"{_ROUNDS} changes were not enough")


def _refusing(explanation: Explanation) -> Walk | None:
    for side in (explanation.egress, explanation.ingress):
        if side is not None and side.verdict not in _PASSES:
            return side
    return None


def _side(explanation: Explanation, direction: str) -> Walk | None:
    return explanation.ingress if direction == "ingress" else explanation.egress


def _answer(asked: Asked, objects: Mapping[ObjectKey, PolicyObject]) -> Explanation:
    realm = rehearsed(asked.realm, asked.traffic, objects.values())
    return Asked(realm, asked.traffic, asked.request, asked.form).answer()


def _helps(before: Walk, after: Walk | None) -> bool:
    """Say whether a change was one step forward: the side passes, or fewer denies apply.

    Those that do not decide count as well: they may, once a deny before them is gone.
    """
    if after is None or after.verdict in _PASSES:
        return True
    return _denies_count(after) < _denies_count(before)


def _denies_count(side: Walk) -> int:
    return sum(step.action == "deny" and not step.failed for step in side.steps)


def _hopeless(side: Walk) -> str:
    if not side.enforced or not (side.steps or side.isolated_by):
        return side.because
    return f"{side.because}, and no change of a policy that was tried allows it"


def _case(
    asked: Asked, before: Explanation, side: Walk, objects: Mapping[ObjectKey, PolicyObject]
) -> Case:
    source, destination, protocol, port = asked.traffic
    view = asked.realm.view
    subject, peer = (destination, source) if side.direction == "ingress" else (source, destination)
    labels = {row.number: row.labels for row in view.snapshot.identities}

    def labels_at(address: bytes) -> LabelSet:
        return LabelSet.parse(labels.get(view.peer(address).identity, ()))

    return Case(
        walk=side,
        objects=objects,
        subject=labels_at(subject),
        peer=labels_at(peer),
        prefix=Prefix(peer, 8 * len(peer)),
        protocol=protocol,
        port=port,
        request=asked.request,
        names=(before.source, before.destination),
    )


def _with(
    objects: Mapping[ObjectKey, PolicyObject], candidate: Candidate, settings: ReaderSettings
) -> dict[ObjectKey, PolicyObject] | None:
    """Return the objects with a change, None if what it makes is refused."""
    present = objects.get(candidate.key)
    changed = dict(objects)
    if candidate.edits is None:
        changed.pop(candidate.key)
        return changed
    document = candidate.document
    if document is None:
        assert present is not None
        try:
            document = applied(present.document, candidate.edits)
        except EditError:
            return None
    file = present.file if present is not None else ""
    result = read(written(document), file, settings=settings)
    if result.errors or [one.key for one in result.objects] != [candidate.key]:
        return None
    changed[candidate.key] = result.objects[0]
    return changed


def _remedy(
    before: Mapping[ObjectKey, PolicyObject],
    after: Mapping[ObjectKey, PolicyObject],
    candidate: Candidate,
) -> Remedy:
    old, new = before.get(candidate.key), after.get(candidate.key)
    return Remedy(
        key=candidate.key,
        says=candidate.says,
        edits=candidate.edits,
        before=old.document if old is not None else None,
        after=new.document if new is not None else None,
        file=old.file if old is not None else "",
    )
