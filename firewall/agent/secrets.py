"""Secrets that policies name: those that are missing or broken, and the certificates in use.

What depends on a missing secret stays closed.

Said when a policy is applied or validated; the proxy looks again with each snapshot, and what it
finds stands in the status (Cilium: a missing secret denies, and only the proxy's log says so).
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from firewall.policy.compile import make_l7_row
from firewall.policy.model import PolicyObject
from firewall.policy.problem import Problem
from firewall.policy.snapshot import L7Row, Snapshot
from l7proxy.certificates import Certificates
from l7proxy.secrets import SecretFiles
from l7proxy.x509 import Certificate, CertificateTextError, read_certificates

_DAY_S = 86_400


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
                if one.valid_until < time.time():
                    said = f"{path}: a certificate is valid no longer, since {utc(one.valid_until)}"
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
            yield f"secret {namespace}/{name}: there is no such file: the rule allows nothing"


def read_file(path: Path) -> list[Certificate]:
    """Return the certificates of a PEM file, none if it cannot be read; OpenSSL says why then."""
    try:
        return read_certificates(path.read_bytes())
    except (OSError, CertificateTextError):
        return []


def utc(seconds: int) -> str:
    """Return a time as Envoy's /certs writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


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
            "serial_number": one.serial,
            "subject_alt_names": [{kind: value} for kind, value in one.names],
            "days_until_expiration": str(max(0, int(one.valid_until - time.time()) // _DAY_S)),
            "valid_from": utc(one.valid_from),
            "expiration_time": utc(one.valid_until),
        }
        for one in ([] if path is None else read_file(path))
    ]
