"""Every number and switch of the proxy, with its unit, default and source.

"Envoy" is the default in envoyproxy/data-plane-api of January 2026, "edge" the value of Envoy's
best-practice configuration for a proxy that faces strangers, "Cilium" what Cilium generates. Each
can be set on the worker's command line with `--set NAME=VALUE`.
"""

from dataclasses import dataclass, fields, replace


class LimitError(ValueError):
    """A setting that does not exist or a value that it cannot take; the text names both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one connection may use, and what a request may look like."""

    head_bytes: int = 60 * 1024
    """Request line and header fields, bytes. Envoy max_request_headers_kb 60."""
    target_bytes: int = 16 * 1024
    """Request target, bytes. RFC 9112 3 asks for 8000; nginx 8 KiB, haproxy 16 KiB, Envoy only
    bounds the head."""
    header_count: int = 100
    """Header fields of a request or response. Envoy max_headers_count 100."""
    response_head_bytes: int = 60 * 1024
    """Status line and header fields of a response, bytes. As for requests."""
    connection_token_count: int = 10
    """Options in `Connection`. Envoy's sanitizeConnectionHeader refuses more than 10."""
    chunk_line_bytes: int = 4 * 1024
    """One chunk-size line with its extensions, bytes. h11 and nginx allow 4 to 16 KiB."""
    chunk_extension_bytes: int = 16 * 1024
    """All chunk extensions of one body, bytes (CVE-2023-39326 is their abuse)."""
    trailer_bytes: int = 16 * 1024
    """The trailer section of one body, bytes; trailers are read, checked and dropped."""
    informational_count: int = 16
    """1xx responses before the final one."""
    buffer_bytes: int = 64 * 1024
    """Bytes held for one direction of one connection before its sender is paused. Envoy
    per_connection_buffer_limit_bytes: 1 MiB, edge 32 KiB."""
    discard_bytes: int = 64 * 1024
    """Body of a refused request that is read and thrown away to keep the connection usable; a
    longer one closes it."""
    connection_count: int = 10_000
    """Client connections of one worker, and connections to servers. Edge: 10,000 per listener."""
    connection_count_per_source: int = 5_000
    """The same of one source address. Each stream of HTTP/2 may need a connection to a server of
    HTTP/1. Advice; Envoy has none."""

    h2_stream_count: int = 100
    """HTTP/2 streams at one time on one connection. Envoy max_concurrent_streams 1024, edge 100."""
    h2_connection_bytes: int = 1024 * 1024
    """HTTP/2 flow control window of one connection, bytes. Edge: 1 MiB."""
    h2_stream_bytes: int = 65_535
    """The same of one stream, also towards servers: as much of a body is on its way at once. At
    least RFC 9113's 65,535, which a peer may count on before it has our SETTINGS. Envoy 16 MiB,
    edge 64 KiB."""
    h2_reset_count: int = 100
    """Streams reset before they were answered, by the client (CVE-2023-44487) or because of what it
    sent (CVE-2025-8671), in `h2_window_s`. Advice; Envoy looks at the first 500 streams."""
    h2_control_count: int = 1000
    """SETTINGS, PING and unknown frames in `h2_window_s` (CVE-2019-9512, 9515). Envoy
    max_outbound_control_frames 1000."""
    h2_window_s: float = 10.0
    """The interval of the two counts above."""
    h2_empty_count: int = 10
    """Consecutive frames that carry nothing and end nothing (CVE-2019-9518). Envoy 1."""
    h2_priority_count: int = 100
    """PRIORITY frames for each stream (CVE-2019-9513). Envoy 100."""
    h2_window_update_count: int = 10
    """WINDOW_UPDATE frames for each stream and each DATA frame sent to the client. Envoy 10."""
    h2_continuation_count: int = 16
    """CONTINUATION frames of one header block (CVE-2024-27919), which is also bounded by
    `head_bytes`. Advice; Envoy 512."""
    h2_upstream: str = "auto"
    """How HTTP/2 requests go to the server: "auto" (gRPC by HTTP/2, others by HTTP/1.1 until the
    server has spoken HTTP/2 on this connection), "prefer" (HTTP/2 is tried first, HTTP/1.1 if the
    server does not speak it) or "never"."""

    client_hello_bytes: int = 16 * 1024
    """A ClientHello with its records, bytes. Envoy tls_inspector max_client_hello_size 16 KiB."""
    encrypted_client_hello: str = "allow"
    """A hello with another one encrypted inside (ECH), on a port with `serverNames`: "allow"
    matches the outer name, "deny" resets. Browsers send grease that looks the same."""
    tls_handshake_count: int = 256
    """TLS handshakes with clients that one worker has under way; more are reset. Measured: 46 kB
    each, and 1.1 ms of processor time with an RSA key of 2048 bits, 0.5 ms with P-256. Advice."""
    tls_handshake_count_per_source: int = 64
    """The same for one source address, so that nobody's hellos keep everybody else out. Advice."""
    tls_handshake_timeout_s: float = 10.0
    """ClientHello to the end of the handshake with the client. Advice; Envoy has none."""
    tunnel_idle_timeout_s: float = 3600.0
    """Without a byte on a connection that passes unread. Envoy tcp_proxy idle_timeout 1 h."""

    dns_timeout_s: float = 10.0
    """A DNS question to its answer. Cilium ProxyForwardTimeout 10 s."""
    dns_idle_timeout_s: float = 30.0
    """A DNS connection without a question. Advice; RFC 7766 section 6.2.3: a few seconds."""
    dns_pending_count: int = 4096
    """DNS questions of one worker that wait for an answer; each has a socket over UDP. Further ones
    are refused. Cilium dnsproxy-concurrency-limit, there off."""
    dns_pending_count_per_source: int = 512
    """The same for one source address."""
    dns_pending_count_per_connection: int = 64
    """Unanswered questions on one connection before no more is read from it (RFC 7766 6.2.1.1)."""
    dns_rate_per_source: int = 20_000
    """DNS questions per second of one source address, and as many in a burst; further ones are
    refused. More than one worker can do: lower it against tunnels. Cilium has none."""
    dns_reject: str = "refused"
    """How a name that policy forbids is answered: "refused" (REFUSED) or "nameError" (NXDOMAIN, for
    resolvers that end their search list at REFUSED, such as musl's). Cilium
    tofqdns-dns-reject-response-code."""
    dns_hold_s: float = 0.1
    """How long an answer waits at most until every worker enforces its addresses. Cilium
    tofqdns-proxy-response-max-delay 100 ms."""

    first_byte_timeout_s: float = 15.0
    """Accepted connection to first byte, or to the end of a ClientHello that is looked at. Envoy
    listener_filters_timeout 15 s."""
    head_timeout_s: float = 10.0
    """First to last byte of a request head (slowloris). Envoy: off, recommended at the edge."""
    body_timeout_s: float = 60.0
    """Without any byte of a request body that the client still owes. Advice."""
    body_rate_bytes: int = 50
    """Bytes per second that a request body must come with, after a start of `body_timeout_s`: sizes
    of chunks, extensions and trailers earn nothing. Streams of gRPC are exempt. Advice, below what
    any upload needs; Apache mod_reqtimeout 500, Kestrel 240, Envoy has none."""
    request_timeout_s: float = 0.0
    """Head of a request to the last byte of its body, 0 = as long as it takes. Envoy
    request_timeout: off, edge 5 min."""
    idle_timeout_s: float = 300.0
    """Between two requests of one connection. Envoy 1 h; Cilium 60 s upstream; advice 60-300 s."""
    connection_duration_s: float = 0.0
    """How long a client connection may last before it is told to end (`drain_gap_s`), whatever it
    does; 0 = for ever. What is being served is served; connections that pass unread go on. Envoy
    max_connection_duration: off."""
    stream_idle_timeout_s: float = 300.0
    """Without a byte of a response that has begun, or with a client that does not read one.
    Envoy stream_idle_timeout 5 min."""
    response_timeout_s: float = 3600.0
    """End of the request to the head of the response. Cilium http-request-timeout 3600 s."""
    connect_timeout_s: float = 5.0
    """For the connection to the server, TLS included. Envoy connect_timeout 5 s; Cilium 2 s."""
    linger_s: float = 1.0
    """Between our FIN and the forced close: the client can still read our last answer.
    Envoy delayed_close_timeout 1 s."""
    drain_gap_s: float = 5.0
    """From the announcement that a connection will end (`Connection: close`, GOAWAY) to the end of
    what is idle: who has just connected, or sends at this very moment, is still served. Half of the
    time that a shorter drain has. Envoy drain_timeout 5 s."""

    accept_http_10: bool = True
    """HTTP/1.0 requests (with Host) are served, each on its own connection. False: 426, as Envoy
    without accept_http_10."""
    underscore_names: str = "allow"
    """Header names with `_`, or another character than letters, digits and `-`: "allow" (Envoy's
    default; refused all the same where a header rule decides, because CGI-like servers read `X_A`,
    and some `X.A`, as `X-A`), "drop" or "reject" (edge)."""
    dot_segments: str = "remove"
    """`.` and `..` in a path, escaped or not: "remove" (RFC 3986 5.2.4; Envoy normalize_path) or
    "reject"."""
    merge_slashes: bool = True
    """Runs of `/` in a path become one (Envoy merge_slashes). False, for object stores whose names
    hold empty segments: they are kept, but for those at the begin, and refused beside dot segments,
    of which servers that merge remove other ones. A rule like `/[a-z]*/x` then means `//x` too."""
    escaped_slashes: str = "reject"
    """`%2F` and `%5C` in a path: "reject" (Envoy REJECT_REQUEST), "unescape": they are slashes for
    rules and for the server (UNESCAPE_AND_FORWARD), or "keep": sent and matched as they are, for
    npm, GitLab and others whose names hold them (KEEP_UNCHANGED); dot segments beside them are
    refused. With "keep", a rule like `/[^/]+` lets names pass that some servers take for paths."""
    escaped_twice: str = "reject"
    """`%25` followed by two hex digits in a path: "reject", or "keep" byte for byte (Envoy)."""
    path_parameters: str = "keep"
    """`;` in a path segment: "keep" or "reject" (some servers cut a segment there). A dot segment
    with parameters (`..;x`) is always refused (CVE-2026-73551)."""
    strip_headers: tuple[str, ...] = ()
    """Request header names, lower case, that never reach the server. Consider those that a
    server lets replace path or method (docs/l7.md)."""
    request_id: bool = True
    """Add `X-Request-Id` to requests that have none, or an empty one, which goes. Envoy
    generate_request_id."""
    retry_idle_close: bool = True
    """Send a body-less request with an idempotent method once more when the server closed a kept
    connection instead of answering (RFC 9112 9.3.1)."""
    denied_body: str = "Access denied"
    """Text of the 403, CRLF is added. Cilium http-403-msg."""
    log_headers: tuple[str, ...] = ("user-agent",)
    """Request header names, lower case, that are copied into flow records."""


_CHOICES = {
    "underscore_names": ("allow", "drop", "reject"),
    "dot_segments": ("remove", "reject"),
    "escaped_slashes": ("reject", "unescape", "keep"),
    "escaped_twice": ("reject", "keep"),
    "dns_reject": ("refused", "nameError"),
    "encrypted_client_hello": ("allow", "deny"),
    "h2_upstream": ("auto", "prefer", "never"),
    "path_parameters": ("keep", "reject"),
}


def override(limits: Limits, assignments: list[str]) -> Limits:
    """Return the limits with each `name=value` applied, in order.

    Numbers must be positive (0 where it means off); booleans are `true` or `false`; name lists are
    comma separated.

    Raises:
        LimitError: no such name, or not a value for it.
    """
    defaults = {field.name: getattr(limits, field.name) for field in fields(limits)}
    changed: dict[str, int | float | bool | str | tuple[str, ...]] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in defaults:
            raise LimitError(f"{assignment!r}: not NAME=VALUE of a setting in docs/l7.md")
        changed[name] = _parse(name, text, defaults[name])
    return replace(limits, **changed)  # type: ignore[arg-type]  # each value has its default's type


_RANGES = {
    "h2_connection_bytes": (65_535, 2**31 - 1),
    "h2_stream_bytes": (65_535, 2**31 - 1),
}
"""RFC 9113 6.5.2, 6.9: the window to begin with, and the largest."""

_MAY_BE_OFF = frozenset(("connection_duration_s", "request_timeout_s"))
"""Settings that 0 turns off."""


def _parse(
    name: str, text: str, default: float | bool | str | tuple[str, ...]
) -> int | float | bool | str | tuple[str, ...]:
    if isinstance(default, bool):
        if text not in {"true", "false"}:
            raise LimitError(f"{name}={text}: true or false")
        return text == "true"
    if isinstance(default, tuple):
        return tuple(part.strip().lower() for part in text.split(",") if part.strip())
    if isinstance(default, str):
        if name in _CHOICES and text not in _CHOICES[name]:
            raise LimitError(f"{name}={text}: one of {', '.join(_CHOICES[name])}")
        if any(not " " <= character <= "~" for character in text):
            raise LimitError(f"{name}: printable ASCII only")
        return text
    try:
        number = int(text) if isinstance(default, int) else float(text)
    except ValueError:
        raise LimitError(f"{name}={text}: not a number") from None
    lowest = 0 if name in _MAY_BE_OFF else 1e-9
    if not lowest <= number < float("inf"):
        must = "be positive, or 0 = off" if name in _MAY_BE_OFF else "be positive"
        raise LimitError(f"{name}={text}: must {must}")
    low, high = _RANGES.get(name, (lowest, number))
    if not low <= number <= high:
        raise LimitError(f"{name}={text}: must be from {low} to {high}")
    return number
