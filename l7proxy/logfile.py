"""The file of the access log."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from l7proxy.accesslog import Ends
from l7proxy.commands import Record
from l7proxy.logformat import Line

log = logging.getLogger(__name__)


class AccessLog:
    """The file of log lines; opened again when its name stands for another file (logrotate).

    Args:
        path: the file; lines are appended.
        line: makes one.
        hostname: for %HOSTNAME%.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, line: Callable[[Line], str], hostname: str) -> None:
        self._path = path
        self._line = line
        self._hostname = hostname
        self._count = 0
        self._file = self._open()

    def _open(self) -> IO[str]:
        return self._path.open("a", encoding="ascii", errors="backslashreplace", buffering=65536)

    def write(self, record: Record, ends: Ends, time_ns: int) -> None:
        """Write the line of a final record that ended at `time_ns`; it may wait for `flush`."""
        self._count += 1
        self._file.write(
            self._line(
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
        )

    def flush(self) -> None:
        """Write what waits."""
        self._file.flush()

    def follow(self) -> None:
        """Open the file again if somebody moved or removed it."""
        try:
            found = self._path.stat().st_ino
        except OSError:
            found = 0
        if found != os.fstat(self._file.fileno()).st_ino:
            self.reopen()

    def reopen(self) -> None:
        """Go on in the file that has the name now; keep the old one if there can be none."""
        try:
            fresh = self._open()
        except OSError as error:
            log.warning("access log not reopened: %s", error)
            return
        self._file.close()
        self._file = fresh

    def close(self) -> None:
        """Write what waits, and close."""
        self._file.close()
