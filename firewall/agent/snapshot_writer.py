"""The writer's side of the snapshot file: append what changed, now and then fold.

Theory of operation. The first snapshot of a life replaces the file; each later one is appended as a
difference, durably, which costs what changed and not what exists. A file that was replaced costs a
worker nothing if it held the state already, so folding may happen at any time between two
snapshots; it happens when the differences are many or large, since a worker that starts applies
them one by one, and every one of its milliseconds is a dropped packet.

An append that fails leaves at most a record cut short, which no reader counts, and the file is
replaced at once. Methods block; only one may run at a time.
"""

import os
from pathlib import Path

from firewall.agent import statefile
from firewall.policy.difference import difference
from firewall.policy.snapshot import Snapshot
from firewall.policy.snapshot_file import Record, step, whole

FOLD_COUNT = 32
"""Differences after which the file is folded: 1-2 ms each to apply with 5,000 identities."""

FOLD_SHARE = 0.5
"""Bytes of differences, of those of the whole snapshot, after which the file is folded."""

FOLD_FLOOR_BYTES = 64 * 1024
"""Fewer bytes of differences are not worth folding."""


class SnapshotWriter:
    """Writes one file. `snapshot` is what the file holds, None = not by this writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.snapshot: Snapshot | None = None
        self._seal = b""
        self._whole_bytes = 0
        self._end = 0
        self._count = 0

    @property
    def wants_folding(self) -> bool:
        """Whether `fold` should be called before long."""
        appended = self._end - self._whole_bytes
        many = max(FOLD_FLOOR_BYTES, FOLD_SHARE * self._whole_bytes)
        return self.snapshot is not None and (self._count >= FOLD_COUNT or appended > many)

    def write(self, snapshot: Snapshot) -> None:
        """Put a snapshot into the file, durably.

        Raises:
            OSError: the disk refuses; the file holds what it held.
        """
        change = None if self.snapshot is None else difference(self.snapshot, snapshot)
        record = None if change is None else step(self._seal, change)
        if record is None or len(record.data) >= self._whole_bytes or not self._append(record):
            self._replace(snapshot, whole(snapshot))
            return
        self.snapshot = snapshot
        self._seal = record.seal
        self._end += len(record.data)
        self._count += 1

    def fold(self) -> None:
        """Write the file anew, with the same state in one record.

        Raises:
            OSError: the disk refuses; the file holds what it held.
        """
        if self.snapshot is not None:
            self._replace(self.snapshot, whole(self.snapshot, self._seal))

    def _replace(self, snapshot: Snapshot, record: Record) -> None:
        statefile.replace(self.path, record.data)
        self.snapshot = snapshot
        self._seal = record.seal
        self._whole_bytes = self._end = len(record.data)
        self._count = 0

    def _append(self, record: Record) -> bool:
        """Say whether a record was appended; if not, the file must be replaced."""
        held, self.snapshot = self.snapshot, None
        try:
            with self.path.open("r+b", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != self._end:
                    return False  # somebody else's doing
                file.seek(self._end)
                if file.write(record.data) != len(record.data):
                    return False  # the disk is full; what was written is no record
                os.fdatasync(file.fileno())
        except OSError:
            return False
        self.snapshot = held
        return True
