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


IDLE, HEAD, BODY, ANSWER, DISCARD, LINGER, CLOSED = Phase
"""The members under plain names: on CPython 3.11 `Phase.IDLE` runs a descriptor written in Python,
ten times as long as a global, and the exchange asks for several with each event. From LINGER on no
further request is taken from the client."""
