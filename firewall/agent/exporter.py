"""Flows as JSON lines in a file, rotated by size: history that survives the daemon.

Lines are Hubble's, so `hubble observe --input-file` reads them. A file that has reached its size is
renamed to `.1`, the older ones move up, the oldest goes. What cannot be written is counted, said
once, and tried again with the next batch: a full disk is no reason to stop.
"""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from firewall.control.journal import fields

log = logging.getLogger(__name__)


class Exporter:
    """Appends lines to a file. Blocks; call it from a thread.

    Attributes:
        lost_count: lines that could not be written.
        error: why not, "" = the last batch was written.
    """

    def __init__(self, path: Path, max_bytes: int, backups: int) -> None:
        self.path = path
        self.lost_count = 0
        self.error = ""
        self._max_bytes = max_bytes
        self._backups = backups

    def append(self, lines: Iterable[bytes]) -> None:
        """Write lines (each with its newline), rotating where the file is full."""
        listed = list(lines)
        try:
            while listed:
                listed = listed[self._fill(listed) :]
        except OSError as error:
            self.lost_count += len(listed)
            if not self.error:
                log.warning("flows not exported", extra=fields(path=self.path, error=error))
            self.error = str(error)
        else:
            self.error = ""

    def _fill(self, lines: list[bytes]) -> int:
        """Write lines until the file is full; return how many."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        with os.fdopen(descriptor, "ab") as file:
            room = self._max_bytes - os.fstat(file.fileno()).st_size
            if room <= 0:
                self._rotate()
                return 0
            count = 0
            while count < len(lines) and room > 0:
                room -= len(lines[count])
                count += 1
            file.write(b"".join(lines[:count]))
        return count

    def _rotate(self) -> None:
        """Move the file and its predecessors one place up."""
        if not self._backups:
            self.path.unlink()
            return
        for number in range(self._backups - 1, 0, -1):
            old = self._numbered(number)
            if old.exists():
                old.replace(self._numbered(number + 1))
        self.path.replace(self._numbered(1))

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")
