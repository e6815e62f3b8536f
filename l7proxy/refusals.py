"""What the proxy itself answers instead of forwarding, and under which name it is logged.

A `Refusal` is a value: status, the detail string of the log and of the counters, Envoy's response
flag. Where Envoy has a detail string for the same thing, it is used (response_code_details.rst).
`RequestRefused` carries one from the module that noticed to the exchange that answers.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from l7proxy.head import RequestHead


class Refusal(NamedTuple):
    """One way not to forward: `status` 0 = close without an answer; `flag` as in Envoy's log."""

    status: int
    detail: str
    flag: str = "DPE"


class RequestRefused(Exception):  # noqa: N818 - a refusal is the normal answer to a hostile request
    """The request must not be forwarded; `refusal` says what to answer.

    `head`: what was read of it before it was refused, if it is a head at all.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.detail)
        self.refusal = refusal
        self.head: RequestHead | None = None


class ResponseRefused(Exception):  # noqa: N818 - see RequestRefused
    """The server's answer must not be forwarded; `refusal` says what the client gets instead."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.detail)
        self.refusal = refusal


# --- the head, byte by byte: 400 and close, RFC 9112 2.2, 3, 5 ----------------------------------

CODEC = Refusal(400, "http1.codec_error")
CODECS = Refusal(400, "http1.codecs_disagree")
CONTROL_BYTE = Refusal(400, "http1.invalid_characters")
BARE_LF = Refusal(400, "http1.bare_line_feed")
BARE_CR = Refusal(400, "http1.bare_carriage_return")
REQUEST_LINE = Refusal(400, "http1.invalid_request_line")
METHOD = Refusal(400, "http1.invalid_method")
URL = Refusal(400, "http1.invalid_url")
VERSION = Refusal(400, "http1.invalid_version")
UNSUPPORTED_VERSION = Refusal(505, "http1.unsupported_version")
LOW_VERSION = Refusal(426, "low_version")
FIELD = Refusal(400, "http1.invalid_header_line")
FIELD_NAME = Refusal(400, "http1.invalid_header_name")
OBS_FOLD = Refusal(400, "http1.obsolete_line_folding")
UNDERSCORE = Refusal(400, "http1.unexpected_underscore")
HEAD_TOO_LARGE = Refusal(431, "http1.headers_too_large")
TOO_MANY_FIELDS = Refusal(431, "http1.too_many_headers")
TARGET_TOO_LONG = Refusal(414, "request_uri_too_long")
TRUNCATED = Refusal(400, "http1.truncated_request")

# --- framing: 400 and close, RFC 9112 6 and 7 ----------------------------------------------------

LENGTH_AND_CHUNKED = Refusal(400, "http1.content_length_and_chunked_not_allowed")
LENGTH = Refusal(400, "http1.invalid_content_length")
TRANSFER_ENCODING = Refusal(400, "http1.invalid_transfer_encoding")
CHUNK = Refusal(400, "http1.invalid_chunk")
TRAILER = Refusal(400, "http1.invalid_trailer")

# --- HTTP/2: 400 on the stream, or GOAWAY and close, RFC 9113 5.4 ---------------------------------

H2_MESSAGING = Refusal(400, "http2.violation.of.messaging.rule")
H2_PROTOCOL = Refusal(0, "http2.protocol_error")
H2_CONTROL_FLOOD = Refusal(0, "http2.inbound_control_frames_flood")
H2_PRIORITY_FLOOD = Refusal(0, "http2.inbound_priority_frames_flood")
H2_WINDOW_FLOOD = Refusal(0, "http2.inbound_window_update_frames_flood")
H2_EMPTY_FLOOD = Refusal(0, "http2.inbound_empty_frames_flood")
H2_CONTINUATION_FLOOD = Refusal(0, "http2.continuation_flood")
H2_RESET_FLOOD = Refusal(0, "http2.premature_resets")

# --- host and target -----------------------------------------------------------------------------

NO_HOST = Refusal(400, "missing_host_header")
SEVERAL_HOSTS = Refusal(400, "http1.several_host_headers")
HOST = Refusal(400, "http1.invalid_host")
HOST_DIFFERS = Refusal(400, "http1.host_differs_from_target")
FRAGMENT = Refusal(400, "path_with_fragment")
PATH = Refusal(400, "path_normalization_failed")
ESCAPED_SLASH = Refusal(400, "path_with_escaped_slashes_rejected")
DOUBLE_ESCAPE = Refusal(400, "path_escaped_twice")

# --- what the connection may do ------------------------------------------------------------------

CONNECTION_HEADER = Refusal(400, "connection_header_rejected")
EXPECTATION = Refusal(417, "expectation_failed")
CONNECT = Refusal(403, "connect_refused", "UAEX")
UPGRADE = Refusal(403, "upgrade_failed", "UAEX")
DENIED = Refusal(403, "access_denied", "UAEX")
DENIED_CONNECTION = Refusal(0, "connection_denied", "UAEX")

# --- how a connection on a port with TLS rules begins: reset ------------------------------------

CLIENT_HELLO = Refusal(0, "client_hello_refused")
SERVER_NAME = Refusal(0, "server_name_denied", "UAEX")
CLEAR_TEXT = Refusal(0, "clear_text_denied", "UAEX")
TLS_SECRET = Refusal(0, "tls_secret_missing", "UAEX")
TLS_HANDSHAKE = Refusal(0, "tls_handshake_failed")
TLS_OVERFLOW = Refusal(0, "tls_handshake_overflow", "OM")
MISDIRECTED = Refusal(421, "misdirected_request", "UAEX")

# --- time ----------------------------------------------------------------------------------------

HEAD_TIMEOUT = Refusal(408, "request_header_timeout", "SI")
BODY_TIMEOUT = Refusal(408, "request_body_timeout", "SI")
REQUEST_TIMEOUT = Refusal(408, "request_overall_timeout", "SI")
RESPONSE_TIMEOUT = Refusal(504, "response_timeout", "UT")
HELLO_TIMEOUT = Refusal(0, "client_hello_timeout", "SI")
TLS_TIMEOUT = Refusal(0, "tls_handshake_timeout", "SI")
STREAM_IDLE = Refusal(0, "stream_idle_timeout", "SI")
FLUSH_TIMEOUT = Refusal(0, "client_flush_timeout", "SI")

# --- the server's side ---------------------------------------------------------------------------

CONNECT_TIMEOUT = Refusal(504, "upstream_connect_timeout", "UF")
CONNECT_FAILED = Refusal(502, "upstream_reset_before_response_started{connection_failure}", "UF")
UPSTREAM_OVERFLOW = Refusal(503, "upstream_reset_before_response_started{overflow}", "UO")
UPSTREAM_TLS = Refusal(
    503, "upstream_reset_before_response_started{connection_failure,TLS_error}", "UF"
)
UPSTREAM_CLOSED = Refusal(502, "upstream_reset_before_response_started{termination}", "UC")
UPSTREAM_TRUNCATED = Refusal(0, "upstream_reset_after_response_started{termination}", "UC")
UPSTREAM_PROTOCOL = Refusal(502, "upstream_reset_before_response_started{protocol_error}", "UPE")
UPSTREAM_HEAD_TOO_LARGE = Refusal(502, "upstream_response_headers_too_large", "UPE")
UPSTREAM_LATE_PROTOCOL = Refusal(0, "upstream_reset_after_response_started{protocol_error}", "UPE")
UPSTREAM_NO_HTTP2 = Refusal(502, "upstream_speaks_no_http2", "UPE")
UPSTREAM_RESET = Refusal(502, "upstream_reset_before_response_started{remote_reset}", "UR")
UPSTREAM_LATE_RESET = Refusal(0, "upstream_reset_after_response_started{remote_reset}", "UR")
CLIENT_GONE = Refusal(0, "downstream_remote_disconnect", "DC")
INTERNAL = Refusal(500, "internal_error", "DPE")
