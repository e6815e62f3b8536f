"""The states of a tracked TCP flow."""

from enum import IntEnum


class TcpState(IntEnum):
    """State of a TCP flow as a box between the two ends sees it; names as in RFC 9293 3.3.2."""

    NONE = 0
    SYN_SENT = 1
    SYN_RECV = 2
    ESTABLISHED = 3
    FIN_WAIT = 4
    CLOSE_WAIT = 5
    LAST_ACK = 6
    TIME_WAIT = 7
    CLOSE = 8
    SYN_SENT2 = 9
