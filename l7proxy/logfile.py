"""The file of the access log."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from l7proxy.accesslog import Ends
from l7proxy.commands import Record
from l7proxy.logformat import Line

log = logging.getLogger(__name__)

_WAITING_BYTES = 64 * 1024
"""Lines that wait for `flush` at most."""


class AccessLog:
    """The file of log lines; opened again when its name stands for another file (logrotate).

    A line that cannot be written (no such folder, no space left) is lost and counted; requests are
    served all the same. What is left of one that was cut ends where it was cut.

    Attributes:
        lost_count: lines that were not written, or not whole.
        problem: why lines cannot be written now, "" if they can.

    Args:
        path: the file; lines are appended.
        line: makes one.
        hostname: for %HOSTNAME%.
    """

    def __init__(self, path: Path, line: Callable[[Line], str], hostname: str) -> None:
        self._path = path
        self._line = line
        self._hostname = hostname
        self._count = 0
        self._lines: list[bytes] = []
        self._waiting_bytes = 0
        self._cut = False
        self.lost_count = 0
        self.problem = ""
        self._file: BinaryIO | None = None
        self.reopen()

    def write(self, record: Record, ends: Ends, time_ns: int) -> None:
        """Write the line of a final record that ended at `time_ns`; it may wait for `flush`."""
        self._count += 1
        text = self._line(
            Line(
                record,
                (ends.source, ends.source_port),
                (ends.destination, ends.destination_port),
                ends.upstream_port,
                ends.connection_id,
                self._count,
                time_ns,
                self._hostname,
            )
        )
        data = text.encode("ascii", "backslashreplace")
        self._lines.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= _WAITING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self._lines:
            return
        lines, self._lines, self._waiting_bytes = self._lines, [], 0
        if self._file is None:
            self.lost_count += len(lines)
            return
        ending = b"\n" if self._cut else b""
        data = ending + b"".join(lines)
        written = 0
        try:
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            if written:
                self._cut = not data[:written].endswith(b"\n")
            self.lost_count += data.count(b"\n", max(written, len(ending)))
            self._fail(error)
        else:
            self._cut = False
            self.problem = ""

    def _fail(self, error: OSError) -> None:
        problem = f"access log {self._path}: {error.strerror or error}"
        if self.problem != problem:
            log.warning("%s", problem)
        self.problem = problem

    def follow(self) -> None:
        """Open the file again if somebody moved or removed it, or if it could not be opened."""
        try:
            found = self._path.stat().st_ino
        except OSError:
            found = 0
        if self._file is None or found != os.fstat(self._file.fileno()).st_ino:
            self.reopen()

    def reopen(self) -> None:
        """Go on in the file that has the name now; keep the old one if there can be none."""
        self.flush()
        try:
            # A raw file is what open() gives without a buffer, whatever its stubs say.
            fresh = cast("BinaryIO", self._path.open("ab", buffering=0))
        except OSError as error:
            self._fail(error)
            return
        if self._file is not None:
            self._file.close()
        self._file = fresh
        self._cut = False
        self.problem = ""

    def close(self) -> None:
        """Write what waits, and close."""
        self.flush()
        if self._file is not None:
            self._file.close()
