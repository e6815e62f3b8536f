"""Keys and certificates for TLS in a lab: whatever secrets policies name, and all servers.

One authority signs everything. A secret that a policy names for TLS is made with a certificate, its
key and that authority, under the names of items that the policy says; so what a policy asks for is
there, and the proxy and the servers trust each other. Whether certificates are right is no question
of policy: clients of a lab do not verify them.
"""

import ssl
from functools import cached_property
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile

from firewall.policy.compile import make_l7_row
from firewall.policy.snapshot import TlsContextRow
from policytest.authority import Authority
from policytest.case import Case


class Keys:
    """The secrets of a lab, in a folder in the shape of `proxy.secrets_dir`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: set[TlsContextRow] = set()
        self._contexts: dict[str, ssl.SSLContext] = {}
        folder.mkdir()

    @cached_property
    def _authority(self) -> Authority:
        return Authority("policy tests")

    @cached_property
    def _pair(self) -> tuple[bytes, bytes]:
        return self._authority.issue("proxy.example")

    @cached_property
    def client_context(self) -> ssl.SSLContext:
        """What clients of the lab use; they have a certificate for proxies that want one."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self._show(context, "client.example")
        return context

    def provide(self, case: Case) -> None:
        """Make the secrets that the policies of a case name."""
        sources = [*case.sources, *(source for step in case.steps for source in step.apply)]
        objects = chain.from_iterable(source.objects for source in sources)
        for entry in chain.from_iterable(one.entries for one in objects):
            row = make_l7_row(entry)
            for context in () if row is None else (row.terminating_tls, row.originating_tls):
                if context is not None and context not in self._made:
                    self._made.add(context)
                    self._write(context)

    def _write(self, row: TlsContextRow) -> None:
        folder = self.folder / row.secret_namespace / row.secret_name
        folder.mkdir(parents=True, exist_ok=True)
        certificate, key = self._pair
        for item, data in (
            (row.certificate or "tls.crt", certificate),
            (row.private_key or "tls.key", key),
            (row.trusted_ca or "ca.crt", self._authority.certificate),
        ):
            (folder / item).write_bytes(data)

    def server_context(self, name: str) -> ssl.SSLContext:
        """Return what a server shows that is asked for a name, or at an address."""
        context = self._contexts.get(name)
        if context is None:
            context = self._contexts[name] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._show(context, name)
        return context

    def _show(self, context: ssl.SSLContext, name: str) -> None:
        certificate, key = self._authority.issue(name)
        with NamedTemporaryFile(dir=self.folder) as file:  # OpenSSL takes files only
            file.write(certificate + key)
            file.flush()
            context.load_cert_chain(file.name)
