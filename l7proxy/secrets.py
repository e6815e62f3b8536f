"""Secrets of `headerMatches`, read from files: `<folder>/<namespace>/<name>`.

The value is the file's content without a final line break. A file is read once per snapshot. A name
that could lead out of the folder has no secret; a missing secret makes its rule match nothing
(Cilium: a missing secret without an inline value fails). So does an empty one, which may be about
to be written: an empty value would ask for the header's presence only.
"""

import re
from pathlib import Path

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
"""A DNS subdomain (RFC 1123), as Kubernetes asks of names of secrets and namespaces."""


def is_name(text: str) -> bool:
    """Whether a text can name a secret, its namespace or an item, and leads out of no folder."""
    return _NAME.fullmatch(text) is not None


class SecretFiles:
    """Callable as `firewall.policy.http_match.SecretReader`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, str], bytes | None] = {}

    def __call__(self, namespace: str, name: str) -> bytes | None:
        """Return the value of a secret, None if there is none."""
        key = namespace, name
        if key not in self._known:
            self._known[key] = self._read(namespace, name)
        return self._known[key]

    def forget(self) -> None:
        """Read every file again when it is next asked for."""
        self._known.clear()

    def _read(self, namespace: str, name: str) -> bytes | None:
        if not (is_name(namespace) and is_name(name)):
            return None
        try:
            data = (self._folder / namespace / name).read_bytes()
        except OSError:
            return None
        return data.removesuffix(b"\n").removesuffix(b"\r") or None
