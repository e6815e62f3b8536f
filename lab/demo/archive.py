"""The archive: an HTTPS server with two names, and the certificates of its world.

    python -m lab.demo.archive FOLDER

Two authorities sign what is needed, with the `openssl` command: the public one the server, the
empire's own one what bartizan shows to those whose TLS it ends. In FOLDER:

    trusted.pem                     both authorities: what the empire's droids trust
    secrets/empire/archive/         tls.crt and tls.key that the empire's authority signed
    secrets/empire/public/          ca.crt: whom bartizan trusts of servers
"""

import ssl
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

NAMES = ("archive.empire.example", "leaks.alliance.example")

PORT = 443

_EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_DAYS = "2"


class Archive(BaseHTTPRequestHandler):
    """Answers who asks, by the path."""

    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = f"{self.command} {self.path}: done\n".encode()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        """Log on standard output, unbuffered."""
        print(f"{self.client_address[0]} {format % args}", flush=True)


def make_authority(folder: Path, name: str) -> None:
    """Write `folder/name.pem` and `.key`: an authority that signs itself."""
    _openssl(
        "req", "-x509", *_EC, "-days", _DAYS, "-subj", f"/CN={name}",
        "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem",
    )  # fmt: skip


def sign(folder: Path, authority: str, target: Path) -> None:
    """Write `target/tls.crt` and `tls.key`: a certificate for `NAMES`."""
    target.mkdir(parents=True)
    names = ",".join(f"DNS:{name}" for name in NAMES)
    _openssl(
        "req", "-x509", *_EC, "-days", _DAYS, "-subj", "/CN=archive",
        "-CA", folder / f"{authority}.pem", "-CAkey", folder / f"{authority}.key",
        "-addext", f"subjectAltName={names}", "-addext", "basicConstraints=critical,CA:FALSE",
        "-keyout", target / "tls.key", "-out", target / "tls.crt",
    )  # fmt: skip


def _openssl(*argv: str | Path) -> None:
    subprocess.run(["openssl", *map(str, argv)], check=True, capture_output=True)


def prepare(folder: Path) -> None:
    """Write every file; `trusted.pem` last, so that who sees it sees all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("public", "empire"):
        make_authority(folder, name)
    sign(folder, "public", folder / "server")
    sign(folder, "empire", folder / "secrets" / "empire" / "archive")
    public = folder / "secrets" / "empire" / "public"
    public.mkdir(parents=True)
    (public / "ca.crt").write_bytes((folder / "public.pem").read_bytes())
    both = [(folder / f"{name}.pem").read_bytes() for name in ("public", "empire")]
    (folder / "trusted.pem").write_bytes(b"".join(both))


def main(folder: Path) -> None:
    """Make the certificates and serve until the process ends."""
    server = ThreadingHTTPServer(("", PORT), Archive)
    prepare(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server" / "tls.crt", folder / "server" / "tls.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    print(f"archive: serving {' and '.join(NAMES)}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
