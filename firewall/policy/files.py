"""Policy files on disk: read files and directories into one result (I/O).

Everything that keeps a file from being read is a problem of that file like any other, so a caller
has one list to show. A directory means its `*.yaml`, `*.yml` and `*.json` files, at any depth;
names that begin with a dot are left out (editors and mounted ConfigMaps keep their own there).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from firewall.policy.problem import Problem
from firewall.policy.readers import ReaderSettings, ReadResult, merge, read

SUFFIXES = frozenset({".yaml", ".yml", ".json"})
"""What a policy file of a directory is called."""

MAX_FILE_BYTES = 32 * 1024 * 1024
"""Largest file that is read: a thousand times Cilium's largest example, and harmless in memory."""


def read_paths(
    paths: Iterable[str | Path], *, settings: ReaderSettings | None = None
) -> ReadResult:
    """Read every policy file below the paths.

    Args:
        paths: files (of any name) and directories.
        settings: as for `readers.read`.

    Returns:
        The objects of all files; an object that two files give differently is refused.
    """
    results: list[ReadResult] = []
    seen: set[Path] = set()
    for path in map(Path, paths):
        found = list(files_of(path))
        if not found:
            results.append(_failed(path, "holds no *.yaml, *.yml or *.json file", "warning"))
        for file in found:
            if file not in seen:
                seen.add(file)
                results.append(read_file(file, settings=settings))
    return merge(results)


def read_file(path: Path, *, settings: ReaderSettings | None = None) -> ReadResult:
    """Read one policy file; what keeps it from being read is a problem of the result."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        return _failed(path, f"cannot be read: {error.strerror or error}")
    if len(data) > MAX_FILE_BYTES:
        return _failed(path, f"is larger than {MAX_FILE_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = Problem.error(str(path), line, 1, "", f"not UTF-8 text: {error.reason}")
        return ReadResult(problems=(problem,))
    return read(text, str(path), settings=settings)


def files_of(path: Path) -> Iterator[Path]:
    """Yield a file itself, or the policy files of a directory in order of their paths."""
    if not path.is_dir():
        yield path
        return
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not hidden and file.suffix in SUFFIXES and file.is_file():
            yield file


def _failed(path: Path, message: str, severity: str = "error") -> ReadResult:
    make = Problem.error if severity == "error" else Problem.warning
    return ReadResult(problems=(make(str(path), 0, 0, "", message),))
