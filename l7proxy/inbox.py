"""The client's bytes that were not looked at yet, and the heads that are found in them."""

from l7proxy.head import Progress, RequestHead, parse_request, walk_lines
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

    def add(self, data: bytes) -> None:
        """Append what came."""
        self.data = self.data + data if self.data else data

    def clear(self) -> None:
        """Forget everything; nothing of it will be looked at."""
        self.data = b""

    def head(self) -> RequestHead | None:
        """Take one head out; None if it is not complete.

        Raises:
            RequestRefused: the lines that are there already break a rule.
        """
        if not self._skip_empty_line():
            return None
        data = self.data
        end = data.find(_HEAD_END, max(0, self._progress.offset - 2)) + len(_HEAD_END)
        if end < len(_HEAD_END):
            self._progress = walk_lines(data, self._progress, self._limits)
            return None
        head = parse_request(data[:end], self._limits)
        self.data = data[end:]
        self._progress = _START
        self._skipped_line = False
        return head

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
