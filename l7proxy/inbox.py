"""The client's bytes that were not looked at yet, and the heads that are found in them."""

from l7proxy.head import Progress, walk_lines
from l7proxy.limits import Limits

_HEAD_END = b"\r\n\r\n"
_START = Progress()


class Inbox:
    """Bytes of one client in the order received.

    Attributes:
        data: what was not consumed yet.
        begun: some byte of the next head (or the empty line before it) has come.
    """

    __slots__ = ("_limits", "_progress", "_skipped_line", "data")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._progress = _START
        self._skipped_line = False
        self.data = b""

    @property
    def begun(self) -> bool:
        """Whether a request has begun, so that its sender can be expected to finish it."""
        return bool(self.data) or self._skipped_line

    def clear(self) -> None:
        """Forget everything; nothing of it will be looked at."""
        self.data = b""

    def head(self) -> bytes | None:
        """Take the bytes of one head out, its empty line included; None if it is not complete.

        Raises:
            RequestRefused: the lines that are there already break a rule.
        """
        data = self.data
        if data[:1] == b"\r" or not data:
            if not self._skip_empty_line():
                return None
            data = self.data
        offset = self._progress.offset
        end = data.find(_HEAD_END, offset - 2 if offset > 2 else 0) + 4
        if end < 4:
            self._progress = walk_lines(data, self._progress, self._limits)
            return None
        self._progress = _START
        self._skipped_line = False
        if end == len(data):
            self.data = b""
            return data
        self.data = data[end:]
        return data[:end]

    def _skip_empty_line(self) -> bool:
        """Drop one CRLF before a request line (RFC 9112 2.2); False: nothing else is there."""
        data = self.data
        if data[:1] == b"\r" and not self._skipped_line:
            if len(data) == 1:
                return False
            if data[1:2] == b"\n":
                self.data = data = data[2:]
                self._skipped_line = True
        return bool(data)
