"""The doors of Cloud City, a gRPC service, and the terminal that speaks to it.

    python -m lab.demo.doors serve
    python -m lab.demo.doors ADDRESS METHOD DOOR

Service and methods are those of Cilium's gRPC demo (cloudcity.DoorManager). Messages have one or
two fields, so their bytes are made and read here, without gRPC's library: a length-prefixed message
in an HTTP/2 stream, trailers with grpc-status (gRPC over HTTP/2, PROTOCOL-HTTP2.md; protobuf
encoding: varint field 1, length-delimited field 2).
"""

import socket
import sys
import threading

import h2.config
import h2.connection
import h2.events

PORT = 50051
SERVICE = "cloudcity.DoorManager"
STATUS = {"0": "OK", "5": "NOT_FOUND", "7": "PERMISSION_DENIED", "12": "UNIMPLEMENTED"}

_NAMES = {1: "Spaceport Door #1", 2: "Carbonite Freezing Chamber #2"}
_ANSWERS = {
    "GetName": lambda door: _NAMES.get(door, f"Door #{door}"),
    "GetLocation": lambda door: f"level {door}, sector 7",
    "RequestMaintenance": lambda door: f"a droid is on its way to door {door}",
    "SetAccessCode": lambda door: f"door {door} has a new access code",
}
_TIMEOUT_S = 30.0


def message(number: int, text: str = "") -> bytes:
    """Return a framed message: field 1 a number below 128, field 2 a text below 128 bytes."""
    data = bytes((0x08, number))
    if text:
        data += bytes((0x12, len(text))) + text.encode()
    return b"\0" + len(data).to_bytes(4, "big") + data


def fields(framed: bytes) -> tuple[int, str]:
    """Read what `message` wrote."""
    data = framed[5:]
    number = data[1] if len(data) > 1 else 0
    return number, data[4:].decode()


class _Peer:
    """One end of an HTTP/2 connection."""

    def __init__(self, sock: socket.socket, *, client: bool) -> None:
        config = h2.config.H2Configuration(client_side=client, header_encoding="utf-8")
        self.codec = h2.connection.H2Connection(config)
        self.codec.initiate_connection()
        self._sock = sock
        self.flush()

    def flush(self) -> None:
        self._sock.sendall(self.codec.data_to_send())

    def events(self) -> list[h2.events.Event] | None:
        """Wait for bytes, and return what they complete; None at the end of the connection."""
        data = self._sock.recv(65536)
        return self.codec.receive_data(data) if data else None


def call(address: str, method: str, door: int) -> str:
    """Ask, and return what the terminal shows."""
    with socket.create_connection((address, PORT), _TIMEOUT_S) as sock:
        peer = _Peer(sock, client=True)
        head = [
            (":method", "POST"), (":scheme", "http"), (":authority", f"{address}:{PORT}"),
            (":path", f"/{SERVICE}/{method}"), ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]  # fmt: skip
        peer.codec.send_headers(1, head)
        peer.codec.send_data(1, message(door), end_stream=True)
        peer.flush()
        said: dict[str, str] = {}
        body = b""
        while (events := peer.events()) is not None:
            for event in events:
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    said |= {str(name): str(value) for name, value in event.headers or ()}
                elif isinstance(event, h2.events.DataReceived):
                    body += event.data or b""
                elif isinstance(event, h2.events.StreamEnded):
                    status = said.get("grpc-status", "?")
                    text = fields(body)[1] if body else said.get("grpc-message", "")
                    return f"grpc-status {status} ({STATUS.get(status, 'no answer')}): {text}"
            peer.flush()
    return "grpc-status ? (no answer): the connection was closed"


def _serve(sock: socket.socket) -> None:
    """Answer on one connection."""
    sock.settimeout(60.0)
    with sock:
        peer = _Peer(sock, client=False)
        paths: dict[int, str] = {}
        bodies: dict[int, bytes] = {}
        while (events := peer.events()) is not None:
            for event in events:
                if isinstance(event, h2.events.RequestReceived):
                    said = {str(name): str(value) for name, value in event.headers or ()}
                    paths[event.stream_id or 0] = said[":path"]
                elif isinstance(event, h2.events.DataReceived):
                    number = event.stream_id or 0
                    bodies[number] = bodies.get(number, b"") + (event.data or b"")
                elif isinstance(event, h2.events.StreamEnded):
                    number = event.stream_id or 0
                    _answer(peer, number, paths.pop(number), bodies.pop(number, b""))
            peer.flush()


def _answer(peer: _Peer, number: int, path: str, body: bytes) -> None:
    method = path.removeprefix(f"/{SERVICE}/")
    print(f"doors: {method} was called", flush=True)
    head = [(":status", "200"), ("content-type", "application/grpc")]
    answer = _ANSWERS.get(method)
    if answer is None:
        peer.codec.send_headers(number, [*head, ("grpc-status", "12")], end_stream=True)
        return
    peer.codec.send_headers(number, head)
    door = fields(body)[0]
    peer.codec.send_data(number, message(door, answer(door)))
    peer.codec.send_headers(number, [("grpc-status", "0")], end_stream=True)


def serve() -> None:
    """Answer every connection until SIGTERM."""
    with socket.create_server(("", PORT)) as listener:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=_serve, args=(sock,), daemon=True).start()


def main(arguments: list[str]) -> int:
    """Serve, or call a method; the exit status is 0 if the call was answered with OK."""
    if arguments == ["serve"]:
        serve()
    address, method, door = arguments
    said = call(address, method, int(door))
    print(said)
    return 0 if said.startswith("grpc-status 0 ") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
