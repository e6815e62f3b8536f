"""The deathstar: an HTTP server with a thermal exhaust port, and what restarts it.

    GET  /v1/                  who it is and what it offers
    POST /v1/request-landing   "Ship landed"
    PUT  /v1/exhaust-port      503 with a panic, and two seconds later the process dies of it

A supervisor holds the listening socket and forks the server, so that a new one accepts what came
while the old one was dying: what the kubelet does for the real one, without the gap.

Behaviour: the `starwars` image of Cilium's demo.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

PORT = 80

DYING_S = 2.0
"""From the shot to the explosion."""

EXPLODED = 2
"""Exit code of a process that panicked, as Go's runtime has it."""

_LISTEN_BACKLOG = 128

PANIC = """Panic: deathstar exploded

goroutine 1 [running]:
main.HandleGarbage(0x2080c3f50, 0x2, 0x4, 0x425c0, 0x5, 0xa)
        /code/src/github.com/empire/deathstar/
        temp/main.go:9 +0x64
main.main()
        /code/src/github.com/empire/deathstar/
        temp/main.go:5 +0x85
"""
"""What a user of Cilium's demo knows as the sign that the shot went through."""

API = {
    "GET": {"/v1/": "who answers, and this list"},
    "POST": {"/v1/request-landing": "ask for a place in the hangar"},
    "PUT": {"/v1/exhaust-port": "not for public use"},
}


def describe() -> str:
    """What GET /v1/ answers: JSON, one line per field."""
    station = {
        "name": "Death Star",
        "hostname": socket.gethostname(),
        "model": "DS-1 Orbital Battle Station",
        "armament": ["1 superlaser", "turbolasers", "tractor beams"],
        "hyperdrive": "class 4",
        "api": [f"{method} {path}: {text}" for method, all_ in API.items()
                for path, text in all_.items()],
    }  # fmt: skip
    return json.dumps(station, indent=2) + "\n"


def explode() -> None:
    """Die at once, as a panic does: no handler runs, connections end with the process."""
    os._exit(EXPLODED)


class Station(BaseHTTPRequestHandler):
    """Answers one ship."""

    protocol_version = "HTTP/1.1"
    server_version = "deathstar"
    timeout: ClassVar[float] = 60.0  # seconds that a silent ship may hold a dock

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        path = self.path.partition("?")[0]
        match self.command, path:
            case "GET" | "HEAD", "/v1/" | "/v1":
                self._answer(200, describe())
            case "POST", "/v1/request-landing":
                self._answer(200, "Ship landed\n")
            case "PUT", "/v1/exhaust-port":
                self._answer(503, PANIC)
                threading.Timer(DYING_S, explode).start()
            case _:
                self._answer(404, f"{self.command} {path}: no such thing on this station\n")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _handle  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        """Log on standard output, unbuffered."""
        print(f"{self.client_address[0]} {format % args}", flush=True)


def serve(listener: socket.socket) -> None:
    """Answer on `listener` until the process dies."""
    server = ThreadingHTTPServer(("", 0), Station, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.daemon_threads = True
    server.serve_forever()


def main() -> int:
    """Keep one server process alive until SIGTERM."""
    with socket.create_server(
        ("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_LISTEN_BACKLOG
    ) as listener:
        while True:
            child = os.fork()
            if child == 0:
                serve(listener)
                os._exit(0)
            print(f"deathstar: process {child} is operational", flush=True)
            # Killing what is already gone is no accident worth a traceback.
            signal.signal(signal.SIGTERM, lambda *_, child=child: _end(child))
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            print(f"deathstar: process {child} died with exit {code}, restarting", flush=True)


def _end(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
