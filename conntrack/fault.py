"""Why bytes are not a packet, and what is odd about bytes that are one."""

from enum import IntEnum, IntFlag


class Fault(IntEnum):
    """Why bytes are not a packet that can be tracked."""

    TRUNCATED = 1  # a header, or with complete=True the payload, ends after the bytes we have
    BAD_VERSION = 2  # neither IPv4 nor IPv6
    BAD_HEADER_LENGTH = 3  # IHL, TCP data offset or an extension header shorter than its minimum
    BAD_LENGTH = 4  # a stated length contradicts the header around it
    BAD_OPTION = 5  # an IPv4 option whose length leaves the header
    FRAGMENT = 6  # part of a datagram: reassembly has not happened or has failed
    NO_TRANSPORT = 7  # the IPv6 chain ends in "no next header" (59)
    WRONG_FAMILY = 8  # ICMP over IPv6 or ICMPv6 over IPv4
    BAD_CHECKSUM = 9  # only with verify=True
    UNKNOWN_L4 = 10  # GRE version 1 that carries anything but PPP (RFC 2637 section 4.1)


class PacketError(ValueError):
    """These bytes are not a packet; `fault` says what the caller answers with.

    Any other exception from `parse` is a bug.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.name)
        self.fault = fault


class Oddity(IntFlag):
    """Legal syntax that a strict tracker still refuses."""

    SOURCE_ROUTE = 1  # IPv4 loose or strict source route (RFC 7126 section 4.3, 4.4: drop)
    ROUTING_0 = 2  # IPv6 routing header type 0 (RFC 5095: deprecated)
    NO_CHECKSUM = 4  # UDP over IPv6 with checksum 0 (RFC 8200 section 8.1: discard)
    HOP_BY_HOP_LATE = 8  # hop-by-hop options not directly after the header (RFC 8200 section 4.1)
    GRE_HEADER = 16  # neither RFC 2784's nor the whole of RFC 2637's: nobody defined it
