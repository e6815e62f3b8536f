"""Secrets that policies name and that are missing or broken: what depends on them stays closed.

Said when a policy is applied or validated; the proxy looks again with each snapshot, and what it
finds stands in the status (Cilium: a missing secret denies, and only the proxy's log says so).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from firewall.policy.compile import make_l7_row
from firewall.policy.model import PolicyObject
from firewall.policy.problem import Problem
from firewall.policy.snapshot import L7Row, Snapshot
from l7proxy.certificates import Certificates
from l7proxy.secrets import SecretFiles


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
