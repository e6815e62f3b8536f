"""The connection to the server as an exchange knows it: its state and what waits for it."""

from enum import IntEnum

from l7proxy import refusals
from l7proxy.commands import (
    CloseUpstream,
    Command,
    ConnectFailure,
    OpenUpstream,
    PauseUpstream,
    ResumeUpstream,
    SendUpstream,
)
from l7proxy.refusals import Refusal

_REFUSALS = {
    ConnectFailure.REFUSED: refusals.CONNECT_FAILED,
    ConnectFailure.TIMEOUT: refusals.CONNECT_TIMEOUT,
    ConnectFailure.TLS: refusals.UPSTREAM_TLS,
    ConnectFailure.NO_HTTP2: refusals.UPSTREAM_NO_HTTP2,
    ConnectFailure.OVERFLOW: refusals.UPSTREAM_OVERFLOW,
}


def connect_refusal(failure: ConnectFailure) -> Refusal:
    """Return what a client gets whose server could not be reached."""
    return _REFUSALS[failure]


class LinkState(IntEnum):
    """Whether there is a connection to the server."""

    NONE = 0
    OPENING = 1
    OPEN = 2


NONE, OPENING, OPEN = LinkState
"""Under plain names for the reason that `l7proxy.phase` gives."""


class Link:
    """One client connection's way to its server; gone and made again as the server closes it.

    Attributes:
        number: names it among the links of a client connection.
        state: whether it exists.
        used: it has carried a complete exchange, so the server may close it at any moment.
        blocked: what was sent piles up.
        paused: the server is not read from.
        held_bytes: what waits until it is open.
    """

    __slots__ = ("_held", "blocked", "held_bytes", "number", "paused", "state", "used")

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.state = NONE
        self.used = False
        self.blocked = False
        self.paused = False
        self.held_bytes = 0
        self._held: list[bytes] = []

    def open(self, *, http2: bool = False) -> Command:
        """Begin to connect."""
        self.state = OPENING
        self.used = False
        return OpenUpstream(self.number, http2)

    def opened(self) -> Command:
        """Send what has waited."""
        self.state = OPEN
        held = b"".join(self._held)
        self._forget()
        return SendUpstream(held, self.number)

    def failed(self) -> None:
        """Take that there is no connection."""
        self.state = NONE
        self._forget()

    def send(self, data: bytes, commands: list[Command]) -> None:
        """Send now, or hold until it is open."""
        if self.state is OPEN:
            commands.append(SendUpstream(data, self.number))
        else:
            self._held.append(data)
            self.held_bytes += len(data)

    def drop(self, commands: list[Command], *, reset: bool) -> None:
        """Close it, if it exists; `reset`: what was sent may not look complete."""
        if self.state is not NONE:
            commands.append(CloseUpstream(reset, self.number))
            self.state = NONE
        self.blocked = False
        self.paused = False
        self._forget()

    def follow(self, commands: list[Command], *, client_blocked: bool) -> None:
        """Read from the server while the client takes what it sends, and only then."""
        if self.paused is not client_blocked and self.state is OPEN:
            self.paused = client_blocked
            pause = PauseUpstream if client_blocked else ResumeUpstream
            commands.append(pause(self.number))

    def _forget(self) -> None:
        self._held.clear()
        self.held_bytes = 0
