"""A watched directory: which files it has, and which are new or changed since the last look.

Polled, not notified: one `stat` per file and second costs nothing at this size, works on every file
system (network and overlay ones do not notify), and never misses an event. A file counts as changed
when its inode, size or modification time differ, so both an edit in place and a rename into place
are seen. Hidden files and other suffixes are no concern of ours: editors' scratch files end there.
"""

from pathlib import Path
from typing import NamedTuple

SUFFIXES = frozenset({".yaml", ".yml", ".json"})
"""Files that are read."""

POLL_INTERVAL_S = 1.0
"""Time between two looks: a change is in force within about this time."""

MAX_FILE_BYTES = 16 * 1024 * 1024
"""Larger files are refused: a policy of this size is a mistake, and reading it would stall us."""


class Stamp(NamedTuple):
    """What identifies the content of a file without reading it."""

    inode: int
    size: int
    modified_ns: int


class Found(NamedTuple):
    """What one look found; `texts` has the changed files, `errors` those that cannot be read."""

    texts: dict[Path, str]
    errors: dict[Path, str]


class DirectoryWatch:
    """Remembers what it saw; `look` returns the difference. Blocks for as long as the disk does.

    Args:
        directory: what to watch, None = nothing: no file is ever there.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self._seen: dict[Path, Stamp] = {}

    def look(self) -> Found:
        """Return what differs from the last look.

        A directory that is missing, or cannot be read, is an error and no reason to forget its
        files: an unmounted directory must not take policies away.
        """
        texts: dict[Path, str] = {}
        errors: dict[Path, str] = {}
        if self.directory is None:
            return Found({}, {})
        try:
            present = _stamps(self.directory)
        except OSError as error:
            return Found({}, {self.directory: f"cannot be read: {error.strerror}"})
        for path, stamp in sorted(present.items()):
            if self._seen.get(path) == stamp:
                continue
            try:
                if stamp.size > MAX_FILE_BYTES:
                    errors[path] = f"{stamp.size} bytes; at most {MAX_FILE_BYTES} are read"
                else:
                    texts[path] = path.read_text()
            except OSError as error:
                errors[path] = f"cannot be read: {error.strerror}"
            except UnicodeDecodeError as error:
                errors[path] = f"is not UTF-8: {error.reason} at byte {error.start}"
        self._seen = present
        return Found(texts, errors)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Return the files that the last look saw."""
        return tuple(sorted(self._seen))

    def forget(self, path: Path) -> None:
        """Take a file as new at the next look."""
        self._seen.pop(path, None)


def _stamps(directory: Path) -> dict[Path, Stamp]:
    """Return the stamp of every file that concerns us."""
    stamps: dict[Path, Stamp] = {}
    for path in directory.iterdir():
        if path.suffix not in SUFFIXES or path.name.startswith("."):
            continue
        try:
            info = path.stat()
        except FileNotFoundError:
            continue  # gone between listing and looking, or a dangling link
        if path.is_file():
            stamps[path] = Stamp(info.st_ino, info.st_size, info.st_mtime_ns)
    return stamps
