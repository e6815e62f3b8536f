"""Secrets of `headerMatches`, read from files: `<folder>/<namespace>/<name>`.

The value is the file's content without a final line break. A file is read once, and again when it
is another one (`renewal`) and for each snapshot. A name that could lead out of the folder has no
secret; a missing secret makes its rule match nothing (Cilium: a missing secret without an inline
value fails). So does an empty one, which may be about to be written: an empty value would ask for
the header's presence only.
"""

import re
from pathlib import Path

from l7proxy.renewal import News

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
"""A DNS subdomain (RFC 1123), as Kubernetes asks of names of secrets and namespaces."""


def is_name(text: str) -> bool:
    """Whether a text can name a secret, its namespace or an item, and leads out of no folder."""
    return _NAME.fullmatch(text) is not None


class SecretFiles:
    """Callable as `firewall.policy.http_match.SecretReader`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, str], tuple[bytes | None, Stamp | None]] = {}

    def __call__(self, namespace: str, name: str) -> bytes | None:
        """Return the value of a secret, None if there is none."""
        key = namespace, name
        known = self._known.get(key)
        if known is None:
            path = self._path(*key)
            # Before it is read, so that what is written meanwhile is news.
            stamp = stamp_of(path)
            self._known[key] = known = _read(path), stamp
        return known[0]

    def forget(self) -> None:
        """Read every file again when it is next asked for."""
        self._known.clear()

    def news(self) -> News:
        """Return the files that are not those that were read, with their stamps now."""
        return tuple(
            (key, stamp)
            for key, (_, known) in self._known.items()
            if (stamp := stamp_of(self._path(*key))) != known
        )

    def _path(self, namespace: str, name: str) -> Path | None:
        if is_name(namespace) and is_name(name):
            return self._folder / namespace / name
        return None


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data.removesuffix(b"\n").removesuffix(b"\r") or None


Stamp = tuple[int, int, int]
"""Inode, size in bytes, nanoseconds of the last change: another one is another content."""


def stamp_of(path: Path | None) -> Stamp | None:
    """Return what changes when a file does, also behind a link; None: there is none."""
    if path is None:
        return None
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
