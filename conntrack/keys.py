"""Flow keys: the bytes by which the table finds an entry, and the way back to a tuple.

Layout: source address, destination address, 4 bytes of the transport, protocol number. TCP has no
protocol number, because then its key is one slice of an ordinary packet; the lengths tell:
12 or 36 bytes TCP, 13 or 37 bytes other protocols with ports or ICMP, 9 or 33 bytes the rest.
"""

from typing import Final

from conntrack.flow import ICMP, ICMPV6, TCP, FlowTuple

# ICMP queries and their answers. RFC 792 (echo 8/0, timestamp 13/14, information 15/16), RFC 950
# (mask 17/18), RFC 4443 (echo 128/129), RFC 4620 (node information 139/140).
ICMP_ANSWER: Final[dict[int, int]] = {8: 0, 13: 14, 15: 16, 17: 18}
ICMPV6_ANSWER: Final[dict[int, int]] = {128: 129, 139: 140}

_COUNTERPART: Final[dict[int, dict[int, int]]] = {
    ICMP: {**ICMP_ANSWER, **{answer: query for query, answer in ICMP_ANSWER.items()}},
    ICMPV6: {**ICMPV6_ANSWER, **{answer: query for query, answer in ICMPV6_ANSWER.items()}},
}


def reply_key(key: bytes) -> bytes:
    """The key of the packets that answer those of `key`.

    ICMP types become their counterpart (echo request ↔ reply); a type without one stays.
    """
    size = len(key)
    if size == 12:  # TCP over IPv4, asked for every reply
        return key[4:8] + key[:4] + key[10:] + key[8:10]
    half = 4 if size < 32 else 16
    ends = half * 2
    addresses = key[half:ends] + key[:half]
    if size == ends + 4:
        return addresses + key[ends + 2 :] + key[ends : ends + 2]
    if size == ends + 1:
        return addresses + key[ends:]
    protocol = key[-1]
    if protocol in (ICMP, ICMPV6):
        kind = _COUNTERPART[protocol].get(key[ends + 2], key[ends + 2])
        return addresses + key[ends : ends + 2] + bytes((kind,)) + key[ends + 3 :]
    return addresses + key[ends + 2 : ends + 4] + key[ends : ends + 2] + key[-1:]


def tuple_of_key(key: bytes) -> FlowTuple:
    """The flow tuple that a key stands for; ICMP gives its identifier as both ports."""
    size = len(key)
    half = 4 if size < 32 else 16
    ends = half * 2
    source, destination = key[:half], key[half:ends]
    if size == ends + 1:
        return FlowTuple(source, destination, key[-1], 0, 0)
    protocol = TCP if size == ends + 4 else key[-1]
    first = int.from_bytes(key[ends : ends + 2], "big")
    if protocol in (ICMP, ICMPV6):
        return FlowTuple(source, destination, protocol, first, first)
    second = int.from_bytes(key[ends + 2 : ends + 4], "big")
    return FlowTuple(source, destination, protocol, first, second)


def key_of_tuple(flow: FlowTuple, *, icmp_type: int = 0) -> bytes:
    """The key of packets that carry this tuple; `icmp_type` completes an ICMP query's."""
    source, destination, protocol, source_port, destination_port = flow
    addresses = source + destination
    if protocol in (ICMP, ICMPV6):
        return addresses + source_port.to_bytes(2, "big") + bytes((icmp_type, 0, protocol))
    ports = source_port.to_bytes(2, "big") + destination_port.to_bytes(2, "big")
    if protocol == TCP:
        return addresses + ports
    if protocol in (17, 132):
        return addresses + ports + bytes((protocol,))
    return addresses + bytes((protocol,))
