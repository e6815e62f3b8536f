"""An HTTP/2 client and servers around a `Multiplex`, all without sockets.

`Peers` plays the world: it performs the commands on servers of HTTP/1 (h11) or HTTP/2 (h2), feeds
what they say back, and keeps every request that a server has seen, every record, and for each
stream what the client got.
"""

from collections import deque

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import h11
from http_transcript import CLIENT, SERVER, snapshot, written

from l7proxy.commands import (
    CloseClient,
    CloseUpstream,
    ConnectFailure,
    Log,
    OpenUpstream,
    SendClient,
    SendUpstream,
    ShutdownClient,
)
from l7proxy.limits import Limits
from l7proxy.multiplex import Multiplex
from l7proxy.plan import Policy
from l7proxy.policy import ConnectionJudge


class H1Server:
    """Answers every complete request with its path, or with `answer` if that is given."""

    def __init__(self, seen, answer=None) -> None:
        self.codec = h11.Connection(h11.SERVER)
        self.seen = seen
        self.answer = answer
        self.raw = b""
        self._request = None

    def receive(self, data: bytes) -> bytes:
        self.raw += data
        self.codec.receive_data(data)
        said = b""
        while (event := self.codec.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Request):
                self._request = [event.method, event.target, list(event.headers), b""]
                self.seen.append(self._request)
            elif isinstance(event, h11.Data):
                self._request[3] += event.data
            elif isinstance(event, h11.EndOfMessage):
                said += self._respond()
        return said

    def _respond(self) -> bytes:
        if self.answer is not None:
            return self.answer
        body = self._request[1]
        head = h11.Response(status_code=200, headers=[("Content-Length", str(len(body)))])
        said = self.codec.send(head)
        if self._request[0] != b"HEAD":
            said += self.codec.send(h11.Data(body))
        said += self.codec.send(h11.EndOfMessage())
        self.codec.start_next_cycle()
        return said


class H2Server:
    """Answers every complete request with its path in HTTP/2, then trailers."""

    def __init__(self, seen, **settings) -> None:
        self.codec = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding=None)
        )
        if settings:
            self.codec.local_settings = h2.settings.Settings(
                client=False,
                initial_values={h2.settings.SettingCodes[k]: v for k, v in settings.items()},
            )
        self.codec.initiate_connection()
        self.seen = seen
        self.requests = {}

    def receive(self, data: bytes) -> bytes:
        for event in self.codec.receive_data(data):
            match event:
                case h2.events.RequestReceived():
                    fields = dict(event.headers)
                    request = [fields[b":method"], fields[b":path"], event.headers, b""]
                    self.requests[event.stream_id] = request
                    self.seen.append(request)
                case h2.events.DataReceived():
                    self.requests[event.stream_id][3] += event.data
                    self.codec.acknowledge_received_data(
                        event.flow_controlled_length, event.stream_id
                    )
                case h2.events.StreamEnded():
                    self._respond(event.stream_id)
        return self.codec.data_to_send()

    def _respond(self, number) -> None:
        self.codec.send_headers(number, [(b":status", b"200")])
        self.codec.send_data(number, self.requests[number][1])
        self.codec.send_headers(number, [(b"grpc-status", b"0")], end_stream=True)


class Peers:
    """A client, the multiplex, and servers made by `server(seen)` for each connection."""

    def __init__(self, server=H1Server, source=None, client_settings=None, **limits) -> None:
        self.policy = Policy()
        self.policy.install(snapshot() if source is None else source)
        self.limits = Limits(**({"request_id": False, "log_headers": ()} | limits))
        self.now = 1000.0
        judge = ConnectionJudge(self.policy, CLIENT, SERVER, 80)
        self.core = Multiplex(judge, self.limits, lambda: "id-1", self.now)
        self.client = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=True, header_encoding=None, validate_outbound_headers=False
            )
        )
        if client_settings:
            self.client.local_settings = h2.settings.Settings(
                client=True,
                initial_values={h2.settings.SettingCodes[k]: v for k, v in client_settings.items()},
            )
        self.client.initiate_connection()
        self.server = server
        self.servers = {}
        self.seen = []
        self.records = []
        self.commands = []
        self.answers = {}
        self.goaway = None
        self.end = ""
        self.refuse = False
        self._queue = deque()
        self._performing = False

    # --- what the client does --------------------------------------------------------------------

    def request(self, number, path=b"/public/a", *extra, method=b"GET", end=True, **pseudo):
        fields = {
            b":method": method, b":scheme": b"http", b":path": path, b":authority": b"s",
            **{f":{name}".encode(): value for name, value in pseudo.items()},
        }  # fmt: skip
        headers = [field for field in fields.items() if field[1] is not None]
        self.client.send_headers(number, [*headers, *extra], end_stream=end)
        return self

    def flush(self):
        """Let the multiplex have what the client has said."""
        return self.raw(self.client.data_to_send())

    def raw(self, data: bytes):
        self.perform("client_data", data)
        return self

    def perform(self, event, *arguments):
        """Tell the multiplex one thing and do what it asks for."""
        self._apply(getattr(self.core, event)(*arguments[:1], self.now, *arguments[1:]))

    def tick(self, seconds: float):
        self.now += seconds
        self._apply(self.core.tick(self.now))

    def _apply(self, commands) -> None:
        """In order, as the shell does: what a command causes comes after those at hand."""
        self._queue += commands
        if self._performing:
            return
        self._performing = True
        try:
            while self._queue:
                self._do(self._queue.popleft())
        finally:
            self._performing = False

    def _do(self, command) -> None:
        assert self.end != "closed", command
        self.commands.append(written(command))
        match command:
            case SendClient(data):
                self._receive(data)
            case OpenUpstream(link):
                self._open(link)
            case SendUpstream(data, link):
                said = self.servers[link].receive(data)
                if said:
                    self._apply(self.core.upstream_data(said, self.now, link))
            case CloseUpstream(_, link):
                self.servers.pop(link, None)
            case Log(record):
                self.records.append(record)
            case ShutdownClient():
                self.end = "shutdown"
            case CloseClient():
                self.end = "closed"

    def _open(self, link) -> None:
        if self.refuse:
            self._apply(self.core.upstream_failed(ConnectFailure.REFUSED, self.now, link))
            return
        self.servers[link] = self.server(self.seen)
        self._apply(self.core.upstream_opened(self.now, link))

    def _receive(self, data: bytes) -> None:
        graceful = data.find(b"\x00\x00\x08\x07\x00\x00\x00\x00\x00")
        if graceful >= 0 and not any(data[graceful + 13 : graceful + 17]):
            # h2 would close with the first GOAWAY; a client waits for its streams.
            self.goaway = 0
            data = data[:graceful] + data[graceful + 17 :]
        for event in self.client.receive_data(data):
            number = getattr(event, "stream_id", None)
            answer = self.answers.setdefault(number, {}) if number else {}
            match event:
                case h2.events.ResponseReceived():
                    answer["head"] = dict(event.headers)
                    answer["status"] = int(answer["head"][b":status"])
                case h2.events.InformationalResponseReceived():
                    answer["interim"] = dict(event.headers)
                case h2.events.DataReceived():
                    answer["body"] = answer.get("body", b"") + event.data
                case h2.events.TrailersReceived():
                    answer["trailers"] = dict(event.headers)
                case h2.events.StreamEnded():
                    answer["ended"] = True
                case h2.events.StreamReset():
                    answer["reset"] = int(event.error_code)
                case h2.events.ConnectionTerminated():
                    self.goaway = int(event.error_code)

    # --- what came of it -------------------------------------------------------------------------

    def status(self, number) -> int:
        return self.answers.get(number, {}).get("status", 0)

    @property
    def details(self) -> list[str]:
        return [record.detail for record in self.records]
