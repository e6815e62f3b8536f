"""The state machine of an SCTP association, as a table with a reason for every cell.

States are those of RFC 9260 section 4, as a box between the ends sees them: the client is ORIGINAL.
Chunks that do not move an association (DATA, SACK, ERROR, ...) are OTHER.

Cells: the next state, or IV = the packet is INVALID. Observed on Linux 6.18.44 along the ordinary
life of an association; the remaining cells are derived from RFC 9260 sections 5.2, 8.4 and 9.
"""

from enum import IntEnum
from typing import Final


class SctpState(IntEnum):
    """State of an association; see the module header.

    Operations: `conntrack.sctp` moves an association along the table.
    Caveats: NONE exists only before the first packet is confirmed.
    """

    NONE = 0
    CLOSED = 1  # INIT was seen, or the association has ended
    COOKIE_WAIT = 2  # INIT ACK was seen
    COOKIE_ECHOED = 3
    ESTABLISHED = 4
    SHUTDOWN_SENT = 5  # by the client
    SHUTDOWN_RECEIVED = 6  # by the client, from the server
    SHUTDOWN_ACK_SENT = 7
    HEARTBEAT_SENT = 8  # a further path of an association that was set up elsewhere


class SctpChunk(IntEnum):
    """What a chunk means for the state; the values are places in the table, not chunk types."""

    INIT = 0
    INIT_ACK = 1
    COOKIE_ECHO = 2
    COOKIE_ACK = 3
    SHUTDOWN = 4
    SHUTDOWN_ACK = 5
    SHUTDOWN_COMPLETE = 6
    ABORT = 7
    HEARTBEAT = 8
    HEARTBEAT_ACK = 9
    OTHER = 10


CHUNK_OF_TYPE: Final = {  # RFC 9260 section 3.2, chunk type numbers
    1: SctpChunk.INIT,
    2: SctpChunk.INIT_ACK,
    4: SctpChunk.HEARTBEAT,
    5: SctpChunk.HEARTBEAT_ACK,
    6: SctpChunk.ABORT,
    7: SctpChunk.SHUTDOWN,
    8: SctpChunk.SHUTDOWN_ACK,
    10: SctpChunk.COOKIE_ECHO,
    11: SctpChunk.COOKIE_ACK,
    14: SctpChunk.SHUTDOWN_COMPLETE,
}

IV: Final = -1
CL: Final = int(SctpState.CLOSED)
CW: Final = int(SctpState.COOKIE_WAIT)
CE: Final = int(SctpState.COOKIE_ECHOED)
ES: Final = int(SctpState.ESTABLISHED)
SS: Final = int(SctpState.SHUTDOWN_SENT)
SR: Final = int(SctpState.SHUTDOWN_RECEIVED)
SA: Final = int(SctpState.SHUTDOWN_ACK_SENT)
HS: Final = int(SctpState.HEARTBEAT_SENT)

Row = tuple[int, int, int, int, int, int, int, int, int]

# fmt: off
SCTP_TABLE: Final[tuple[tuple[Row, ...], tuple[Row, ...]]] = (
    (  # ORIGINAL
        #NO  CL  CW  CE  ES  SS  SR  SA  HS
        (CL, CL, CW, CE, ES, CL, CL, SA, CL),  # INIT
        # NO→CL, CL→CL  opens, or opens again       CW..ES stay  5.2.2: answered, not obeyed
        # SS→CL, SR→CL  begins anew   SA→SA  9.2: answered by SHUTDOWN ACK   HS→CL  opens
        (IV, CL, CW, CE, ES, SS, SR, SA, HS),  # INIT_ACK
        # NO→IV  answers nothing                    rest stay  5.2.1: both sides opened at once
        (IV, CL, CE, CE, ES, SS, SR, SA, HS),  # COOKIE_ECHO
        # NO→IV  tags unknown   CW→CE  client continues   rest stay  repeated (5.2.4)
        (IV, CL, CW, CE, ES, SS, SR, SA, HS),  # COOKIE_ACK
        # NO→IV   rest stay  answers a server's COOKIE ECHO (5.2.1)
        (IV, CL, CW, CE, SS, SS, SR, SA, SS),  # SHUTDOWN
        # NO→IV   CL, CW, CE stay  not open yet   ES→SS, HS→SS  9.2: client ends   SS, SR, SA stay
        (IV, CL, CW, CE, ES, SA, SA, SA, SA),  # SHUTDOWN_ACK
        # NO→IV   CL..ES stay  out of place (8.5.1)   SS→SA, SR→SA, SA→SA, HS→SA  9.2: client agrees
        (IV, CL, CW, CE, ES, SS, SR, CL, HS),  # SHUTDOWN_COMPLETE
        # NO→IV    SA→CL  9.2: over                 rest stay  out of place
        (IV, CL, CL, CL, CL, CL, CL, CL, CL),  # ABORT
        # NO→IV    rest→CL  9.1: over at once
        (HS, CL, CW, CE, ES, SS, SR, SA, HS),  # HEARTBEAT
        # NO→HS  8.3: a path of a multi-homed association    rest stay
        (IV, CL, CW, CE, ES, SS, SR, SA, HS),  # HEARTBEAT_ACK
        # NO→IV  answers nothing                    rest stay
        (IV, CL, CW, CE, ES, SS, SR, SA, HS),  # OTHER
        # NO→IV  8.4: out of the blue               rest stay
    ),
    (  # REPLY
        #NO  CL  CW  CE  ES  SS  SR  SA  HS
        (IV, CL, CW, CE, ES, SS, SR, SA, HS),  # INIT
        # NO→IV  a reply has an entry               rest stay  5.2.1, 5.2.2: answered, not obeyed
        (IV, CW, CW, CE, ES, SS, SR, SA, HS),  # INIT_ACK
        # CL→CW  server answers                     rest stay  repeated
        (IV, CL, CW, CE, ES, SS, SR, SA, HS),  # COOKIE_ECHO
        # rest stay  5.2.1: both sides opened at once
        (IV, CL, CW, ES, ES, SS, SR, SA, HS),  # COOKIE_ACK
        # CE→ES  open                               rest stay  repeated
        (IV, CL, CW, CE, SR, SS, SR, SA, SR),  # SHUTDOWN
        # ES→SR, HS→SR  9.2: server ends            rest stay
        (IV, CL, CW, CE, ES, SA, SA, SA, SA),  # SHUTDOWN_ACK
        # SS→SA, SR→SA, SA→SA, HS→SA  9.2: server agrees    rest stay
        (IV, CL, CW, CE, ES, SS, SR, CL, HS),  # SHUTDOWN_COMPLETE
        # SA→CL  over                               rest stay
        (IV, CL, CL, CL, CL, CL, CL, CL, CL),  # ABORT
        # rest→CL  9.1: over at once
        (IV, CL, CW, CE, ES, SS, SR, SA, HS),  # HEARTBEAT
        # rest stay
        (IV, CL, CW, CE, ES, SS, SR, SA, ES),  # HEARTBEAT_ACK
        # HS→ES  8.3: the path works                rest stay
        (IV, CL, CW, CE, ES, SS, SR, SA, HS),  # OTHER
        # rest stay
    ),
)
# fmt: on
