"""Endpoints and policies that come and go with the files of watched directories.

A file that is invalid changes nothing: its last valid text stays, and the status says what is wrong
until the file is mended or gone.
"""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path

from firewall.agent.config import Config
from firewall.agent.declaration import read_declarations
from firewall.agent.document import DocumentError
from firewall.agent.engine import Engine
from firewall.agent.policies import InvalidPolicyError
from firewall.agent.watch import POLL_INTERVAL_S, DirectoryWatch
from firewall.control.journal import fields

log = logging.getLogger(__name__)


class Following:
    """Follows the two directories of a configuration.

    Args:
        engine: what is changed.
        config: says which directories.
        problems: where the status finds what is wrong, by topic.
    """

    def __init__(self, engine: Engine, config: Config, problems: dict[str, str]) -> None:
        self._engine = engine
        self._problems = problems
        self._policy_watch = DirectoryWatch(config.policy.directory)
        self._endpoint_watch = DirectoryWatch(config.endpoint_directory)
        self._endpoint_files: set[Path] = set()
        self._looking = asyncio.Lock()

    def reconfigure(self, config: Config) -> None:
        """Watch the directories of another configuration from the next look on."""
        if config.policy.directory != self._policy_watch.directory:
            self._policy_watch = DirectoryWatch(config.policy.directory)
        if config.endpoint_directory != self._endpoint_watch.directory:
            self._endpoint_watch = DirectoryWatch(config.endpoint_directory)

    async def run(self) -> None:
        """Look at both directories at intervals, until cancelled."""
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            await self.follow()

    async def follow(self) -> None:
        """Look once; whatever goes wrong is said, and the next look tries again."""
        try:
            await self.look()
            self._problems.pop("watched directories", None)
        except Exception as error:  # of any kind: the policies in force must outlive a bad file
            if self._problems.get("watched directories") != repr(error):
                log.exception("watched directories not followed")
            self._problems["watched directories"] = repr(error)

    async def look(self, *, first: bool = False) -> None:
        """Follow what has changed since the last look; `first`: at the start of the daemon.

        Raises:
            InvalidPolicyError: `first`, and a file is invalid of which no valid text is known.
        """
        # A reload looks too, and an older text must not come into force after a newer one.
        async with self._looking:
            await self._follow_policies(first=first)
            await self._follow_endpoints()

    async def _follow_policies(self, *, first: bool) -> None:
        """Follow the policy directory."""
        watch, book = self._policy_watch, self._engine.book
        found = await asyncio.to_thread(watch.look)
        errors = dict(found.errors)
        followed = set(book.followed())
        texts: dict[Path, str | None] = {**found.texts}
        if not found.errors:
            gone = {*followed, *map(Path, book.refused)} - set(watch.paths)
            texts = dict.fromkeys(sorted(gone)) | texts
        for path, text in texts.items():
            try:
                change = await self._engine.follow_file(path, text)
            except OSError as error:
                watch.forget(path)
                errors[path] = f"not persisted: {error}"
                continue
            if change is None:
                problems = book.refused[str(path)]
                if first and path not in followed:
                    raise InvalidPolicyError(problems)
                log.error(
                    "policy file is invalid, its last valid text stays",
                    extra=fields(file=path, problems="; ".join(map(str, problems))),
                )
        self._note("policy.directory", errors)

    async def _follow_endpoints(self) -> None:
        """Follow the endpoint directory."""
        watch = self._endpoint_watch
        found = await asyncio.to_thread(watch.look)
        errors = dict(found.errors)
        texts: dict[Path, str] = found.texts
        if not found.errors:
            followed = {
                Path(member.declaration.place.file)
                for member in self._engine.roster
                if member.origin == "directory"
            }
            gone = (followed | self._endpoint_files) - set(watch.paths)
            texts = dict.fromkeys(sorted(gone), "") | texts
            self._endpoint_files = set(watch.paths)
        for path, text in texts.items():
            topic = f"endpoint file {path}"
            try:
                declarations = read_declarations(text, str(path))
                await self._engine.sync_endpoints(declarations, "directory", str(path))
            except DocumentError as error:
                self._problems[topic] = f"its last valid text stays: {error}"
                log.error("endpoint file is invalid", extra=fields(problems=str(error)))  # noqa: TRY400 - the user's mistake, and the text names it
            except OSError as error:
                watch.forget(path)
                self._endpoint_files.add(path)  # if it is gone, it is looked for once more
                errors[path] = f"not persisted: {error}"
            else:
                self._problems.pop(topic, None)
                if f"endpoints in {path}" in self._engine.problems:
                    watch.forget(path)  # what it contradicts may go
        self._note("endpoint_directory", errors)

    def _note(self, topic: str, errors: Mapping[Path, str]) -> None:
        """Show what cannot be read, or that everything can."""
        if errors:
            listed = "; ".join(f"{path} {error}" for path, error in errors.items())
            self._problems[topic] = listed
        else:
            self._problems.pop(topic, None)
