"""The reader's side of the snapshot file: a worker keeps what it has read and reads on from there.

Every `Announce` and every start of a worker ends here. What is in the file is never trusted to be
what it was: the header line at its start seals the record that this reader began with; another one
means another file, which is read whole, unless it says that it was folded from the very state that
is held.
"""

import os
from pathlib import Path

from firewall.policy.snapshot import Snapshot, SnapshotError
from firewall.policy.snapshot_file import HEADER_BYTES, Held, folded_from, read, read_on


class SnapshotReader:
    """What was last read, to go on from.

    Attributes:
        whole_count: files read from their start.
        step_count: times it was enough to read on.
    """

    def __init__(self) -> None:
        self._held: Held | None = None
        self.whole_count = 0
        self.step_count = 0

    def load(self, path: Path) -> Snapshot:
        """Return the snapshot in a file; the same object as before if it is the same revision.

        Raises:
            OSError: it cannot be read; FileNotFoundError if there is none.
            SnapshotError: it cannot be used. What was held before stays held.
        """
        with path.open("rb", buffering=0) as file:
            head = file.read(HEADER_BYTES).partition(b"\n")[0] + b"\n"
            held = _known(head, self._held)
            if held is not None and held.end <= os.fstat(file.fileno()).st_size:
                file.seek(held.end)
                try:
                    self._held = read_on(held, file.readall())
                except SnapshotError:
                    pass  # the start of the file is as it was, the rest is not: from the start
                else:
                    self.step_count += 1
                    return self._held.snapshot
            file.seek(0)
            self._held = read(file.readall())
            self.whole_count += 1
            return self._held.snapshot


def _known(head: bytes, held: Held | None) -> Held | None:
    """Return what is held of the file that begins with `head`, None = nothing."""
    if held is None:
        return None
    if head == held.head:
        return held
    try:
        return folded_from(head, held)
    except SnapshotError:
        return None
