r"""State that outlives the daemon: one value per file, complete or refused, never half-read.

A file is one header line, `bartizan-<kind> <format> <payload length> <sha256>\n`, then the payload
(JSON). It is written under another name, synced and renamed into place, so a crash leaves the old
or the new one. What cannot be read is never overwritten or removed: the error says what is wrong
and how to mend it, and the daemon does not start without the file. Going on without it would mean
fewer policies than the operator applied, and so an open door.
"""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import TypeVar

import msgspec

FORMAT = 1
"""Raised when the meaning of a payload changes; other numbers are refused."""

T = TypeVar("T")


class StateError(Exception):
    """A state file cannot be used; the text says why and what to do."""


def write(path: Path, kind: str, value: object) -> None:
    """Replace the file by `value`, durably.

    Raises:
        OSError: the disk refuses.
    """
    payload = msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"
    digest = hashlib.sha256(payload).hexdigest()
    header = f"bartizan-{kind} {FORMAT} {len(payload)} {digest}\n".encode()
    replace(path, header + payload)


def read(path: Path, kind: str, shape: type[T], mend: str = "") -> T | None:
    """Return the value of a file, None if there is no file.

    Args:
        path: the file.
        kind: what `write` was told.
        shape: the msgspec type of the value.
        mend: what happens if the operator moves the file away, for the message; "" = the caller
            moves it away.

    Raises:
        StateError: cut short, altered, of another kind or version, or not readable.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"{path}: cannot be read: {error.strerror}") from error
    advice = ""
    if mend:
        advice = f"; it was left as it is; restore it from a backup, or move it away to {mend}"
    header, newline, payload = data.partition(b"\n")
    words = header.decode(errors="replace").split(" ")
    if not newline or len(words) != 4 or words[0] != f"bartizan-{kind}":
        raise StateError(f"{path}: is no bartizan-{kind} file{advice}")
    if words[1] != str(FORMAT):
        other = ", or run the version that wrote it" if mend else ""
        raise StateError(
            f"{path}: has format {words[1]}, this version reads {FORMAT}{advice}{other}"
        )
    if words[2] != str(len(payload)):
        raise StateError(f"{path}: is cut short: {len(payload)} bytes of {words[2]}{advice}")
    if words[3] != hashlib.sha256(payload).hexdigest():
        raise StateError(f"{path}: was altered: its SHA-256 does not match{advice}")
    try:
        return msgspec.json.decode(payload, type=shape)
    except msgspec.MsgspecError as error:
        raise StateError(f"{path}: does not decode: {error}{advice}") from error


def replace(path: Path, data: bytes) -> None:
    """Put `data` at `path` as a whole (mode 0600): synced, renamed, directory synced.

    Raises:
        OSError: the disk refuses; the old file stands.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).rename(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
