"""Secrets that policies name: those that are missing or broken, and the certificates in use.

What depends on a missing secret stays closed.

Said when a policy is applied or validated; the proxy looks again with each snapshot, and what it
finds stands in the status (Cilium: a missing secret denies, and only the proxy's log says so).
"""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from firewall.policy.compile import make_l7_row
from firewall.policy.model import PolicyObject
from firewall.policy.problem import Problem
from firewall.policy.snapshot import L7Row, Snapshot
from l7proxy.certificates import Certificates
from l7proxy.secrets import SecretFiles

if TYPE_CHECKING:
    from cryptography.x509 import Certificate


def secret_problems(objects: Iterable[PolicyObject], folder: Path | None) -> Iterator[Problem]:
    """Yield a warning for each rule whose secret cannot serve.

    Args:
        objects: policies as they were read.
        folder: `proxy.secrets_dir`; None: none is configured.
    """
    certificates = Certificates(folder)
    values = None if folder is None else SecretFiles(folder)
    for entry in (entry for one in objects for entry in one.entries):
        row = make_l7_row(entry)
        if row is None:
            continue
        place = entry.origin
        for text in certificates.install(Snapshot(l7=(row,))):
            said = f"{text}; connections that need it are closed"
            yield Problem.warning(place.file, place.line, place.column, place.path, said)
        for path in (path for pair in certificates.files(Snapshot(l7=(row,))) for path in pair):
            for one in () if path is None else read_file(path):
                end = one.not_valid_after_utc
                if end < datetime.now(UTC):
                    said = f"{path}: a certificate is valid no longer, since {_utc(end)}"
                    yield Problem.warning(place.file, place.line, place.column, place.path, said)
        for text in _missing_values(row, values):
            yield Problem.warning(place.file, place.line, place.column, place.path, text)


def _missing_values(row: L7Row, values: SecretFiles | None) -> Iterator[str]:
    """Yield what is wrong with secrets that headers are compared with."""
    named = {
        (match.secret_namespace or "default", match.secret_name)
        for rule in row.http
        for match in rule.header_matches
        if match.secret_name is not None and match.value is None
    }
    for namespace, name in sorted(named):
        if values is None:
            yield f"secret {namespace}/{name}: no folder of secrets is configured"
        elif values(namespace, name) is None:
            why = "there is no such file, or it is empty"
            yield f"secret {namespace}/{name}: {why}: the rule allows nothing"


def read_file(path: Path) -> "list[Certificate]":
    """Return the certificates of a PEM file, none if it cannot be read; OpenSSL says why then."""
    from cryptography import x509  # noqa: PLC0415 -- 0.1 s of imports, for those who have secrets

    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError):
        return []


def _names(certificate: "Certificate") -> Iterator[dict[str, str]]:
    """Yield the subject alternative names under Envoy's words for them."""
    from cryptography import x509  # noqa: PLC0415 -- as above

    kinds = {x509.DNSName: "dns", x509.UniformResourceIdentifier: "uri", x509.RFC822Name: "email"}
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):  # none, or extensions that cannot be read
        return
    for name in names:
        if isinstance(name, x509.IPAddress):
            yield {"ip_address": str(name.value)}
        elif type(name) in kinds:
            yield {kinds[type(name)]: name.value}


def _utc(at: datetime) -> str:
    """Write a time as Envoy's /certs does."""
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def inventory(snapshot: Snapshot, folder: Path | None) -> list[dict[str, object]]:
    """Return the certificates in use, in the form of GET /certs of Envoy."""
    found: list[dict[str, object]] = [
        {"ca_cert": _shown(authorities), "cert_chain": _shown(chain)}
        for chain, authorities in Certificates(folder).files(snapshot)
    ]
    return [row for row in found if row["ca_cert"] or row["cert_chain"]]


def _shown(path: Path | None) -> list[dict[str, object]]:
    return [
        {
            "path": str(path),
            "serial_number": f"{one.serial_number:x}",
            "subject_alt_names": list(_names(one)),
            "days_until_expiration": str(
                max(0, (one.not_valid_after_utc - datetime.now(UTC)).days)
            ),
            "valid_from": _utc(one.not_valid_before_utc),
            "expiration_time": _utc(one.not_valid_after_utc),
        }
        for one in ([] if path is None else read_file(path))
    ]
