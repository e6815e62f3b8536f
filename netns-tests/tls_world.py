"""Client a, node with a proxy worker, server b, and TLS between them on port 443."""

import asyncio
import socket
import ssl
import threading
from contextlib import contextmanager, suppress

import msgspec
from l7proxy_live import Live, snapshot
from traffic import DEADLINE_S

from conntrack.address import parse_address
from firewall.policy.snapshot import L7Row, TlsContextRow
from policytest.authority import Authority

PORT = 443
NAME = "api.example"
INSIDE = TlsContextRow("web", "inside")
"""What the proxy shows to clients."""
OUTSIDE = TlsContextRow("web", "outside")
"""What the proxy trusts of servers."""


class TlsWorld:
    """`l7` are the rows that the server's ingress has at the port.

    Attributes:
        public: signs servers' certificates; the proxy trusts it by the secret `outside`.
        private: signs the proxy's; the client trusts it.
    """

    def __init__(self, lab, folder, *l7, options=(), families=(socket.AF_INET,), egress=()) -> None:
        self.lab = lab(a="app=a", b="app=b")
        self.client, self.server = self.lab.hosts["a"], self.lab.hosts["b"]
        self.public, self.private = Authority("public"), Authority("private")
        self.secrets = folder / "secrets"
        self.private.secret(self.secrets / "web" / "inside", NAME, "other.example")
        self.public.secret(self.secrets / "web" / "outside", ca=True)
        self.trusted = folder / "trusted.pem"
        self.trusted.write_bytes(self.public.certificate + self.private.certificate)
        self.folder = folder
        self.revision = 1
        source = self.snapshot(1, *l7, egress=egress)
        options = ("--secrets-dir", self.secrets, *options)
        self.live = Live(self.lab.node, folder, *options, source=source)
        for family in families:
            self.live.redirect(self.server.address(family), PORT)

    def snapshot(self, revision, *l7, egress=()):
        """The snapshot with these rows, one entry each."""
        made = snapshot(
            revision=revision,
            port=PORT,
            egress=() if egress else None,
            clients=tuple(map(parse_address, (self.client.address4, self.client.address6))),
            servers=tuple(map(parse_address, (self.server.address4, self.server.address6))),
        )
        replace = msgspec.structs.replace

        def rows(direction, numbers):
            entry = direction.entries[0]
            return replace(direction, entries=tuple(replace(entry, l7=n) for n in numbers))

        client, server = made.policies
        if egress:
            numbers = range(len(l7), len(l7) + len(egress))
            client = replace(client, egress=rows(client.egress, numbers))
        server = replace(server, ingress=rows(server.ingress, range(len(l7))))
        return replace(made, policies=(client, server), l7=(*l7, *egress))

    def announce(self, *l7, egress=()):
        """Put the next snapshot in force; the events seen meanwhile."""
        self.revision += 1
        return asyncio.run(self.live.announce(self.snapshot(self.revision, *l7, egress=egress)))

    def client_context(self, *protocols) -> ssl.SSLContext:
        """What a client trusts, and offers by ALPN."""
        context = ssl.create_default_context(cafile=self.trusted)
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context

    def connect(self, family=socket.AF_INET):
        return self.client.connect(self.server.address(family), PORT)

    def curl(self, url, *options):
        """`curl` at the client; names are the server's; (exit status, what it wrote)."""
        address = self.server.address4
        done = self.client.run(
            ["curl", "-sS", "--max-time", DEADLINE_S, "--cacert", self.trusted, *options,
             "--connect-to", f"::{address}:{PORT}", "-w", "\n%{http_code} %{http_version}", url]
        )  # fmt: skip
        return done.returncode, done.stdout

    @contextmanager
    def serving(
        self, *names, tls=True, family=socket.AF_INET, protocols=("http/1.1",), days=(-1, 30),
        **options
    ):  # fmt: skip
        """A server for these names at the port; yields the list of what it got."""
        context = None
        if tls:
            folder = self.folder / "server"
            self.public.secret(folder, *names, days=days)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
            context.set_alpn_protocols(list(protocols))
            for name, value in options.items():
                setattr(context, name, value)
        server = TlsServer(self.server.listen(PORT, family=family), context)
        try:
            yield server
        finally:
            server.close()

    def lines(self):
        """The lines of the access log."""
        return self.live.access_log.read_text(encoding="ascii").splitlines()


class TlsServer:
    """Answers every request on every connection with 200 and what it was asked.

    Attributes:
        heads: of the requests that came.
        names: server names that clients asked for, None = none.
        accepted: number of TCP connections.
    """

    ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"

    def __init__(self, listener, context) -> None:
        self.heads: list[bytes] = []
        self.names: list[str | None] = []
        self.peers: list[str] = []
        self.answer = self.ANSWER
        self.notifies = True
        self._listener = listener
        self._context = context
        if context is not None:
            context.sni_callback = lambda _side, name, _context: self.names.append(name)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def accepted(self) -> int:
        return len(self.peers)

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self._listener.accept()
            except OSError:
                return
            self.peers.append(peer[0])
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection) -> None:
        with suppress(OSError):
            connection.settimeout(DEADLINE_S)
            if self._context is not None:
                connection = self._context.wrap_socket(
                    connection, server_side=True, suppress_ragged_eofs=False
                )
            data = b""
            while more := connection.recv(65536):
                data += more
                if not data[:1].isalpha():  # TLS, where clear text is meant
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    break
                while b"\r\n\r\n" in data:
                    head, _, data = data.partition(b"\r\n\r\n")
                    self.heads.append(head)
                    connection.sendall(self.answer)
                    if b"Content-Length" not in self.answer:
                        if self.notifies and self._context is not None:
                            connection.unwrap()
                        connection.close()
                        return
        with suppress(OSError):
            connection.close()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(DEADLINE_S)


def names_row(*names) -> L7Row:
    """`serverNames` alone."""
    return L7Row("tls", server_names=names)


def inside_row(*rules, originate=OUTSIDE, names=(), terminate=INSIDE) -> L7Row:
    """http rules inside TLS."""
    return L7Row(
        "http",
        http=rules,
        server_names=names,
        terminating_tls=terminate,
        originating_tls=originate,
    )
