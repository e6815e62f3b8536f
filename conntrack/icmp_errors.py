"""ICMP errors: RELATED to the flow whose packet they quote, if they can be genuine.

An error is genuine only if it goes to the one who sent the quoted packet, and the quoted packet is
one that the flow has really sent. It never changes the flow (RFC 5927): a reset by ICMP is
the receiver's decision.

STRICT asks more than Linux: a quoted TCP segment must lie between what is acknowledged and what was
sent (RFC 5927 section 4.1), a quoted SCTP packet must have its flow's tag; messages that nobody
should obey (source quench, redirects, types that do not exist, path MTUs that no link has) are
INVALID.
"""

from typing import Final

from conntrack.address import is_link_local
from conntrack.entry import Entry
from conntrack.flow import SCTP, TCP
from conntrack.packet import Packet
from conntrack.quote import ICMPV6_REDIRECT, Quoted
from conntrack.sctp_states import SctpState
from conntrack.tcp_window import ACKED, HALF, MODULUS_MASK

# Type → highest code that exists. RFC 792, RFC 1812 section 5.2.7.1 (unreachable 0-15).
_IPV4_CODES: Final = {3: 15, 11: 1, 12: 2}
# RFC 4443 section 3 and RFC 4443 section 3.1 (0-6), RFC 8883, RFC 7112 (parameter problem 0-10).
_IPV6_CODES: Final = {1: 8, 2: 0, 3: 1, 4: 10}
_REFUSED_IPV4: Final = {
    4: "source quench is obsolete",  # RFC 6633
    5: "redirect crosses no router",  # RFC 1812 section 5.2.7.2
}
_MINIMUM_MTU_IPV4: Final = 552  # bytes; hosts go no lower (Linux net.ipv4.route.min_pmtu)
_MINIMUM_MTU_IPV6: Final = 1280  # bytes; RFC 8200 section 5
_LINK_HOP_LIMIT: Final = 255  # RFC 4861 section 8.1: has crossed no router


UNSEEN: Final = "quotes a flow whose numbers are not known here"
"""Why an error is refused although it may be genuine: what it quotes cannot be compared."""


def message_fault(packet: Packet, strict: bool) -> str:
    """Why nobody should obey this message, whatever it quotes; empty if it may be obeyed."""
    kind = packet.icmp_type
    if packet.version == 6 and kind == ICMPV6_REDIRECT:
        if packet.hop_limit != _LINK_HOP_LIMIT or not is_link_local(packet.source):
            return "redirect from beyond the link"
        return "redirect crosses no router" if strict else ""
    if not strict:
        return ""
    if packet.version == 4:
        if kind in _REFUSED_IPV4:
            return _REFUSED_IPV4[kind]
        if packet.icmp_code > _IPV4_CODES.get(kind, -1):
            return "no such ICMP error"
        if kind == 3 and packet.icmp_code == 4 and packet.sequence & 0xFFFF < _MINIMUM_MTU_IPV4:
            return "path MTU below every link's"
        return ""
    if packet.icmp_code > _IPV6_CODES.get(kind, -1):
        return "no such ICMPv6 error"
    if kind == 2 and packet.sequence < _MINIMUM_MTU_IPV6:
        return "path MTU below every link's"
    return ""


def quote_fault(entry: Entry, packet: Packet, strict: bool) -> str:
    """Why the quoted packet cannot be one of this flow's; empty if it can."""
    quoted = packet.quoted
    if quoted is None:
        return "quotes no packet"
    if packet.destination != quoted.source:
        return "goes to another than the quoted sender"
    if not strict or quoted.protocol not in (TCP, SCTP):
        return ""
    if quoted.sequence < 0:
        return "quotes no sequence number"  # RFC 792: at least 8 bytes of the transport header
    if quoted.protocol == SCTP:
        return _tag_fault(entry, quoted)
    if entry.windows is None or entry.offloaded:
        return UNSEEN
    direction = 0 if quoted.key == entry.key else 1
    sender, receiver = entry.windows[direction], entry.windows[1 - direction]
    if sender.max_window == 0:
        return ""
    # A keepalive repeats the last acknowledged byte (RFC 9293 section 3.8.4), hence the 1.
    lowest = receiver.max_ack if receiver.flags & ACKED else sender.initial
    behind = (quoted.sequence - (lowest - 1)) & MODULUS_MASK
    if behind > (sender.end - (lowest - 1)) & MODULUS_MASK or behind >= HALF:
        return "quotes a segment out of the window"
    return ""


def _tag_fault(entry: Entry, quoted: Quoted) -> str:
    """RFC 9260 section 10: the quoted verification tag must be the flow's; INIT has none."""
    if entry.memory is None:
        return UNSEEN
    expected = entry.memory[0 if quoted.key == entry.key else 1]
    opening = entry.state == SctpState.CLOSED and not entry.seen_reply
    if quoted.sequence == (0 if opening else expected or quoted.sequence):
        return ""
    return "quotes another verification tag"
