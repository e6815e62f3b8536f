"""The one deadline of a client connection: what is waited for, and what if it does not come."""

from l7proxy import refusals
from l7proxy.limits import Limits
from l7proxy.refusals import Refusal

_FOREVER = float("inf")


class Timer:
    """A deadline in monotonic seconds; each method replaces the one before.

    Attributes:
        deadline: when to act, infinity if never.
        timeout: what to answer then; None: close without a word.
    """

    __slots__ = ("_limits", "deadline", "timeout")

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self.deadline = now + limits.first_byte_timeout_s
        self.timeout: Refusal | None = None

    def await_request(self, now: float) -> None:
        """Wait for the next request of a kept connection."""
        self.deadline = now + self._limits.idle_timeout_s
        self.timeout = None

    def await_head(self, now: float) -> None:
        """Wait for the rest of a head; not put off by bytes that drip."""
        self.deadline = now + self._limits.head_timeout_s
        self.timeout = refusals.HEAD_TIMEOUT

    def await_handshake(self, now: float) -> None:
        """Wait for the client to finish its TLS handshake."""
        self.deadline = now + self._limits.tls_handshake_timeout_s
        self.timeout = refusals.TLS_TIMEOUT

    def await_bytes(self, now: float) -> None:
        """Wait for any byte of a connection that passes unread."""
        self.deadline = now + self._limits.tunnel_idle_timeout_s
        self.timeout = refusals.STREAM_IDLE

    def await_body(self, now: float, head_at: float, size_bytes: int = 0) -> None:
        """Wait for more of a request body, of which so many bytes have just come.

        Each byte puts the end off by what `body_rate_bytes` allows for it, and all of them never
        further than `body_timeout_s`: one that drips does not come to the next.
        """
        limits = self._limits
        latest = now + limits.body_timeout_s
        if self.timeout is refusals.BODY_TIMEOUT:
            latest = min(latest, self.deadline + size_bytes / limits.body_rate_bytes)
        self.timeout = refusals.BODY_TIMEOUT
        self._until(latest, head_at)

    def await_message(self, now: float, head_at: float, *, begun: bool) -> None:
        """Wait for either side of a stream on which both may speak; `begun`: the server has."""
        self.timeout = refusals.STREAM_IDLE if begun else refusals.BODY_TIMEOUT
        self._until(now + self._limits.stream_idle_timeout_s, head_at)

    def _until(self, latest: float, head_at: float) -> None:
        """Wait until then, or the end of the time that a request with this head may take."""
        self.deadline = latest
        whole_s = self._limits.request_timeout_s
        if whole_s and head_at + whole_s < latest:
            self.deadline = head_at + whole_s
            self.timeout = refusals.REQUEST_TIMEOUT

    def await_connection(self, now: float) -> None:
        """Wait for the server to accept."""
        self.deadline = now + self._limits.connect_timeout_s
        self.timeout = refusals.CONNECT_TIMEOUT

    def await_answer(self, now: float, *, begun: bool, flush: bool = False) -> None:
        """Wait for an answer's head, for more of it, or (`flush`) for the client to read it."""
        if not begun:
            self.deadline = now + self._limits.response_timeout_s
            self.timeout = refusals.RESPONSE_TIMEOUT
            return
        self.deadline = now + self._limits.stream_idle_timeout_s
        self.timeout = refusals.FLUSH_TIMEOUT if flush else refusals.STREAM_IDLE

    def linger(self, now: float) -> None:
        """Wait for the client to close after us."""
        self.deadline = now + self._limits.linger_s
        self.timeout = None

    def stop(self) -> None:
        """Wait for nothing more."""
        self.deadline = _FOREVER
