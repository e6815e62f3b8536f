"""What goes wrong in a worker and must not end it: counted, and logged without a flood."""

import logging
import time
from math import inf

PAUSE_S = 1.0
"""Between two log lines."""

log = logging.getLogger(__name__)


class Troubles:
    """Of one worker.

    Attributes:
        error_count: bugs that cost no packet.
    """

    def __init__(self) -> None:
        self.error_count = 0
        self._complained_at = -inf

    def failed(self, what: str, error: Exception) -> None:
        """Count and log a bug beside the packets."""
        self.error_count += 1
        self.complain(f"{what}: internal error ({self.error_count} in all)", error)

    def complain(self, what: str, error: Exception) -> None:
        """Log what went wrong, unless something did a moment ago."""
        now = time.monotonic()
        if now - self._complained_at >= PAUSE_S:
            self._complained_at = now
            log.error("%s", what, exc_info=error)
