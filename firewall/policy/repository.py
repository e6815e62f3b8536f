"""The policy objects in force, and the revision that counts their changes.

An object is replaced by one with the same key (kind, namespace, name) and is otherwise immutable.
Every call that changes something is one revision, however many objects it carries, and says what
it did, object by object, so that the resolver touches only the identities concerned.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from firewall.identities.labels import ANY
from firewall.policy.model import ObjectKey, PolicyObject


class ChangeKind(StrEnum):
    """What happened to one object; the words are kubectl's."""

    CREATED = "created"
    CONFIGURED = "configured"
    UNCHANGED = "unchanged"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectChange:
    """One object before and after; None = it did not exist, or does not any more."""

    key: ObjectKey
    kind: ChangeKind
    before: PolicyObject | None
    after: PolicyObject | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryChange:
    """The answer to one call: the revision after it and every object named in it."""

    revision: int
    objects: tuple[ObjectChange, ...] = field(default=())

    @property
    def changed(self) -> tuple[ObjectChange, ...]:
        """The objects that are not as before."""
        return tuple(one for one in self.objects if one.kind is not ChangeKind.UNCHANGED)


def order_of(key: ObjectKey) -> tuple[str, str, str]:
    """Sort key of objects: by kind, namespace, name."""
    return key.kind, key.namespace, key.name


class Repository:
    """The objects by key. `revision` begins at 1, as Cilium's does, or where it was left."""

    def __init__(self, *, revision: int = 1) -> None:
        self._objects: dict[ObjectKey, PolicyObject] = {}
        self.revision = revision

    @property
    def objects(self) -> tuple[PolicyObject, ...]:
        """All objects, ordered by kind, namespace and name."""
        return tuple(self._objects[key] for key in sorted(self._objects, key=order_of))

    def get(self, key: ObjectKey) -> PolicyObject | None:
        """Return one object, None if there is none."""
        return self._objects.get(key)

    def select(
        self,
        *,
        labels: Iterable[str] = (),
        kind: str | None = None,
        namespace: str | None = None,
        name: str | None = None,
    ) -> tuple[PolicyObject, ...]:
        """Return the objects that carry all of these labels and agree with the given names.

        A label of the source `any` is carried under whatever source (Cilium ParseSelectLabel).
        """
        wanted = tuple(labels)
        return tuple(
            one
            for one in self.objects
            if all(_carries(one, label) for label in wanted)
            and kind in (None, one.key.kind)
            and namespace in (None, one.key.namespace)
            and name in (None, one.key.name)
        )

    def apply(self, objects: Iterable[PolicyObject]) -> RepositoryChange:
        """Add or replace objects; an object equal to the present one changes nothing.

        Of several objects with one key the last counts.
        """
        wanted = {one.key: one for one in objects}
        changes = [self._put(one) for one in wanted.values()]
        return self._commit(changes)

    def replace(
        self, objects: Iterable[PolicyObject], *, within: Callable[[PolicyObject], bool]
    ) -> RepositoryChange:
        """Apply objects and delete the others of the set that `within` describes, in one revision.

        This is how a watched directory is followed: a file that is gone takes its objects along.
        """
        wanted = {one.key: one for one in objects}
        stale = [one.key for one in self.objects if within(one) and one.key not in wanted]
        changes = [self._drop(key) for key in stale]
        changes += [self._put(one) for one in wanted.values()]
        return self._commit(changes)

    def delete(
        self, keys: Iterable[ObjectKey] = (), *, labels: Iterable[str] = ()
    ) -> RepositoryChange:
        """Delete objects by key, and those that carry all of `labels` (none given: none meant)."""
        doomed = dict.fromkeys(key for key in keys if key in self._objects)
        listed = tuple(labels)
        if listed:
            doomed |= dict.fromkeys(one.key for one in self.select(labels=listed))
        return self._commit([self._drop(key) for key in doomed])

    def _put(self, new: PolicyObject) -> ObjectChange:
        old = self._objects.get(new.key)
        kind = ChangeKind.CONFIGURED
        if old is None:
            kind = ChangeKind.CREATED
        elif old == new and old.document == new.document:
            kind = ChangeKind.UNCHANGED
        self._objects[new.key] = new
        return ObjectChange(key=new.key, kind=kind, before=old, after=new)

    def _drop(self, key: ObjectKey) -> ObjectChange:
        old = self._objects.pop(key)
        return ObjectChange(key=key, kind=ChangeKind.DELETED, before=old, after=None)

    def _commit(self, changes: list[ObjectChange]) -> RepositoryChange:
        if any(one.kind is not ChangeKind.UNCHANGED for one in changes):
            self.revision += 1
        return RepositoryChange(revision=self.revision, objects=tuple(changes))


def _carries(one: PolicyObject, label: str) -> bool:
    source, _, rest = label.partition(":")
    if source != ANY:
        return label in one.labels
    return any(own.partition(":")[2] == rest for own in one.labels)
