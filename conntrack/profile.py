"""Which rules hold where the RFCs leave a choice, or where Linux is lax."""

from dataclasses import dataclass
from typing import Final

from conntrack.timeouts import LINUX_TIMEOUTS, STRICT_TIMEOUTS, Timeouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A set of choices; vary one with `dataclasses.replace`.

    Attributes:
        name: shown in logs.
        strict: RFC 5961, 5927, 7126 and the other hardening rules; False answers as Linux does.
        loose: a TCP segment with ACK may open a flow in its middle (`nf_conntrack_tcp_loose`).
        liberal: segments out of the window are let through, resets excepted
            (`nf_conntrack_tcp_be_liberal`).
        invalid_writes: an INVALID segment, when confirmed, leaves behind what it does in Linux; off
            in both profiles, because a forged segment can so spoil a handshake. For comparisons.
        retransmissions: after so many equal segments the short timeout holds
            (`nf_conntrack_tcp_max_retrans`).
        timeouts: idle seconds.
    """

    name: str
    strict: bool
    loose: bool = False
    liberal: bool = False
    invalid_writes: bool = False
    retransmissions: int = 3
    timeouts: Timeouts = STRICT_TIMEOUTS


STRICT: Final = Profile(name="strict", strict=True)
LINUX: Final = Profile(name="linux", strict=False, loose=True, timeouts=LINUX_TIMEOUTS)
