"""The state machine of an SCTP association, as tables with a reason for every cell.

States are those of RFC 9260 section 4, as a box between the ends sees them: the client is ORIGINAL;
their names are those of conntrack(8). Chunks that do not move an association (DATA, SACK, ...) are
OTHER.

Cells: the next state, or IV = the packet is INVALID. STRICT is derived from RFC 9260 sections 5.2,
8.4 and 9. LINUX states what Linux 6.18.44 was observed to do, cell by cell.
"""

from enum import IntEnum
from typing import Final


class SctpState(IntEnum):
    """State of an association; see the module header.

    Operations: `conntrack.sctp_strict` and `conntrack.sctp_linux` move it along their table.
    Caveats: NONE exists only before the first packet is confirmed.
    """

    NONE = 0
    CLOSED = 1  # INIT was seen, or the association has ended
    COOKIE_WAIT = 2  # INIT ACK was seen
    COOKIE_ECHOED = 3
    ESTABLISHED = 4
    SHUTDOWN_SENT = 5  # by the client
    SHUTDOWN_RECD = 6  # SHUTDOWN-RECEIVED: by the client, from the server
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
    ERROR = 10
    OTHER = 11


CHUNK_OF_TYPE: Final = {  # RFC 9260 section 3.2, chunk type numbers
    1: SctpChunk.INIT,
    2: SctpChunk.INIT_ACK,
    4: SctpChunk.HEARTBEAT,
    5: SctpChunk.HEARTBEAT_ACK,
    6: SctpChunk.ABORT,
    7: SctpChunk.SHUTDOWN,
    8: SctpChunk.SHUTDOWN_ACK,
    9: SctpChunk.ERROR,
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
SR: Final = int(SctpState.SHUTDOWN_RECD)
SA: Final = int(SctpState.SHUTDOWN_ACK_SENT)
HS: Final = int(SctpState.HEARTBEAT_SENT)

Row = tuple[int, int, int, int, int, int, int, int, int]

# fmt: off
STRICT_SCTP_TABLE: Final[tuple[tuple[Row, ...], tuple[Row, ...]]] = (
    (  # ORIGINAL
        #NO  CL  CW  CE  ES  SS  SR  SA  HS
        (CL, CL, CW, CE, ES, SS, SR, SA, CL),  # INIT
        # NO→CL, CL→CL  opens, or opens again       CW..SR stay  5.2.2: a candidate, if its end has
        #   restarted     SA→SA  9.2: answered by SHUTDOWN ACK       HS→CL  opens
        (IV, CL, CW, CE, ES, SS, SR, SA, HS),  # INIT_ACK
        # NO→IV  answers nothing                    rest stay  5.2.1: both sides opened at once
        (IV, CL, CE, CE, ES, SS, SR, SA, HS),  # COOKIE_ECHO
        # NO→IV  tags unknown   CW→CE  client continues   rest stay  repeated (5.2.4)
        (IV, CL, ES, ES, ES, SS, SR, SA, HS),  # COOKIE_ACK
        # NO→IV   CW→ES, CE→ES  5.2.4 B: both sides opened at once    rest stay  repeated
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
        (IV, CL, CW, CE, ES, SS, SR, SA, HS),  # ERROR
        # NO→IV  8.4: out of the blue               rest stay  an ABORT follows if it is fatal
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
        # CW→CW  5.2.1: both sides opened at once; nothing is open before the client says so
        # rest stay  repeated
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
        (IV, CL, CW, CE, ES, SS, SR, SA, HS),  # ERROR
        # rest stay
        (IV, CL, CW, CE, ES, SS, SR, SA, HS),  # OTHER
        # rest stay
    ),
)

# Observed on Linux 6.18.44, all cells, tags given as each cell needs them.
LINUX_SCTP_TABLE: Final[tuple[tuple[Row, ...], tuple[Row, ...]]] = (
    (  # ORIGINAL
        #NO  CL  CW  CE  ES  SS  SR  SA  HS
        (CL, CL, CW, CE, ES, CL, CL, SA, CW),  # INIT
        # NO→CL  opens    SS→CL, SR→CL  taken for a new beginning    HS→CW  taken for known
        (CL, CL, CW, CE, ES, SS, SR, SA, CL),  # INIT_ACK
        # NO→CL  only with tag 0 (so for every row below)       HS→CL  unexpected on such a path
        (CL, CL, CE, CE, ES, SS, SR, SA, CL),  # COOKIE_ECHO
        # CW→CE  client continues           HS→CL  unexpected
        (CL, CL, CW, ES, ES, SS, SR, SA, CL),  # COOKIE_ACK
        # CE→ES  both sides opened at once  HS→CL  unexpected
        (CL, CL, CW, CE, SS, SS, SR, SA, CL),  # SHUTDOWN
        # ES→SS  client ends                HS→CL  unexpected
        (SA, CL, CW, CE, ES, SA, SA, SA, SA),  # SHUTDOWN_ACK
        # NO→SA  8.4: waits for SHUTDOWN COMPLETE    SS→SA, SR→SA, HS→SA  client agrees
        (CL, CL, CW, CE, ES, SS, SR, CL, CL),  # SHUTDOWN_COMPLETE
        # SA→CL  over                       HS→CL  unexpected
        (CL, CL, CL, CL, CL, CL, CL, CL, CL),  # ABORT
        # all→CL  over at once
        (HS, CL, CW, CE, ES, SS, SR, SA, HS),  # HEARTBEAT
        # NO→HS  a path of a multi-homed association
        (CL, CL, CW, CE, ES, SS, SR, SA, HS),  # HEARTBEAT_ACK
        # NO→CL  the answer of another path
        (CL, CL, CW, CE, ES, SS, SR, SA, CL),  # ERROR
        # HS→CL  unexpected
        (IV, CL, CW, CE, ES, SS, SR, SA, HS),  # OTHER
        # NO→IV  out of the blue            rest stay
    ),
    (  # REPLY
        #NO  CL  CW  CE  ES  SS  SR  SA  HS
        (IV, CL, CW, CE, ES, SS, SR, SA, IV),  # INIT
        # HS→IV  no answer to a heartbeat (so for every row below)    rest stay
        (IV, CW, CW, CE, ES, SS, SR, SA, IV),  # INIT_ACK
        # CL→CW  server answers             rest stay
        (IV, CL, CE, CE, ES, SS, SR, SA, IV),  # COOKIE_ECHO
        # CW→CE  both sides opened at once  rest stay
        (IV, CL, CW, ES, ES, SS, SR, SA, IV),  # COOKIE_ACK
        # CE→ES  open                       rest stay
        (IV, CL, CW, CE, SR, SS, SR, SA, IV),  # SHUTDOWN
        # ES→SR  server ends                rest stay
        (IV, CL, CW, CE, ES, SA, SA, SA, IV),  # SHUTDOWN_ACK
        # SS→SA, SR→SA  server agrees       rest stay
        (IV, CL, CW, CE, ES, SS, SR, CL, IV),  # SHUTDOWN_COMPLETE
        # SA→CL  over                       rest stay
        (IV, CL, CL, CL, CL, CL, CL, CL, IV),  # ABORT
        # rest→CL  over at once
        (IV, CL, CW, CE, ES, SS, SR, SA, HS),  # HEARTBEAT
        # rest stay
        (IV, CL, CW, CE, ES, SS, SR, SA, ES),  # HEARTBEAT_ACK
        # HS→ES  the path works             rest stay
        (IV, CL, CW, CL, ES, SS, SR, SA, IV),  # ERROR
        # CE→CL  the cookie was stale       rest stay
        (IV, CL, CW, CE, ES, SS, SR, SA, HS),  # OTHER
        # rest stay
    ),
)
# fmt: on
