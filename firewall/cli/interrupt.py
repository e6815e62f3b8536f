"""An end of a stream that the user asks for by ^C or SIGTERM.

Python runs a signal's handler between two instructions. One that comes right before a system call
waits for the call to return, which may be never; one that comes while a record is being written
cuts the record. So while an `Interrupt` is entered, the first signal only wakes the reader, which
waits for it and for its data alike; the next one does what it always does.
"""

import select
import signal
import socket
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Turns the first ^C or SIGTERM into the end of what is being read.

    Only the main thread can enter it (signal.signal).

    Attributes:
        came: whether `wait` has met it.
    """

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> Self:
        self._woken, self._waking = socket.socketpair()
        self._waking.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._waking.fileno(), warn_on_full_buffer=False)
        self._before: list[Any] = [signal.signal(number, self._first) for number in SIGNALS]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._woken.close()
        self._waking.close()

    def _first(self, _number: int, _frame: FrameType | None) -> None:
        """Let the next signal end the command at once: it may be stuck in writing."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def wait(self, stream: socket.socket) -> bool:
        """Wait until there is something to read; False = the user wants an end."""
        ready, _, _ = select.select([stream, self._woken], [], [])
        self.came = self._woken in ready
        return not self.came
