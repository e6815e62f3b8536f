"""The hangar of the demo's chapter on headers: tells each ship what it was told.

Port 80; any GET is answered with the request's fields whose names begin with X-, one a line.
"""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

PORT = 80


class Hangar(BaseHTTPRequestHandler):
    """Answers one ship."""

    protocol_version = "HTTP/1.1"
    server_version = "hangar"
    timeout: ClassVar[float] = 60.0  # seconds that a silent ship may hold a dock

    def do_GET(self) -> None:
        """Say what came."""
        fields = [f"{name}: {value}" for name, value in self.headers.items() if name[:2] in "X-x-"]
        told = [field for field in fields if not field.lower().startswith("x-request-id")]
        body = "".join(f"the hangar was told {field}\n" for field in told or ["nothing"]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        """Log on standard output, unbuffered."""
        print(f"{self.client_address[0]} {format % args}", flush=True)


def main() -> int:
    """Serve until SIGTERM."""
    with ThreadingHTTPServer(("", PORT), Hangar) as server:
        server.daemon_threads = True
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
