"""Which rules hold where the RFCs leave a choice, or where Linux is lax."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A set of choices.

    Attributes:
        name: shown in logs.
        strict: RFC 5961, 5927, 7126 and the other hardening rules; False answers as Linux does.
        loose: a TCP segment with ACK may open a flow in its middle (`nf_conntrack_tcp_loose`).
        liberal: sequence numbers out of the window are let through (`nf_conntrack_tcp_be_liberal`).
    """

    name: str
    strict: bool
    loose: bool = False
    liberal: bool = False


STRICT: Final = Profile(name="strict", strict=True)
LINUX: Final = Profile(name="linux", strict=False, loose=True)
