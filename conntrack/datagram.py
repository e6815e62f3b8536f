"""Flows without a state machine: UDP, ICMP queries, GRE, and protocols known by address alone.

Such a flow is as alive as its last packet. An answer makes it two-sided; a UDP exchange that goes
on for more than two seconds is a stream, which may pause longer (RFC 4787 REQ-5) and is not evicted
for a newer flow. A DNS query and its answer never become one.
"""

from typing import Final

from conntrack.entry import Entry, Judgement, Update, invalid
from conntrack.flow import GRE, ICMP, ICMPV6, UDP, Direction
from conntrack.keys import ICMP_ANSWER, ICMPV6_ANSWER
from conntrack.packet import Packet
from conntrack.profile import Profile

_new: Final = tuple.__new__  # builds a NamedTuple in a third of the time of calling its class
_QUERIES: Final = {ICMP: frozenset(ICMP_ANSWER), ICMPV6: frozenset(ICMPV6_ANSWER)}


def first(packet: Packet, profile: Profile) -> Judgement:
    """Judge a packet that belongs to no flow."""
    protocol = packet.protocol
    timeouts = profile.timeouts
    if protocol == UDP:
        if profile.strict and packet.destination_port == 0:
            return invalid("port 0 is reserved")  # RFC 6335 section 6; source 0 means "no answer"
        timeout_s = timeouts.udp
    elif protocol in _QUERIES:
        if packet.icmp_type not in _QUERIES[protocol]:
            return invalid("answers no query")
        timeout_s = timeouts.icmp
    elif protocol == GRE:
        timeout_s = timeouts.gre
    else:
        timeout_s = timeouts.other
    return _new(Update, (0, timeout_s, False, False, None, None, False))


def follow(entry: Entry, packet: Packet, direction: int, profile: Profile, now: float) -> Judgement:
    """Judge a packet of a known flow."""
    protocol = packet.protocol
    timeouts = profile.timeouts
    assured = False
    if protocol == UDP:
        timeout_s = timeouts.udp
        if entry.seen_reply and now - entry.created_at > timeouts.udp_stream_after:
            timeout_s = timeouts.udp_stream
            assured = True
    elif protocol in _QUERIES:
        timeout_s = timeouts.icmp
    elif protocol == GRE:
        assured = entry.seen_reply
        timeout_s = timeouts.gre_stream if assured else timeouts.gre
    else:
        # A tunnel in both directions (ESP, AH, IP in IP) must survive a flood; Linux assures none.
        assured = profile.strict and (entry.seen_reply or direction == Direction.REPLY)
        timeout_s = timeouts.other
    return _new(Update, (0, timeout_s, assured, True, None, None, False))
