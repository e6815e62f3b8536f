"""The state machine of a TCP flow, as tables with a reason for every cell.

A box between two ends sees segments, not the ends' own states, so there is one state per flow. The
states have the names of RFC 9293 section 3.3.2 and mean what the box can prove:

    SYN_SENT     the original side asked; nobody answered
    SYN_RECV     the other side answered with SYN/ACK
    ESTABLISHED  the answer was acknowledged
    FIN_WAIT     one side has sent its FIN
    CLOSE_WAIT   that FIN is acknowledged; the flow is half closed
    LAST_ACK     both sides have sent their FIN
    TIME_WAIT    both FINs are acknowledged
    CLOSE        a valid reset was seen
    SYN_SENT2    both sides sent SYN (simultaneous open); LINUX profile only

A table is `[direction][event][state] -> cell`. A cell is the next state or one of three marks:

    IV  the segment is INVALID
    IG  the segment passes and the state stays: one of the ends knows better than we what it means
    NW  the segment opens a new flow in place of this one; policy is asked again

STRICT is derived from RFC 9293 section 3.10 and RFC 5961. It knows one event more than the flags
show: DONE is an ACK after which every FIN that was sent is acknowledged; and a retransmitted FIN
is an ACK, because it says nothing new. LINUX states what Linux 6.18.44 was observed to do, cell by
cell; where STRICT differs, the reason names the rule that Linux does not apply.
"""

from enum import IntEnum
from typing import Final


class TcpState(IntEnum):
    """State of a TCP flow; see the module header.

    Operations: `conntrack.tcp_strict` and `conntrack.tcp_linux` move a flow along their table.
    Caveats: NONE exists only before the first segment is confirmed.
    """

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


class TcpEvent(IntEnum):
    """What a segment's flags say (RFC 9293 section 3.10.7); PSH, URG, ECE and CWR say nothing."""

    SYN = 0
    SYN_ACK = 1
    FIN = 2
    ACK = 3
    RST = 4
    DONE = 5  # ACK after which every FIN sent is acknowledged; STRICT only


MALFORMED: Final = -1
"""Not an event: a set of flags that no host sends."""

IV: Final = -1
IG: Final = -2
NW: Final = -3

SS: Final = int(TcpState.SYN_SENT)
SR: Final = int(TcpState.SYN_RECV)
ES: Final = int(TcpState.ESTABLISHED)
FW: Final = int(TcpState.FIN_WAIT)
CW: Final = int(TcpState.CLOSE_WAIT)
LA: Final = int(TcpState.LAST_ACK)
TW: Final = int(TcpState.TIME_WAIT)
CL: Final = int(TcpState.CLOSE)
S2: Final = int(TcpState.SYN_SENT2)

Row = tuple[int, int, int, int, int, int, int, int, int, int]

# fmt: off
STRICT_TABLE: Final[tuple[tuple[Row, ...], tuple[Row, ...]]] = (
    (  # ORIGINAL
        #NO  SS  SR  ES  FW  CW  LA  TW  CL  S2
        (SS, SS, IG, IG, IG, IG, IG, NW, NW, IV),  # SYN
        # NO→SS  opens the flow   SS→SS  retransmitted, or begun anew with another ISN
        # SR→IG  retransmitted, SYN/ACK still on its way
        # ES→IG, FW→IG, CW→IG, LA→IG  RFC 5961 4.2: the receiver answers with a challenge ACK
        # TW→NW  RFC 9293 3.6.1: the port is used again    CL→NW  the flow is over
        # S2→IV  never reached: a SYN from the other side is NW
        (IV, SR, ES, IV, IV, IV, IV, IV, IV, IV),  # SYN_ACK
        # NO→IV  answers nothing                    SS→SR  RFC 9293 figure 8, if the other SYN was
        #   seen; else INVALID: the client does not answer its own
        # SR→ES  RFC 9293 figure 8: both sides opened; this acknowledges the other SYN
        # ES..CL→IV  the client sent its SYN long ago      S2→IV  never reached
        (IV, IV, FW, FW, LA, LA, IG, IG, IG, IV),  # FIN
        # NO→IV  middle of an unknown flow          SS→IV  RFC 9293 3.10.7.3: nothing to finish yet
        # SR→FW  acknowledges the SYN/ACK and ends  ES→FW  first FIN
        # FW→LA, CW→LA  the second side's FIN   LA→IG, TW→IG, CL→IG  both FINs or a reset were seen
        # S2→IV  never reached
        (IV, IV, ES, ES, FW, CW, LA, TW, IG, IV),  # ACK
        # NO→IV  middle of an unknown flow (unless picked up)    SS→IV  nothing to acknowledge
        # SR→ES  handshake complete                 ES→ES  data
        # FW→FW, LA→LA  a FIN is still unacknowledged      CW→CW  half closed: data flows on
        # TW→TW  last ACK repeated                  CL→IG  crossed the reset    S2→IV  never reached
        (IV, CL, CL, CL, CL, CL, CL, IG, IG, IV),  # RST
        # NO→IV  nothing to reset                   SS→CL  the client gives up
        # SR→CL, ES→CL, FW→CL, CW→CL, LA→CL  RFC 5961 3.2: exact sequence number only
        # TW→IG  RFC 1337: a reset does not end TIME-WAIT    CL→IG  repeated    S2→IV  never reached
        (IV, IV, ES, ES, CW, CW, TW, TW, IG, IV),  # DONE
        # NO→IV, SS→IV  as ACK                      SR→ES, ES→ES  no FIN was sent yet: as ACK
        # FW→CW  the FIN is acknowledged            CW→CW  still half closed
        # LA→TW  both FINs are acknowledged         TW→TW  last ACK repeated
        # CL→IG  crossed the reset                  S2→IV  never reached
    ),
    (  # REPLY
        #NO  SS  SR  ES  FW  CW  LA  TW  CL  S2
        (IV, NW, IV, IV, IV, IV, IV, NW, NW, IV),  # SYN
        # NO→IV  a reply has an entry               SS→NW  split handshake or simultaneous open: the
        #   server opens a flow of its own, and policy must say whether it may
        # SR→IV, ES→IV, FW→IV, CW→IV, LA→IV  a server does not open a flow that it has answered
        # TW→NW, CL→NW  the flow is over, roles may change       S2→IV  never reached
        (IV, SR, IG, IG, IG, IG, IG, IG, IG, IV),  # SYN_ACK
        # NO→IV  a reply has an entry   SS→SR  RFC 9293 3.10.7.3: acknowledges exactly our SYN
        # SR→IG..CL→IG  retransmitted; or answers a SYN that we let pass (see resynchronisation)
        # S2→IV  never reached
        (IV, IV, FW, FW, LA, LA, IG, IG, IG, IV),  # FIN
        # NO→IV  a reply has an entry               SS→IV  the flow is not open
        # SR→FW, ES→FW  first FIN                   FW→LA, CW→LA  the second side's FIN
        # LA→IG, TW→IG, CL→IG  both FINs or a reset were seen    S2→IV  never reached
        (IV, IG, SR, ES, FW, CW, LA, TW, IG, IV),  # ACK
        # NO→IV  a reply has an entry   SS→IG  RFC 5961: challenge ACK of an old incarnation
        # SR→SR  the client has not answered yet; after Fast Open the server may already send (RFC
        #   7413)
        # ES→ES  data                               FW→FW, LA→LA  a FIN is still unacknowledged
        # CW→CW  half closed   TW→TW  last ACK repeated   CL→IG  crossed the reset
        # S2→IV  never reached
        (IV, CL, CL, CL, CL, CL, CL, IG, IG, IV),  # RST
        # NO→IV  a reply has an entry
        # SS→CL  RFC 9293 3.10.7.3: refused, if it acknowledges our SYN
        # SR→CL, ES→CL, FW→CL, CW→CL, LA→CL  RFC 5961 3.2: exact sequence number only
        # TW→IG  RFC 1337                           CL→IG  repeated             S2→IV  never reached
        (IV, IG, SR, ES, CW, CW, TW, TW, IG, IV),  # DONE
        # NO→IV, SS→IG, SR→SR, ES→ES  no FIN was sent yet: as ACK
        # FW→CW  the FIN is acknowledged            CW→CW  still half closed
        # LA→TW  both FINs are acknowledged         TW→TW  last ACK repeated
        # CL→IG  crossed the reset                  S2→IV  never reached
    ),
)

# Observed on Linux 6.18.44 (all cells). DONE repeats ACK, because this machine does not know it.
LINUX_TABLE: Final[tuple[tuple[Row, ...], tuple[Row, ...]]] = (
    (  # ORIGINAL
        #NO  SS  SR  ES  FW  CW  LA  TW  CL  S2
        (SS, SS, IG, IG, IG, IG, IG, NW, NW, S2),  # SYN
        # NO→SS  opens                 SS→SS  retransmitted       SR→IG..LA→IG  remembered, passes
        # TW→NW, CL→NW  port reuse, if a FIN was seen or the same side sent the reset; else IG
        # S2→S2  retransmitted in a simultaneous open
        (IV, IV, SR, IV, IV, IV, IV, IV, IV, SR),  # SYN_ACK
        # SR→SR  repeated              S2→SR  simultaneous open    rest→IV  clients do not answer
        (IV, IV, FW, FW, LA, LA, LA, TW, CL, IV),  # FIN
        # NO→IV  unknown flow          SS→IV  not open             SR→FW, ES→FW  first FIN
        # FW→LA  taken for the peer's FIN even if repeated         CW→LA, LA→LA  second FIN
        # TW→TW, CL→CL  over           S2→IV  not open
        (ES, IV, ES, ES, CW, CW, TW, TW, CL, IV),  # ACK
        # NO→ES  picked up (loose)     SS→IV  nothing answered     SR→ES  handshake complete
        # ES→ES  data                  FW→CW  any ACK is taken for the FIN's    CW→CW  half closed
        # LA→TW  any ACK is taken for the last one    TW→TW, CL→CL  over        S2→IV  not open
        (IV, CL, CL, CL, CL, CL, CL, CL, CL, CL),  # RST
        # NO→IV  nothing to reset      rest→CL  ES: exact sequence only; FW..CL: any sequence
        (ES, IV, ES, ES, CW, CW, TW, TW, CL, IV),  # DONE
        # as ACK
    ),
    (  # REPLY
        #NO  SS  SR  ES  FW  CW  LA  TW  CL  S2
        (IV, S2, IV, IV, IV, IV, IV, NW, IV, S2),  # SYN
        # SS→S2  simultaneous open     TW→NW  roles change         S2→S2  repeated    rest→IV
        (IV, SR, IG, IG, IG, IG, IG, IG, IG, SR),  # SYN_ACK
        # SS→SR  answered              S2→SR  simultaneous open
        # SR→IG..CL→IG  repeated, or answers a SYN that was let pass
        (IV, IV, FW, FW, LA, LA, LA, TW, CL, IV),  # FIN
        # SS→IV, S2→IV  not open       SR→FW, ES→FW  first FIN     FW→LA, CW→LA, LA→LA  second FIN
        # TW→TW, CL→CL  over
        (IV, IG, SR, ES, CW, CW, TW, TW, CL, IG),  # ACK
        # SS→IG, S2→IG  may be a challenge ACK       SR→SR  waits for the client's ACK
        # ES→ES  data                  FW→CW, CW→CW, LA→TW, TW→TW, CL→CL  as in ORIGINAL
        (IV, CL, CL, CL, CL, CL, CL, CL, CL, CL),  # RST
        # as in ORIGINAL
        (IV, IG, SR, ES, CW, CW, TW, TW, CL, IG),  # DONE
        # as ACK
    ),
)
# fmt: on

# The flag sets that hosts send, PSH, ECE and CWR set aside (observed: all 64 sets on Linux 6.18.44;
# RFC 9293 section 3.10.7 requires ACK on everything but SYN and RST).
_FLAG_SETS: Final = {
    0x02: TcpEvent.SYN,
    0x22: TcpEvent.SYN,  # SYN URG
    0x12: TcpEvent.SYN_ACK,
    0x04: TcpEvent.RST,
    0x14: TcpEvent.RST,  # RST ACK
    0x11: TcpEvent.FIN,  # FIN ACK
    0x31: TcpEvent.FIN,  # FIN ACK URG
    0x10: TcpEvent.ACK,
    0x30: TcpEvent.ACK,  # ACK URG
}

EVENT_OF_FLAGS: Final[tuple[int, ...]] = tuple(
    int(_FLAG_SETS.get(flags & 0x37, MALFORMED)) for flags in range(256)
)
"""`TcpEvent` of the flags byte, or MALFORMED."""
