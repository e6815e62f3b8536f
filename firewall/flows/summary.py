"""What a flow was, in few words: the text in brackets at the end of a line.

The words are Hubble's (hubble/pkg/printer and the parsers' summaries); the names of ICMP types and
codes are those that Hubble's decoder prints (RFC 792, RFC 1122, RFC 1812, RFC 4443, RFC 4861).
"""

from firewall.flows.flow import Flow, Http, Icmp, Layer4, Layer7, TcpFlags

TCP_FLAG_NAMES = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")
"""Name of each flag, by bit from the lowest (RFC 9293 section 3.1)."""

_UNREACHABLE4 = (
    "Net", "Host", "Protocol", "Port", "FragmentationNeeded", "SourceRoutingFailed",
    "NetUnknown", "HostUnknown", "SourceIsolated", "NetAdminProhibited", "HostAdminProhibited",
    "NetTOS", "HostTOS", "CommAdminProhibited", "HostPrecedence", "PrecedenceCutoff",
)  # fmt: skip
_UNREACHABLE6 = (
    "NoRouteToDst", "AdminProhibited", "BeyondScopeOfSrc", "Address", "Port",
    "SrcAddressFailedPolicy", "RejectRouteToDst",
)  # fmt: skip

_ICMP4: dict[int, tuple[str, tuple[str, ...]]] = {
    0: ("EchoReply", ()),
    3: ("DestinationUnreachable", _UNREACHABLE4),
    4: ("SourceQuench", ()),
    5: ("Redirect", ("Net", "Host", "TOS+Net", "TOS+Host")),
    8: ("EchoRequest", ()),
    9: ("RouterAdvertisement", ()),
    10: ("RouterSolicitation", ()),
    11: ("TimeExceeded", ("TTLExceeded", "FragmentReassemblyTimeExceeded")),
    12: ("ParameterProblem", ("PointerIndicatesError", "MissingOption", "BadLength")),
    13: ("TimestampRequest", ()),
    14: ("TimestampReply", ()),
    15: ("InfoRequest", ()),
    16: ("InfoReply", ()),
    17: ("AddressMaskRequest", ()),
    18: ("AddressMaskReply", ()),
}
_ICMP6: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("DestinationUnreachable", _UNREACHABLE6),
    2: ("PacketTooBig", ()),
    3: ("TimeExceeded", ("HopLimitExceeded", "FragmentReassemblyTimeExceeded")),
    4: (
        "ParameterProblem",
        ("ErroneousHeader", "UnrecognizedNextHeader", "UnrecognizedIPv6Option"),
    ),
    128: ("EchoRequest", ()),
    129: ("EchoReply", ()),
    130: ("MLDv1MulticastListenerQueryMessage", ()),
    131: ("MLDv1MulticastListenerReportMessage", ()),
    132: ("MLDv1MulticastListenerDoneMessage", ()),
    133: ("RouterSolicitation", ()),
    134: ("RouterAdvertisement", ()),
    135: ("NeighborSolicitation", ()),
    136: ("NeighborAdvertisement", ()),
    137: ("Redirect", ()),
    143: ("MLDv2MulticastListenerReportMessageV2", ()),
}


def icmp_text(version: int, icmp: Icmp) -> str:
    """Name a type and, where it has any, its code: `DestinationUnreachable(Port)`.

    Args:
        version: 4 or 6.
        icmp: type and code.
    """
    table = _ICMP4 if version == 4 else _ICMP6
    if icmp.type not in table:
        return f"{icmp.type}({icmp.code})"
    name, codes = table[icmp.type]
    if not codes:
        return name if not icmp.code else f"{name}(Code: {icmp.code})"
    code = codes[icmp.code] if icmp.code < len(codes) else f"Code: {icmp.code}"
    return f"{name}({code})"


def flag_names(flags: TcpFlags | None) -> tuple[str, ...]:
    """Return the names of the flags that are set, in Hubble's order."""
    if flags is None:
        return ()
    return tuple(name for name in (*TCP_FLAG_NAMES, "NS") if getattr(flags, name))


def layer4_text(l4: Layer4 | None) -> str:
    """Summarise L4: `TCP Flags: SYN, ACK`, `UDP`, `ICMPv4 EchoRequest`; "" if there is none."""
    if l4 is None:
        return ""
    if l4.tcp is not None:
        names = flag_names(l4.tcp.flags)
        return f"TCP Flags: {', '.join(names)}" if names else "TCP"
    if l4.udp is not None:
        return "UDP"
    if l4.sctp is not None:
        return "SCTP"
    if l4.icmpv4 is not None:
        return f"ICMPv4 {icmp_text(4, l4.icmpv4)}"
    if l4.icmpv6 is not None:
        return f"ICMPv6 {icmp_text(6, l4.icmpv6)}"
    return ""


def layer7_text(l7: Layer7) -> str:
    """Summarise L7: `HTTP/1.1 GET http://x/`, `HTTP/1.1 200 1ms (GET http://x/)`."""
    if l7.http is not None:
        return _http_text(l7.http, l7)
    if l7.dns is not None:
        return _dns_text(l7)
    return ""


def _http_text(http: Http, l7: Layer7) -> str:
    if l7.type == "RESPONSE":
        milliseconds = int(l7.latency_ns or 0) // 1_000_000
        return f"{http.protocol} {http.code} {milliseconds}ms ({http.method} {http.url})"
    return f"{http.protocol} {http.method} {http.url}"


_RCODES = {
    0: "No Error",
    1: "Format Error", 2: "Server Failure", 3: "Non-Existent Domain", 4: "Not Implemented",
    5: "Query Refused",
}  # fmt: skip


def rcode_text(rcode: int) -> str:
    """Name a response code as Hubble does."""
    return _RCODES.get(rcode, str(rcode))


def _dns_text(l7: Layer7) -> str:
    dns = l7.dns
    assert dns is not None
    question = f"{dns.query} {','.join(dns.qtypes)}"
    if l7.type != "RESPONSE":
        return f"DNS Query {question}"
    if dns.rcode:
        answer = f"RCode: {rcode_text(dns.rcode)}"
    else:
        parts = [f'"{",".join(dns.ips)}"'] if dns.ips else []
        parts += [f'CNAMEs: "{",".join(dns.cnames)}"'] if dns.cnames else []
        answer = " ".join(parts)
    seen_by = "Proxy" if dns.observation_source == "proxy" else "Query"
    return f"DNS Answer {answer} TTL: {dns.ttl} ({seen_by} {question})"


def _unread_text(flow: Flow) -> str:
    """Summarise a connection that passes unread: `TLS api.example`, and why it ended."""
    if flow.extensions is None:
        return ""
    said = flow.extensions.value
    return " ".join(part for part in (said.layer7, said.server_name, said.detail) if part)


def flow_text(flow: Flow) -> str:
    """Summarise a flow: L7 if it has any, else L4, else the number of its protocol."""
    if flow.l7 is not None:
        return layer7_text(flow.l7) or _unread_text(flow)
    text = layer4_text(flow.l4)
    if not text and flow.extensions is not None and flow.extensions.value.protocol:
        return f"IP protocol {flow.extensions.value.protocol}"
    return text
