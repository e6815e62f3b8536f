"""The holonet: a name server and web servers at many addresses, outside of everybody's control."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lab.nameserver import Zone, serve

RESOLVER = "203.0.113.53"
"""Where names are asked for; the topology says the same."""


class _Page(BaseHTTPRequestHandler):
    """Says which name was asked for, and where."""

    def do_GET(self) -> None:
        address = self.connection.getsockname()[0]
        body = f"{self.headers.get('Host', '')} is at {address}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> int:
    """Serve until killed."""
    serve(Zone(Path(__file__).with_name("names.zone")), RESOLVER, 53)
    web = ThreadingHTTPServer(("", 80), _Page)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    sys.stdout.write("operational\n")
    sys.stdout.flush()
    threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
