"""A client connection whose bytes pass to its server and back: what tunnel and passage share."""

from abc import abstractmethod

from l7proxy.commands import PauseClient, ResumeClient
from l7proxy.core import Core, event
from l7proxy.judgement import Judge
from l7proxy.limits import Limits
from l7proxy.link import Link
from l7proxy.phase import CLOSED, Phase


class Pipe(Core):
    """Two sides, each paused while the other does not take what it sends."""

    __slots__ = ("_client_blocked", "_client_paused", "_judge", "_limits", "_link")

    def __init__(self, judge: Judge, limits: Limits, now: float) -> None:
        super().__init__(Phase.ANSWER, limits, now)
        self._judge = judge
        self._limits = limits
        self._link = Link()
        self._client_blocked = False
        self._client_paused = False

    @abstractmethod
    def _held_bytes(self) -> int:
        """Return how much of the client's waits here."""

    @event
    def client_blocked(self, blocked: bool, now: float) -> None:  # noqa: ARG002 - an event
        """Take that what was sent to the client piles up, or no longer does."""
        self._client_blocked = blocked

    @event
    def upstream_blocked(
        self,
        blocked: bool,
        now: float,  # noqa: ARG002 - an event
        _link: int = 0,
    ) -> None:
        """Take that what was sent to the server piles up, or no longer does."""
        self._link.blocked = blocked

    @event
    def drain(self, now: float) -> None:
        """Go on until it ends by itself; the worker's deadline ends it otherwise."""

    @event
    def finish(self, now: float) -> None:
        """As `drain`."""

    def _settle(self) -> None:
        """Pause whoever fills a buffer that the other side does not empty."""
        if self._phase is CLOSED:
            return
        pause = self._link.blocked or self._held_bytes() > self._limits.buffer_bytes
        if pause is not self._client_paused:
            self._client_paused = pause
            self._commands.append(PauseClient() if pause else ResumeClient())
        self._link.follow(self._commands, client_blocked=self._client_blocked)
