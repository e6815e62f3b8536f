"""What may be said on an allowed connection: `rules`, TLS and listeners of a toPorts item.

Regular expressions of http rules are RE2 and are compiled here, so that a rule that the proxy could
never match is refused while its author is looking (Cilium compiles path and method here and host
later; a host that does not compile would leave Cilium's proxy without the rule).

Source: Cilium pkg/policy/api/l4.go, l7.go, http.go, rule_validation.go.
"""

import re

import re2

from firewall.policy.http_match import OWN_FIELDS
from firewall.policy.model import (
    DnsRule,
    HeaderMatch,
    HttpRule,
    L7Rules,
    Listener,
    TlsContext,
)
from firewall.policy.readers.document import Value, shorten
from firewall.policy.readers.peers import check_domain, read_domain
from firewall.policy.readers.settings import REMOVED, ReaderSettings

MISMATCHES = ("LOG", "ADD", "DELETE", "REPLACE")
"""What a headerMatches item may do with a request whose header differs."""

HIGHEST_LISTENER_PRIORITY = 100

_TLS_PARTS = {
    "trusted_ca": "trustedCA",
    "certificate": "certificate",
    "private_key": "privateKey",
}
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 5.1
_FIELD_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")  # RFC 9110 5.5
_QUIET = re2.Options()
_QUIET.log_errors = False
_REMOVED = {name: REMOVED[name] for name in ("kafka", "l7proto", "l7")}


def read_rules(value: Value, settings: ReaderSettings) -> L7Rules | None:
    """Read `rules`; an empty list of a kind allows everything, through the proxy."""
    fields = value.fields(("http", "dns"), refused=_REMOVED)
    if not value.is_mapping:
        return None
    if len(fields) > 1:
        value.error("multiple L7 protocol rule types specified in single rule: give http or dns")
        return None
    if "http" in fields:
        settings.require("http", fields["http"])
        rules = (_http(item, settings) for item in fields["http"].items())
        return L7Rules(kind="http", http=tuple(rule for rule in rules if rule is not None))
    if "dns" in fields:
        settings.require("dns", fields["dns"])
        names = (_dns(item) for item in fields["dns"].items())
        return L7Rules(kind="dns", dns=tuple(name for name in names if name is not None))
    if not any(value.child(name) for name in _REMOVED):
        value.error("needs exactly one of http, dns")
    return None


def _http(item: Value, settings: ReaderSettings) -> HttpRule | None:
    fields = item.fields(("method", "path", "host", "headers", "headerMatches"))
    if not item.is_mapping:
        return None
    method, path, host = (
        _regex(fields[name]) if name in fields else None for name in ("method", "path", "host")
    )
    listed = fields["headers"].items() if "headers" in fields else []
    headers = [text for item in listed if (text := _header(item))]
    matches = []
    if "headerMatches" in fields:
        settings.require("header-matches", fields["headerMatches"])
        read = (_header_match(match, settings) for match in fields["headerMatches"].items())
        matches = [match for match in read if match is not None]
    return HttpRule(
        method=method,
        path=path,
        host=host,
        headers=tuple(headers),
        header_matches=tuple(matches),
    )


def _header(value: Value) -> str:
    if value.is_mapping:
        value.error('must be a string; put quotes around it: "Name: value"')
        return ""
    text = value.text()
    if text is not None and not text.strip():
        value.error('is empty; write "Name" or "Name: value"')
        return ""
    return text or ""


def _regex(value: Value) -> str | None:
    """Read an RE2; "" means any, as a missing field does (Go's zero value)."""
    text = value.text()
    if not text:
        return None
    try:
        re2.compile(text, _QUIET)
    except re2.error as error:
        reason = error.args[0] if error.args else error
        reason = reason.decode() if isinstance(reason, bytes) else reason
        value.error(f'error parsing regexp "{shorten(text)}": {reason}')
        return None
    return text


def _header_match(item: Value, settings: ReaderSettings) -> HeaderMatch | None:
    fields = item.fields(("mismatch", "name", "secret", "value"))
    if not item.is_mapping:
        return None
    name = fields["name"].text() if "name" in fields else ""
    if name == "":
        item.error("needs the header's name")
    elif name is not None and not _FIELD_NAME.fullmatch(name):
        fields["name"].error(f'"{shorten(name)}" is no header name')
    mismatch = ""
    if "mismatch" in fields and fields["mismatch"].text() != "":
        mismatch = fields["mismatch"].word(MISMATCHES) or ""
        if mismatch:
            settings.require("header-mismatch-actions", fields["mismatch"])
        if mismatch not in ("", "LOG") and (name or "").lower() in OWN_FIELDS:
            fields["mismatch"].error(f"the proxy writes {name} itself; no rule can change it")
    secret = None
    if "secret" in fields:
        settings.require("secrets", fields["secret"])
        secret = _secret(fields["secret"])
    value = fields["value"].text() if "value" in fields else None
    if value is not None and not _FIELD_VALUE.fullmatch(value):
        fields["value"].error("holds a control character, which no header can")
    return HeaderMatch(
        name=name or "",
        mismatch=mismatch,
        value=value,
        secret_namespace=secret[0] if secret else None,
        secret_name=secret[1] if secret else None,
    )


def _secret(value: Value) -> tuple[str, str] | None:
    fields = value.fields(("namespace", "name"))
    if not value.is_mapping:
        return None
    namespace = (fields["namespace"].text() or "") if "namespace" in fields else ""
    name = fields["name"].text() if "name" in fields else ""
    if name == "":
        value.error("needs the secret's name")
    return (namespace, name) if name else None


def _dns(item: Value) -> DnsRule | None:
    domain = read_domain(item, "PortRuleDNS")
    return None if domain is None else DnsRule(match_name=domain[0], match_pattern=domain[1])


def read_server_names(value: Value, settings: ReaderSettings) -> tuple[str, ...]:
    """Read the TLS server names (SNI), lower-cased; wildcards as in DNS patterns."""
    items = value.items()
    if not items:
        value.error("is empty; leave it out to allow every name")
    names = []
    for item in items:
        text = item.text()
        if text == "":
            item.error("empty server name is not allowed")
        elif text is not None and check_domain(item, text, wildcards=True):
            names.append(text.lower())
    settings.require("server-names", value)
    return tuple(names)


def read_tls(value: Value, settings: ReaderSettings) -> TlsContext | None:
    """Read `terminatingTLS` or `originatingTLS`."""
    fields = value.fields(("secret", "trustedCA", "certificate", "privateKey"))
    if not value.is_mapping:
        return None
    if "secret" not in fields:
        value.error("needs secret")
    secret = _secret(fields["secret"]) if "secret" in fields else None
    parts = {
        part: text
        for part, field in _TLS_PARTS.items()
        if field in fields and (text := fields[field].text())
    }
    settings.require("tls", value)
    if secret is None:
        return None
    return TlsContext(secret_namespace=secret[0] or "default", secret_name=secret[1], **parts)


def read_listener(value: Value, settings: ReaderSettings) -> Listener | None:
    """Read `listener`: a listener of an Envoy configuration."""
    fields = value.fields(("envoyConfig", "name", "priority"))
    if not value.is_mapping:
        return None
    name = fields["name"].text() if "name" in fields else ""
    config_kind, config_name = "", ""
    if "envoyConfig" in fields:
        config = fields["envoyConfig"].fields(("kind", "name"))
        if "kind" in config:
            kinds = ("CiliumEnvoyConfig", "CiliumClusterwideEnvoyConfig")
            config_kind = config["kind"].word(kinds) or ""
        config_name = (config["name"].text() or "") if "name" in config else ""
    if name == "":
        value.error("needs name")
    if not config_name:
        value.error("needs envoyConfig with a name")
    priority = 0
    if "priority" in fields:
        priority = fields["priority"].integer(0, HIGHEST_LISTENER_PRIORITY) or 0
    settings.require("listener", value)
    return Listener(
        config_kind=config_kind, config_name=config_name, name=name or "", priority=priority
    )
