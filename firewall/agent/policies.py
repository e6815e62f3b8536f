"""Policies over a restart: the texts that operators applied, and the files that they keep.

Persisted is what was written, not what was understood: lines and columns in flow records and
explanations stay true after a restart. A text is kept as long as one of its objects is in force.
Files of the policy directory are kept as well, as they were when last valid, so that a broken edit
neither takes policies away nor keeps the daemon from starting again.

A text may hold policies and what they name (namespaces, services, CIDR groups): both are objects
with a key here; policies live in the `Repository`, the others in `resources`.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from firewall.agent import statefile
from firewall.agent.statefile import StateError
from firewall.policy.model import ObjectKey, PolicyObject
from firewall.policy.objects import NamespaceObject, Resource, resource_key
from firewall.policy.problem import Problem
from firewall.policy.readers import SWITCHED, ReaderSettings, ReadResult, merge, read
from firewall.policy.repository import ChangeKind, Repository, RepositoryChange

Source = Literal["api", "directory"]

Key = tuple[str, str, str]
"""(kind, namespace, name) of an object; namespace "" for cluster-wide kinds."""

_FILE = "policies"
_MEND = "start with no policy but that of the policy directory (endpoints are then open)"


class PolicyText(NamedTuple):
    """A text as its author knows it: the name of its file, and what is in it."""

    file: str
    text: str


class InvalidPolicyError(Exception):
    """Policies were refused; nothing of the texts was applied."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = sum(problem.severity == "error" for problem in self.problems)
        noun = "error" if count == 1 else "errors"
        super().__init__(f"the policies are invalid: {count} {noun}, nothing was applied")


class StoredText(msgspec.Struct, frozen=True, kw_only=True):
    """One text and which of its objects count."""

    source: Source
    file: str
    text: str
    keys: tuple[Key, ...]


class BookChange(NamedTuple):
    """What one call did.

    Attributes:
        policies: to the repository.
        resources: to the other objects, by key.
        warnings: what the reader thinks of the text.
        applied: the policies of the text.
    """

    policies: RepositoryChange
    resources: dict[Key, ChangeKind]
    warnings: tuple[Problem, ...] = ()
    applied: tuple[PolicyObject, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything is not as before."""
        return bool(self.policies.changed) or any(
            kind is not ChangeKind.UNCHANGED for kind in self.resources.values()
        )

    def listed(self) -> Iterator[tuple[Key, ChangeKind]]:
        """Yield every object concerned and what happened to it."""
        for one in self.policies.objects:
            yield key_row(one.key), one.kind
        yield from self.resources.items()


class PolicyBook:
    """The objects in force together with the texts that they come from.

    Attributes:
        repository: the policies.
        resources: the other objects, by key.
        refused: what is wrong now, by file: the file's objects are those of its last valid text.
    """

    def __init__(
        self, state_dir: Path, repository: Repository, settings: ReaderSettings | None = None
    ) -> None:
        self.repository = repository
        self.resources: dict[Key, Resource] = {}
        self.refused: dict[str, tuple[Problem, ...]] = {}
        self._settings = settings or ReaderSettings()
        self._path = state_dir / _FILE
        self._texts: list[StoredText] = []

    def restore(self) -> BookChange:
        """Apply what was in force before the restart.

        What a setting has switched off meanwhile stays, so that the daemon starts and the object
        can be seen and deleted.

        Raises:
            StateError: the state file cannot be used.
            InvalidPolicyError: this version refuses what an earlier one took.
        """
        stored = statefile.read(self._path, "policies", tuple[StoredText, ...], _MEND) or ()
        objects: list[PolicyObject] = []
        resources: list[Resource] = []
        restored = dataclasses.replace(self._settings, assumed=frozenset(SWITCHED))
        for text in stored:
            result = self._read(text.text, text.file, restored)
            found = _keys(result)
            missing = set(text.keys) - found
            if missing:
                raise StateError(f"{self._path}: {text.file} holds no {'/'.join(missing.pop())}")
            objects += [one for one in result.objects if key_row(one.key) in text.keys]
            resources += [one for one in result.resources if resource_key(one) in text.keys]
        self._texts = list(stored)
        if objects:
            # What is restored is what that revision was: it is not another one.
            self.repository.revision -= 1
        return self._commit(self.repository.apply(objects), resources)

    def apply(self, texts: Iterable[PolicyText]) -> BookChange:
        """Apply all objects of some texts as one change; each replaces the one with its key.

        Raises:
            InvalidPolicyError: something in one of them is wrong, or two of them give one object;
                nothing changed.
            OSError: they could not be persisted; nothing changed.
        """
        given = [(one, read(one.text, one.file, settings=self._settings)) for one in texts]
        result = merge(each for _, each in given)
        if result.errors:
            raise InvalidPolicyError(result.problems)
        kept = self._texts
        for (file, text), each in given:
            kept = _with(kept, "api", file, text, each)
        self._save(kept)
        change = self.repository.apply(result.objects)
        return self._commit(change, result.resources)._replace(
            warnings=result.problems, applied=tuple(result.objects)
        )

    def follow(self, path: Path, text: str) -> BookChange | None:
        """Bring the objects of a file of the policy directory in line with its content.

        Returns:
            What changed, None if the file is invalid: its objects stay, `refused` says why.

        Raises:
            OSError: it could not be persisted; nothing changed.
        """
        file = str(path)
        try:
            result = self._read(text, file)
        except InvalidPolicyError as error:
            self.refused[file] = tuple(p for p in error.problems if p.severity == "error")
            return None
        self.refused.pop(file, None)
        old = self._keys_of_file(file)
        self._save(_with(self._texts, "directory", file, text, result))
        change = self.repository.replace(result.objects, within=lambda one: key_row(one.key) in old)
        return self._commit(change, result.resources, gone=old - _keys(result))

    def unfollow(self, path: Path) -> BookChange:
        """Delete the objects of a file that is gone."""
        self.refused.pop(str(path), None)
        return self.delete(self._keys_of_file(str(path)))

    def followed(self) -> tuple[Path, ...]:
        """Return the files whose objects are in force."""
        return tuple(Path(text.file) for text in self._texts if text.source == "directory")

    def delete(self, keys: Iterable[Key]) -> BookChange:
        """Delete objects, wherever they came from; unknown keys are no error.

        Raises:
            OSError: it could not be persisted; nothing changed.
        """
        doomed = set(keys)
        self._save(_without(self._texts, doomed))
        change = self.repository.delete(
            ObjectKey(kind=kind, namespace=namespace, name=name) for kind, namespace, name in doomed
        )
        return self._commit(change, (), gone=doomed)

    def text_of(self, key: Key) -> StoredText | None:
        """Return the text that an object in force comes from."""
        return next((text for text in self._texts if key in text.keys), None)

    def files_of(self, keys: Iterable[Key]) -> dict[Key, str]:
        """Return the file of the policy directory that each object comes from, if one does."""
        found = ((key, self.text_of(key)) for key in keys)
        return {
            key: text.file for key, text in found if text is not None and text.source == "directory"
        }

    def namespaces(self) -> dict[str, NamespaceObject]:
        """Return the namespaces that were declared, by name."""
        return {
            one.name: one for one in self.resources.values() if isinstance(one, NamespaceObject)
        }

    def _read(self, text: str, file: str, settings: ReaderSettings | None = None) -> ReadResult:
        """Read a text, all or nothing."""
        result = read(text, file, settings=settings or self._settings)
        if result.errors:
            raise InvalidPolicyError(result.problems)
        return result

    def _commit(
        self, change: RepositoryChange, resources: Iterable[Resource], gone: Iterable[Key] = ()
    ) -> BookChange:
        """Take resources in and out, and say what happened."""
        kinds: dict[Key, ChangeKind] = {}
        for key in gone:
            if self.resources.pop(key, None) is not None:
                kinds[key] = ChangeKind.DELETED
        for one in resources:
            key = resource_key(one)
            old = self.resources.get(key)
            self.resources[key] = one
            kinds[key] = ChangeKind.CREATED if old is None else ChangeKind.CONFIGURED
            if old == one:
                kinds[key] = ChangeKind.UNCHANGED
        return BookChange(change, kinds)

    def _keys_of_file(self, file: str) -> set[Key]:
        """Return the keys that a file of the policy directory owns."""
        return {
            key
            for text in self._texts
            if text.source == "directory" and text.file == file
            for key in text.keys
        }

    def _save(self, texts: list[StoredText]) -> None:
        """Persist, then believe it."""
        if texts != self._texts:
            statefile.write(self._path, "policies", tuple(texts))
            self._texts = texts


def key_row(key: ObjectKey) -> Key:
    """Return a key as it is persisted and listed."""
    return key.kind, key.namespace, key.name


def _keys(result: ReadResult) -> set[Key]:
    """Return the keys of everything that was read."""
    return {key_row(one.key) for one in result.objects} | set(map(resource_key, result.resources))


def _with(
    texts: Iterable[StoredText], source: Source, file: str, text: str, result: ReadResult
) -> list[StoredText]:
    """Return the texts and one more, which is the origin of its objects from now on."""
    keys = _keys(result)
    kept = _without(texts, keys)
    if source == "directory":
        kept = [one for one in kept if (one.source, one.file) != (source, file)]
    if keys:
        kept.append(StoredText(source=source, file=file, text=text, keys=tuple(sorted(keys))))
    return kept


def _without(texts: Iterable[StoredText], keys: set[Key]) -> list[StoredText]:
    """Return the texts without these objects; a text without objects goes."""
    left = []
    for text in texts:
        remaining = tuple(key for key in text.keys if key not in keys)
        if remaining == text.keys:
            left.append(text)
        elif remaining:
            left.append(msgspec.structs.replace(text, keys=remaining))
    return left
