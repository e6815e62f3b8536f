"""Properties of a whole client connection, over any bytes and any cut of them."""

# ruff: noqa: E501 - a message is one line

import h11
import msgspec
from http_transcript import Script, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from l7proxy.commands import (
    CloseClient,
    CloseUpstream,
    Log,
    OpenUpstream,
    SendClient,
    SendUpstream,
    ShutdownClient,
)

HOST = b"Host: s\r\n"
PIECES = st.lists(
    st.sampled_from(
        [
            b"GET /public/a HTTP/1.1\r\n" + HOST + b"\r\n",
            b"GET /public/../admin HTTP/1.1\r\n" + HOST + b"\r\n",
            b"GET /public/b HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc",
            b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc",
            b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            b"GET /public/c HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
            b"2;x=y\r\nde\r\n0\r\nX-T: 1\r\n\r\n",
            b"0\r\n\r\n",
            b"GET / HTTP/1.0\r\n" + HOST + b"\r\n",
            b"GET /public/a HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n",
            b"GET /public/a HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\n",
            b"GET /public/a HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
            b"GET /public/a HTTP/1.1\r\nHost: s\r\nX: a\r\n b\r\n\r\n",
            b"GET /a\r\n",
            b"\r\n",
            b"\n",
            b"\x00",
            b"G",
            HOST,
        ]
    )
    | st.binary(max_size=5),
    max_size=6,
)  # fmt: skip


class Played:
    """What came of a stream when the server accepts at once and answers complete requests."""

    def __init__(self, pieces) -> None:
        self.script = Script(snapshot())
        self.client = b""
        self.upstream = b""
        self.records = []
        self.end = ""
        self.server = None
        for piece in pieces:
            if piece and not self.end:
                self._apply(self.script.perform("client_data", piece))

    def _apply(self, commands) -> None:
        for command in commands:
            match command:
                case SendClient(data):
                    self.client += data
                case SendUpstream(data):
                    self.upstream += data
                    self.server.receive_data(data)
                    self._serve()
                case OpenUpstream():
                    self.server = h11.Connection(h11.SERVER)
                    self._apply(self.script.perform("upstream_opened"))
                case CloseUpstream():
                    self.upstream += b"|"
                case Log(record):
                    told = msgspec.structs.astuple(record)
                    self.records.append(told[0:1] + told[2:13])
                case ShutdownClient() | CloseClient():
                    self.end = "ended"

    def _serve(self) -> None:
        """Read what was sent with h11; every request must be one that the policy allows."""
        while True:
            event = self.server.next_event()
            if isinstance(event, h11.Request):
                assert event.method == b"GET"
                assert event.target == b"/" or event.target.startswith(b"/public/")
            elif isinstance(event, h11.EndOfMessage):
                response = h11.Response(status_code=200, headers=[("Content-Length", "2")])
                data = self.server.send(response) + self.server.send(h11.Data(b"ok"))
                self.server.send(h11.EndOfMessage())
                self.server.start_next_cycle()
                self._apply(self.script.perform("upstream_data", data))
                return
            elif event in (h11.NEED_DATA, h11.PAUSED):
                return


def requests_of(data: bytes):
    """The complete requests with their bodies that h11 reads in what was sent to the server.

    A request whose body broke may have been begun or not; it must not look complete.
    """
    seen = []
    request = []
    for connection in filter(None, data.split(b"|")):
        server = h11.Connection(h11.SERVER)
        server.receive_data(connection)
        while (event := server.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Request):
                request = [event.method, event.target, list(event.headers), b""]
            elif isinstance(event, h11.Data):
                request[3] += event.data
            elif isinstance(event, h11.EndOfMessage):
                seen.append(request)
                server.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
                server.send(h11.EndOfMessage())
                server.start_next_cycle()
    return seen


@given(PIECES, st.lists(st.integers(1, 60), max_size=40))
@settings(max_examples=100, deadline=None)
def test_cutting_the_clients_bytes_anywhere_changes_nothing(pieces, cuts):
    stream = b"".join(pieces)
    at, segments = 0, []
    for size in cuts:
        segments.append(stream[at : at + size])
        at += size
    segments.append(stream[at:])
    whole, cut, bytewise = (
        Played([stream]),
        Played(segments),
        Played([stream[i : i + 1] for i in range(len(stream))]),
    )
    for other in (cut, bytewise):
        assert other.client == whole.client
        assert [record[:6] for record in other.records] == [record[:6] for record in whole.records]
        assert requests_of(other.upstream) == requests_of(whole.upstream)
        assert other.end == whole.end


@given(PIECES)
@settings(max_examples=100, deadline=None)
def test_whatever_is_sent_to_the_client_h11_reads_as_responses(pieces):
    played = Played(pieces)
    statuses = []
    data = played.client
    while data:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="GET", target="/", headers=[("Host", "h")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:  # told to continue, and its body has not come
                assert data == b"HTTP/1.1 100 Continue\r\n\r\n"
                return
            if isinstance(event, h11.Response):
                statuses.append(event.status_code)
        data = client.trailing_data[0]
    assert len(statuses) <= len(played.records)
    assert set(statuses) <= {200, 400, 403, 505}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["client_data", "upstream_data", "client_ended", "client_lost", "upstream_opened",
                 "upstream_ended", "upstream_lost", "client_blocked", "upstream_blocked", "tick",
                 "policy_changed", "drain", "finish"]
            ),
            st.sampled_from(
                [b"GET /public/a HTTP/1.1\r\nHost: s\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"x",
                 b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxHTTP/1.1 ",
                 b"GET /public/a HTTP/1.1\r\nHost: s\r\nContent-Length: 2\r\n\r\n"]
            ),
            st.floats(0, 400),
        ),
        max_size=12,
    )
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_any_events_in_any_order_are_survived(events):
    """Nothing is raised, no state goes missing, and after the close there are no commands."""
    script = Script(snapshot())
    closed = False
    for name, data, wait_s in events:
        script.now += wait_s
        arguments = {"client_data": (data,), "upstream_data": (data,)}.get(name, ())
        if name.endswith("blocked"):
            arguments = (wait_s > 100,)
        commands = script.perform(name, *arguments)
        assert not (closed and commands)
        closed = closed or name == "client_lost" or any(
            isinstance(command, CloseClient) for command in commands
        )  # fmt: skip
        for command in commands:
            assert not (isinstance(command, Log) and "internal_error" in command.record.detail)
