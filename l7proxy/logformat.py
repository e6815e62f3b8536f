r"""The access log's format: Envoy's command operators, compiled once. Pure.

Source: envoy docs, configuration/observability/access_log/usage.rst. Text is the format with its
operators filled in, `-` for what is not known; JSON is an object whose values are formats, where a
value that is one operator alone keeps its type and what is not known is null.

No byte of a request can forge a line: in text, control and non-ASCII characters, quotes and
backslashes are written as `\xNN`; in JSON the encoder escapes them.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from conntrack.address import format_address
from firewall.policy.snapshot import OriginRow
from l7proxy.commands import Record
from l7proxy.head import Field

DEFAULT_TEXT = (
    '[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%"'
    " %RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION%"
    ' %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "%REQ(X-FORWARDED-FOR)%" "%REQ(USER-AGENT)%"'
    ' "%REQ(X-REQUEST-ID)%" "%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%"\n'
)
"""Envoy's default format string."""

DEFAULT_JSON = json.dumps(
    {
        "start_time": "%START_TIME%",
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(:PATH)%",
        "protocol": "%PROTOCOL%",
        "response_code": "%RESPONSE_CODE%",
        "response_flags": "%RESPONSE_FLAGS%",
        "response_code_details": "%RESPONSE_CODE_DETAILS%",
        "bytes_received": "%BYTES_RECEIVED%",
        "bytes_sent": "%BYTES_SENT%",
        "duration": "%DURATION%",
        "upstream_service_time": "%RESPONSE_DURATION%",
        "x_forwarded_for": "%REQ(X-FORWARDED-FOR)%",
        "user_agent": "%REQ(USER-AGENT)%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "authority": "%REQ(:AUTHORITY)%",
        "upstream_host": "%UPSTREAM_HOST%",
        "downstream_remote_address": "%DOWNSTREAM_REMOTE_ADDRESS%",
        "requested_server_name": "%REQUESTED_SERVER_NAME%",
        "route_name": "%ROUTE_NAME%",
    }
)
"""The fields that Istio's documentation shows, as far as they are known here."""

ENCODINGS = ("text", "json")

REDACTED = "[redacted]"
"""What stands for the value of a header that a rule compares with a secret; Cilium's word."""

_UNSAFE = re.compile(r"[^ !#-\[\]-~]")
_OPERATOR = re.compile(r"%(?:(%)|([A-Z0-9_]+)(?:\(([^()]*)\))?(?::([0-9]+))?%)")
_HEADER = re.compile(r":?[A-Za-z0-9!#$&'*+.^_`|~-]+")
_TIME = re.compile(r"%(?:([1-9])f|E([1-9])S|(f)|(s)|([A-Za-z%]))")
_STRFTIME = frozenset("aAbBcdDeFHIjmMnpSTuUVwWxXyYZzG%")


class FormatError(ValueError):
    """The format cannot be used; the text names the part, and what would be right."""


class Line(NamedTuple):
    """What a line is made of.

    Attributes:
        record: a final record.
        source: packed address and port of the client.
        destination: packed address and port that it meant.
        upstream_port: our port towards the server; 0 = there was no connection.
        connection_id: of the client's connection, unique in this worker.
        stream_id: of the request, unique in this worker.
        time_ns: nanoseconds since the epoch at which it ended.
        hostname: this machine's name.
    """

    record: Record
    source: tuple[bytes, int]
    destination: tuple[bytes, int]
    upstream_port: int
    connection_id: int
    stream_id: int
    time_ns: int
    hostname: str


Value = str | int | float | None
_Getter = Callable[[Line], Value]


def compile_format(text: str, encoding: str = "text") -> Callable[[Line], str]:
    """Return what makes a log line, its newline included.

    Args:
        text: a format string, or, for JSON, an object of them; empty = the default.
        encoding: one of ENCODINGS.

    Raises:
        FormatError: an operator that does not exist, or that is not written as it must be.
    """
    if encoding == "json":
        return _json(text or DEFAULT_JSON)
    parts = _parts(text or DEFAULT_TEXT)
    end = "" if (text or DEFAULT_TEXT).endswith("\n") else "\n"

    def line(about: Line) -> str:
        return (
            "".join(part if isinstance(part, str) else _shown(part(about)) for part in parts) + end
        )

    return line


def _json(text: str) -> Callable[[Line], str]:
    try:
        wanted = json.loads(text)
    except ValueError as error:
        raise FormatError(f"not a JSON object of formats: {error}") from None
    if not isinstance(wanted, dict) or not all(isinstance(one, str) for one in wanted.values()):
        raise FormatError("a JSON format is an object whose values are format strings")
    fields = {name: _parts(one) for name, one in wanted.items()}

    def line(about: Line) -> str:
        made = {name: _value(parts, about) for name, parts in fields.items()}
        return json.dumps(made, separators=(",", ":")) + "\n"

    return line


def _value(parts: Sequence[str | _Getter], about: Line) -> Value:
    """One operator alone keeps its type."""
    if len(parts) == 1 and not isinstance(parts[0], str):
        return parts[0](about)
    texts = (part if isinstance(part, str) else part(about) for part in parts)
    return "".join("-" if one is None else str(one) for one in texts)


def _shown(value: Value) -> str:
    if value is None or (not value and isinstance(value, str)):
        return "-"
    return _UNSAFE.sub(lambda found: f"\\x{ord(found[0]):02x}", str(value))


def _parts(text: str) -> list[str | _Getter]:
    """Cut a format into literal texts and what fills in its operators."""
    parts: list[str | _Getter] = []
    at = 0
    while at < len(text):
        percent = text.find("%", at)
        if percent != at:
            parts.append(text[at : percent if percent >= 0 else len(text)])
        if percent < 0:
            break
        found = _OPERATOR.match(text, percent)
        if found is None:
            raise FormatError(
                f"at character {percent + 1}: {text[percent : percent + 20]!r} is no operator;"
                " write %NAME%, %NAME(ARGUMENT)% or %NAME(ARGUMENT):LENGTH%, %% for a percent sign"
            )
        parts.append("%" if found[1] else _operator(found[2], found[3], found[4]))
        at = found.end()
    return parts


def _operator(name: str, argument: str | None, length: str | None) -> _Getter:
    plain, taking = _PLAIN.get(name), _TAKING.get(name)
    if plain is not None:
        if argument is not None:
            raise FormatError(f"%{name}% takes no argument")
        getter = plain
    elif taking is not None:
        getter = taking(argument)
    else:
        known = ", ".join(sorted((*_PLAIN, *_TAKING)))
        raise FormatError(f"%{name}%: no such operator; there are {known}")
    if length is None:
        return getter
    limit = int(length)

    def cut(about: Line) -> Value:
        value = getter(about)
        return value[:limit] if isinstance(value, str) else value

    return cut


# --- operators ------------------------------------------------------------------------------------


def _of_request(name: str) -> _Getter:
    pseudo: dict[str, _Getter] = {
        ":method": lambda about: about.record.method or None,
        ":path": lambda about: about.record.path or None,
        ":authority": lambda about: about.record.authority or None,
        "host": lambda about: about.record.authority or None,
        ":scheme": lambda about: "https" if about.record.tls else "http",
        "x-request-id": lambda about: about.record.request_id or None,
        # What Envoy keeps there when it rewrites a path, which is not done here: a client's would
        # stand in the default format in the place of what it asked for.
        "x-envoy-original-path": lambda _about: None,
    }
    if name in pseudo:
        return pseudo[name]
    key = name.encode()

    def get(about: Line) -> Value:
        judgement = about.record.judgement
        if judgement is not None and key in judgement.redacted:
            return REDACTED
        return _field(about.record.request_fields, key)

    return get


def _of_response(name: str) -> _Getter:
    key = name.encode()
    if key == b"x-envoy-upstream-service-time":
        return _response_ms  # what Envoy's router adds
    return lambda about: _field(about.record.response_fields, key)


def _field(fields: Sequence[Field], key: bytes) -> str | None:
    values = [field[2] for field in fields if field[0] == key]
    return b",".join(values).decode("latin-1") if values else None


def _header(of: Callable[[str], _Getter]) -> Callable[[str | None], _Getter]:
    """`X?Y`: Y if there is no X."""

    def make(argument: str | None) -> _Getter:
        names = (argument or "").split("?")
        if len(names) > 2 or not all(_HEADER.fullmatch(name) for name in names):
            raise FormatError(f"({argument or ''}): a header's name, or NAME?OTHER")
        getters = [of(name.lower()) for name in names]

        def get(about: Line) -> Value:
            for getter in getters:
                if (value := getter(about)) is not None:
                    return value
            return None

        return get

    return make


def _start_time(argument: str | None) -> _Getter:
    """strftime(3), with %f, %1f to %9f, %E3S and %s (seconds since the epoch) as in Envoy."""
    wanted = argument or "%Y-%m-%dT%H:%M:%E3SZ"
    for found in re.finditer(r"%(.?)", wanted):
        whole = _TIME.match(wanted, found.start())
        if whole is None or (whole[5] and whole[5] not in _STRFTIME):
            raise FormatError(f"START_TIME({argument}): {found[0]!r} is none of strftime's")

    def get(about: Line) -> Value:
        ns = about.time_ns - round(about.record.duration_s * 1e9)
        seconds, rest = divmod(ns, 1_000_000_000)
        moment = datetime.fromtimestamp(seconds, UTC)

        def fill(found: re.Match[str]) -> str:
            digits, fraction, nine, epoch, _ = found.groups()
            if epoch:
                return str(seconds)
            if fraction:
                return f"{moment:%S}.{rest:09d}"[: 3 + int(fraction)]
            if digits or nine:
                return f"{rest:09d}"[: int(digits or 9)]
            return moment.strftime(found[0])

        return _TIME.sub(fill, wanted)

    return get


def _trailer(argument: str | None) -> _Getter:
    """Trailers are dropped, or passed on unread, so there is never one to show."""
    if not _HEADER.fullmatch(argument or ""):
        raise FormatError(f"TRAILER({argument or ''}): a header's name")
    return lambda _about: None


def _metadata(argument: str | None) -> _Getter:
    name, _, key = (argument or "").partition(":")
    getter = _METADATA.get(key)
    if name != _NAMESPACE or getter is None:
        known = ", ".join(f"{_NAMESPACE}:{known}" for known in _METADATA)
        raise FormatError(f"DYNAMIC_METADATA({argument or ''}): there are {known}")
    return getter


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _response_ms(about: Line) -> Value:
    return _ms(about.record.latency_s) if about.record.latency_s else None


def _host_port(address: bytes, port: int) -> str:
    text = format_address(address)
    return f"[{text}]:{port}" if len(address) == 16 else f"{text}:{port}"


def _rule(rows: Sequence[OriginRow]) -> str | None:
    return f"{rows[0].namespace}/{rows[0].name}" if rows else None


def _route(about: Line) -> Value:
    judgement = about.record.judgement
    return None if judgement is None else _rule(judgement.allowed_by or judgement.denied_by)


def _terminated(about: Line) -> Value:
    record = about.record
    return record.detail if record.detail and not record.status else None


def _source(about: Line) -> Value:
    return _host_port(*about.source)


def _destination(about: Line) -> Value:
    return _host_port(*about.destination)


def _upstream_local(about: Line) -> Value:
    return _host_port(about.source[0], about.upstream_port) if about.upstream_port else None


_PLAIN: Mapping[str, _Getter] = {
    "PROTOCOL": lambda about: about.record.protocol or None,
    "RESPONSE_CODE": lambda about: about.record.status,
    "RESPONSE_CODE_DETAILS": lambda about: about.record.detail or None,
    "RESPONSE_FLAGS": lambda about: about.record.flag or None,
    "BYTES_RECEIVED": lambda about: about.record.received_bytes,
    "BYTES_SENT": lambda about: about.record.sent_bytes,
    "DURATION": lambda about: _ms(about.record.duration_s),
    "REQUEST_DURATION": lambda about: _ms(about.record.request_s),
    "RESPONSE_DURATION": _response_ms,
    "UPSTREAM_HOST": _destination,
    "UPSTREAM_LOCAL_ADDRESS": _upstream_local,
    "DOWNSTREAM_REMOTE_ADDRESS": _source,
    "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT": lambda about: format_address(about.source[0]),
    "DOWNSTREAM_REMOTE_PORT": lambda about: about.source[1],
    "DOWNSTREAM_DIRECT_REMOTE_ADDRESS": _source,
    "DOWNSTREAM_LOCAL_ADDRESS": _destination,
    "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT": lambda about: format_address(about.destination[0]),
    "DOWNSTREAM_LOCAL_PORT": lambda about: about.destination[1],
    "REQUESTED_SERVER_NAME": lambda about: about.record.server_name or None,
    "CONNECTION_ID": lambda about: about.connection_id,
    "STREAM_ID": lambda about: about.stream_id,
    "ROUTE_NAME": _route,
    "UPSTREAM_TRANSPORT_FAILURE_REASON": lambda about: about.record.transport_failure or None,
    "CONNECTION_TERMINATION_DETAILS": _terminated,
    "HOSTNAME": lambda about: about.hostname,
}

_TAKING: Mapping[str, Callable[[str | None], _Getter]] = {
    "START_TIME": _start_time,
    "REQ": _header(_of_request),
    "RESP": _header(_of_response),
    "TRAILER": _trailer,
    "DYNAMIC_METADATA": _metadata,
}

_NAMESPACE = "cilium.l7policy"
"""Cilium's HTTP filter."""

_METADATA: Mapping[str, _Getter] = {
    "allowed": lambda about: str(_judged(about, "allowed")).lower(),
    "direction": lambda about: getattr(_judged(about, "direction"), "name", None),
    "policy_revision": lambda about: _judged(about, "revision"),
    "source_identity": lambda about: _judged(about, "source_identity"),
    "destination_identity": lambda about: _judged(about, "destination_identity"),
}


def _judged(about: Line, name: str) -> Value:
    value: Value = getattr(about.record.judgement, name, None)
    return value
