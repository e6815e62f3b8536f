"""TLS contexts made of secrets: `<folder>/<namespace>/<name>/{tls.crt,tls.key,ca.crt}`.

The shape in which Kubernetes mounts a secret as a volume. A context of a rule names the three items
or has the usual names (Cilium, pkg/policy/api/l4.go):

    terminatingTLS    certificate and key must be there; a trusted CA that is named: clients must
                      have a certificate that it signed
    originatingTLS    trusted CA: named, or `ca.crt` if it exists, else the system's; certificate
                      and key, if they exist, are shown to servers that ask

At least TLS 1.2, no renegotiation, no session tickets and so no early data. Files are looked at
when a snapshot is loaded and when one of them is another (`renewal`); a context is made again only
in that case. What is missing or wrong makes no context: its connections end.
"""

import contextlib
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from firewall.policy.snapshot import Snapshot, TlsContextRow
from l7proxy.renewal import News
from l7proxy.secrets import is_name, stamp_of

_ITEM = re.compile(r"[-._a-zA-Z0-9]{1,253}")
"""Key of a Kubernetes secret (its volume has the files under these names)."""

HTTP_PROTOCOLS = ("h2", "http/1.1")
"""ALPN (RFC 7301 6, RFC 9113 3.1): what is enforced, and nothing else is offered."""

_CERTIFICATE, _KEY, _CA = "tls.crt", "tls.key", "ca.crt"
"""Kubernetes' names (type kubernetes.io/tls); Cilium's defaults."""


class CertificateError(Exception):
    """A secret cannot serve; the text names the file and what is wrong with it."""


class _Files(NamedTuple):
    """The items of a secret that count; None: it does without."""

    certificate: Path | None
    key: Path | None
    ca: Path | None

    def stamps(self) -> tuple[object, ...]:
        """Return what changes when one of the files does."""
        return tuple((path, stamp_of(path)) for path in self if path is not None)


_Key = tuple[TlsContextRow, bool, tuple[str, ...]]
_State = tuple[object, ...] | str
"""Stamps of a secret's files, or why it has none."""


class Certificates:
    """Makes and keeps TLS contexts.

    Args:
        folder: of the secrets; None: there are none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._kept: dict[_Key, tuple[tuple[object, ...], ssl.SSLContext]] = {}
        self._known: dict[_Key, ssl.SSLContext | CertificateError] = {}
        self._states: dict[_Key, _State] = {}

    def towards_clients(self, row: TlsContextRow, *, http: bool) -> ssl.SSLContext:
        """Return the context that ends TLS of clients.

        Raises:
            CertificateError: the secret cannot serve.
        """
        return self._get(row, HTTP_PROTOCOLS if http else (), server_side=True)

    def towards_servers(self, row: TlsContextRow, protocols: tuple[str, ...]) -> ssl.SSLContext:
        """Return the context that begins TLS with servers; `protocols` are offered (ALPN).

        Raises:
            CertificateError: the secret cannot serve.
        """
        return self._get(row, protocols, server_side=False)

    def install(self, snapshot: Snapshot) -> list[str]:
        """Look at the files again; return what is wrong with the contexts of a snapshot."""
        self._known.clear()
        self._states.clear()
        problems: dict[str, None] = {}
        for row in snapshot.l7:
            for context, server_side in ((row.terminating_tls, True), (row.originating_tls, False)):
                if context is None:
                    continue
                protocols = HTTP_PROTOCOLS if row.kind == "http" else ()
                try:
                    self._get(context, protocols, server_side=server_side)
                except CertificateError as error:
                    problems[str(error)] = None
        current = {key[0] for key in self._known}
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] in current}
        return list(problems)

    def news(self) -> News:
        """Return the secrets whose files are not those that were read, with their states now."""
        return tuple(
            (key, state)
            for key, known in self._states.items()
            if (state := self._state(key)) != known
        )

    def _state(self, key: _Key) -> _State:
        try:
            return self._files(key[0], server_side=key[1]).stamps()
        except (CertificateError, OSError) as error:
            return str(error)

    def files(self, snapshot: Snapshot) -> Iterator[tuple[Path | None, Path | None]]:
        """Yield (certificates, authorities) of each secret that serves, as paths of PEM files."""
        seen = set()
        for row in snapshot.l7:
            for context, server_side in ((row.terminating_tls, True), (row.originating_tls, False)):
                if context is None or (context, server_side) in seen:
                    continue
                seen.add((context, server_side))
                with contextlib.suppress(CertificateError):
                    found = self._files(context, server_side=server_side)
                    yield found.certificate, found.ca

    def _get(
        self, row: TlsContextRow, protocols: tuple[str, ...], *, server_side: bool
    ) -> ssl.SSLContext:
        key = row, server_side, protocols
        found = self._known.get(key)
        if found is None:
            self._states[key] = self._state(key)
            try:
                found = self._make(key)
            except CertificateError as error:
                found = error
            self._known[key] = found
        if isinstance(found, CertificateError):
            raise found
        return found

    def _make(self, key: _Key) -> ssl.SSLContext:
        row, server_side, protocols = key
        try:
            files = self._files(row, server_side=server_side)
            stamps = files.stamps()
            kept = self._kept.get(key)
            if kept is not None and kept[0] == stamps:
                return kept[1]
            context = _server_context(files) if server_side else _client_context(files)
        except OSError as error:  # of the ssl module too
            text = error.strerror or str(error)
            raise CertificateError(f"{self._place(row)}: {text}") from None
        if protocols:
            context.set_alpn_protocols(list(protocols))
        self._kept[key] = stamps, context
        return context

    def _place(self, row: TlsContextRow) -> str:
        return f"secret {row.secret_namespace}/{row.secret_name}"

    def _files(self, row: TlsContextRow, *, server_side: bool) -> _Files:
        place = self._place(row)
        if self._folder is None:
            raise CertificateError(f"{place}: no folder of secrets is configured")
        if not (is_name(row.secret_namespace) and is_name(row.secret_name)):
            raise CertificateError(f"{place}: no name of a secret")
        folder = self._folder / row.secret_namespace / row.secret_name
        if not folder.is_dir():
            raise CertificateError(f"{place}: there is no folder {folder}")

        def item(named: str, usual: str, *, must: bool) -> Path | None:
            name = named or usual
            path = folder / name
            if not _ITEM.fullmatch(name) or name in (".", ".."):
                raise CertificateError(f"{place}: {name!r} is no name of an item")
            if path.is_file():
                return path
            if named or must:
                raise CertificateError(f"{place}: there is no {path}")
            return None

        certificate = item(row.certificate, _CERTIFICATE, must=server_side)
        key = item(row.private_key, _KEY, must=certificate is not None)
        ca = None if server_side and not row.trusted_ca else item(row.trusted_ca, _CA, must=False)
        return _Files(certificate, key if certificate is not None else None, ca)


def _server_context(files: _Files) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    _finish(context, files)
    if files.ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _client_context(files: _Files) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificates and names
    context.hostname_checks_common_name = False  # RFC 9525 6.3: subjectAltName alone
    context.options |= ssl.OP_NO_RENEGOTIATION
    if files.ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    _finish(context, files)
    return context


def _finish(context: ssl.SSLContext, files: _Files) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if files.certificate is not None:
        # An encrypted key must not make OpenSSL ask at the terminal.
        context.load_cert_chain(files.certificate, files.key, password=lambda: b"")
    if files.ca is not None:
        context.load_verify_locations(files.ca)
