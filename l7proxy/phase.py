"""What the client's side of an exchange continues with (drawn in `l7proxy.exchange`)."""

from enum import IntEnum


class Phase(IntEnum):
    """What the client's side continues with."""

    IDLE = 0
    HEAD = 1
    BODY = 2
    ANSWER = 3
    DISCARD = 4
    LINGER = 5
    CLOSED = 6

    @property
    def reads_requests(self) -> bool:
        """Whether another request may still be taken from this client."""
        return self < Phase.LINGER
