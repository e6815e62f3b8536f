"""How long a flow may be silent before it is forgotten, in seconds, each with its source.

Shorter than the ends' own timers breaks flows that are alive; longer keeps doors open for flows
that are dead. LINUX has the defaults of nf_conntrack (Documentation/networking/
nf_conntrack-sysctl.rst, Linux 6.18). STRICT keeps half-open and closed flows much shorter, and
established ones just above the 2 hours of TCP keepalive (RFC 5382 REQ-5: at least 2 h 4 min).
"""

from dataclasses import dataclass
from typing import Final

from conntrack.sctp_states import SctpState
from conntrack.tcp_states import TcpState


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Idle seconds per protocol and state.

    Attributes:
        tcp: per `TcpState`, in order.
        tcp_retransmitted: established, but the last segments repeat each other.
        tcp_unacknowledged: established, but data waits for its acknowledgment, or nobody answered.
        sctp: per `SctpState`, in order.
        udp: a datagram without an answer, or the first two seconds of an exchange.
        udp_stream: both sides have sent for longer than `udp_stream_after`.
        udp_stream_after: age from which an exchange of datagrams is a stream.
        icmp: a query and its answers.
        gre: GRE without an answer.
        gre_stream: GRE in both directions.
        other: protocols without ports.
    """

    tcp: tuple[float, ...]
    tcp_retransmitted: float
    tcp_unacknowledged: float
    sctp: tuple[float, ...]
    udp: float
    udp_stream: float
    udp_stream_after: float
    icmp: float
    gre: float
    gre_stream: float
    other: float

    def __post_init__(self) -> None:
        if len(self.tcp) != len(TcpState) or len(self.sctp) != len(SctpState):
            raise ValueError("one timeout per state is needed")


LINUX_TIMEOUTS: Final = Timeouts(
    tcp=(
        120,  # NONE: not kept
        120,  # SYN_SENT  nf_conntrack_tcp_timeout_syn_sent
        60,  # SYN_RECV  nf_conntrack_tcp_timeout_syn_recv
        432000,  # ESTABLISHED  5 days
        120,  # FIN_WAIT
        60,  # CLOSE_WAIT
        30,  # LAST_ACK
        120,  # TIME_WAIT
        10,  # CLOSE
        120,  # SYN_SENT2  as SYN_SENT
    ),
    tcp_retransmitted=300,
    tcp_unacknowledged=300,
    sctp=(
        10,  # NONE: not kept
        10,  # CLOSED
        3,  # COOKIE_WAIT
        3,  # COOKIE_ECHOED
        210,  # ESTABLISHED: 7 heartbeats of 30 s
        3,  # SHUTDOWN_SENT
        3,  # SHUTDOWN_RECD
        3,  # SHUTDOWN_ACK_SENT
        30,  # HEARTBEAT_SENT
    ),
    udp=30,
    udp_stream=120,
    udp_stream_after=2,
    icmp=30,
    gre=30,
    gre_stream=180,
    other=600,
)

STRICT_TIMEOUTS: Final = Timeouts(
    tcp=(
        30,  # NONE: not kept
        30,  # SYN_SENT: SYN is repeated after 1, 3, 7, 15 and 31 s (RFC 6298); a later one is new
        30,  # SYN_RECV: as SYN_SENT, and never renewed
        7440,  # ESTABLISHED: 2 h 4 min, RFC 5382 REQ-5
        120,  # FIN_WAIT: the FIN is retransmitted for at least 100 s (RFC 1122 section 4.2.3.5)
        300,  # CLOSE_WAIT: the open half may pause; pf gives 900 s, Linux 60 s
        60,  # LAST_ACK: transitory, only ACKs are missing
        30,  # TIME_WAIT: one maximum segment lifetime as hosts use it (RFC 9293 3.4.2 says 2 min)
        5,  # CLOSE: segments that crossed the reset
        30,  # SYN_SENT2: not reached
    ),
    tcp_retransmitted=300,
    tcp_unacknowledged=300,  # above the 100 s for which data must be retransmitted (RFC 1122 R2)
    sctp=(10, 10, 10, 10, 210, 10, 10, 10, 30),  # RFC 9260 section 16: RTO.Initial is 1 s
    udp=30,
    udp_stream=120,  # RFC 4787 REQ-5: 2 minutes
    udp_stream_after=2,
    icmp=30,
    gre=30,
    gre_stream=180,
    other=120,
)
