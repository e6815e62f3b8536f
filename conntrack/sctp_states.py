"""The states of a tracked SCTP association."""

from enum import IntEnum


class SctpState(IntEnum):
    """State of an association as a box between the two ends sees it (RFC 9260 section 4)."""

    NONE = 0
    CLOSED = 1
    COOKIE_WAIT = 2
    COOKIE_ECHOED = 3
    ESTABLISHED = 4
    SHUTDOWN_SENT = 5
    SHUTDOWN_RECEIVED = 6
    SHUTDOWN_ACK_SENT = 7
