"""The part of the reader that knows what a check may send and expect."""

import re
from collections.abc import Callable

from firewall.policy.problem import did_you_mean
from firewall.policy.readers.document import Value, shorten
from firewall.policy.readers.ports import ICMP_TYPES
from firewall.policy.verdict import DropReason
from policytest.case import ICMP, PROTOCOLS, Expected, HttpRequest, TlsHello, Traffic

TRAFFIC_FIELDS = ("port", "icmp", "http", "tls")
EXPECTED_FIELDS = ("verdict", "by", "reason", "direction")
HTTP_FIELDS = ("method", "path", "host", "headers")
VERDICTS = ("allow", "deny")
DIRECTIONS = ("ingress", "egress")
REASONS = tuple(reason.name for reason in DropReason)

_PORT = re.compile(r"([0-9]{1,5})(?:/([A-Za-z]+))?")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
_VISIBLE = re.compile(r"[!-~]+")
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_SERVER_NAME = re.compile(r"|[A-Za-z0-9_]([-.A-Za-z0-9_]*[A-Za-z0-9_])?")
_HTTP_PORT = 80  # RFC 9110 section 4.2.1
_HTTPS_PORT = 443  # RFC 9110 section 4.2.2


def read_traffic(
    value: Value, fields: dict[str, Value], host_name: Callable[[], str]
) -> Traffic | None:
    """Read `port`, `icmp`, `http` and `tls` of a check or matrix; None after a report.

    Args:
        value: the check.
        fields: its fields.
        host_name: returns the name of the destination, for requests that give no host.
    """
    if "icmp" in fields:
        for other in ("port", "http", "tls"):
            if other in fields:
                fields[other].error("icmp has types, not ports: give one of the two")
                return None
        return _icmp(fields["icmp"])
    if not fields.keys() & TRAFFIC_FIELDS:
        value.error("needs port (80/TCP), icmp (EchoRequest), http or tls")
        return None
    usual = _HTTPS_PORT if "tls" in fields else _HTTP_PORT
    read = _port(fields["port"]) if "port" in fields else (usual, "TCP")
    if read is None:
        return None
    number, protocol = read
    traffic = Traffic(f"{number}/{protocol}", PROTOCOLS[protocol], number)
    above = "http" if "http" in fields else "tls"
    if above not in fields:
        return traffic
    if protocol != "TCP":
        fields["port"].error(f"{above} needs TCP, not {protocol}")
        return None
    hello = _hello(fields["tls"]) if "tls" in fields else None
    if "tls" in fields and hello is None:
        return None
    if "http" not in fields:
        return traffic._replace(request=hello)
    host = host_name() if hello is None or not hello.server_name else hello.server_name
    request = _request(fields["http"], host if number == usual else f"{host}:{number}")
    return None if request is None else traffic._replace(request=request._replace(hello=hello))


def _port(value: Value) -> tuple[int, str] | None:
    text = value.text()
    if text is None:
        return None
    found = _PORT.fullmatch(text)
    protocol = (found[2] or "TCP").upper() if found else ""
    if found is None or not 1 <= int(found[1]) <= 65535:
        value.error(f'"{shorten(text)}" is no port; write a number 1-65535 and /TCP, /UDP or /SCTP')
        return None
    if protocol not in PROTOCOLS:
        hint = did_you_mean(protocol, PROTOCOLS)
        value.error(f'"{shorten(text)}": the protocol is none of {", ".join(PROTOCOLS)}{hint}')
        return None
    return int(found[1]), protocol


def _icmp(value: Value) -> Traffic | None:
    text = value.text()
    if text is None:
        return None
    if text.isascii() and text.isdecimal():
        number = value.integer(0, 255)
        return None if number is None else Traffic(f"icmp {number}", ICMP, number, (number, number))
    names = [ICMP_TYPES[family][1] for family in ("IPv4", "IPv6")]
    types = names[0].get(text, -1), names[1].get(text, -1)
    if types == (-1, -1):
        hint = did_you_mean(text, (*names[0], *names[1]))
        value.error(f'"{shorten(text)}" is no ICMP type{hint}')
        return None
    return Traffic(f"icmp {text}", ICMP, max(types[0], 0), types)


def _request(value: Value, default_host: str) -> HttpRequest | None:
    before = value.report.error_count
    fields = value.fields(HTTP_FIELDS)
    method = _matching(fields.get("method"), _TOKEN, "GET", "a method")
    path = _matching(fields.get("path"), _VISIBLE, "/", "a request target: visible ASCII")
    host = _matching(fields.get("host"), _VISIBLE, default_host, "a host")
    headers = tuple(_headers(fields["headers"])) if "headers" in fields else ()
    if value.report.error_count > before:
        return None
    return HttpRequest(method, path, host, headers)


def _hello(value: Value) -> TlsHello | None:
    fields = value.fields(("sni",))
    if not value.is_mapping:
        return None
    if "sni" not in fields:
        value.error('needs sni: the server name; "" for a hello without one')
        return None
    before = value.report.error_count
    name = _matching(fields["sni"], _SERVER_NAME, "", "a server name")
    return None if value.report.error_count > before else TlsHello(name.lower())


def _matching(value: Value | None, pattern: re.Pattern[str], default: str, what: str) -> str:
    if value is None:
        return default
    text = value.text()
    if text is None:
        return default
    if not pattern.fullmatch(text):
        value.error(f'"{shorten(text)}" is not {what}')
    return text


def _headers(value: Value) -> list[tuple[str, str]]:
    """Read headers: name to value, or to a list of values for a repeated header."""
    found: list[tuple[str, str]] = []
    for name, given in value.pairs().items():
        if not _TOKEN.fullmatch(name):
            given.error(f'"{shorten(name)}" is no header name')
        elif name.lower() in ("host", "content-length", "transfer-encoding", "connection"):
            given.error(f"{name} is the connection's own header; for the host write http.host")
        for item in given.items() if _is_list(given) else [given]:
            text = "" if item.is_null else item.text()
            if text is None:
                continue
            if not _FIELD_VALUE.fullmatch(text):
                item.error("is no header value: no line feeds, control bytes or wide characters")
            found.append((name, text))
    return found


def _is_list(value: Value) -> bool:
    return not value.is_mapping and not hasattr(value.node, "text")


def read_expected(value: Value, fields: dict[str, Value]) -> Expected | None:
    """Read `verdict`, `by`, `reason` and `direction` of a check; None after a report."""
    if "verdict" not in fields:
        value.error("needs verdict: allow or deny")
        return None
    verdict = fields["verdict"].word(VERDICTS)
    by = (fields["by"].text() or "") if "by" in fields else ""
    reason = (fields["reason"].word(REASONS) or "") if "reason" in fields else ""
    direction = (fields["direction"].word(DIRECTIONS) or "") if "direction" in fields else ""
    if verdict == "allow" and reason:
        fields["reason"].error("only what is denied has a reason")
    return Expected(verdict == "allow", by, reason, direction) if verdict in VERDICTS else None
