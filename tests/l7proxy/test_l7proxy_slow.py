"""Slowloris in every form: whoever drips, or does not read, is given up within a bounded time.

Each row says what a client sends at once, what it drips then (one byte each `every_s` seconds, over
and over), and by when and why the connection, or the stream, must have been given up.
"""

# ruff: noqa: E501 - a message is one line

import pytest
from http2_peers import H2Server, Peers
from http_transcript import Script, snapshot, written

from firewall.policy.snapshot import HttpRuleRow
from l7proxy.commands import CloseClient, Log, ShutdownClient
from l7proxy.frames import PREFACE
from l7proxy.metrics import Metrics

POST = b"POST /public/a HTTP/1.1\r\nHost: s\r\n"
RULES = (HttpRuleRow(method="POST|GET", path="/public/.*"),)
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
PUT_DENIED = b"PUT /public/a HTTP/1.1\r\nHost: s\r\nContent-Length: 9999\r\n\r\n"

LENGTH = POST + b"Content-Length: 9999\r\n\r\n"
HEAD_LATE, BODY_LATE = "request_header_timeout", "request_body_timeout"
DRIPS = [
    ("request line", b"", b"G", 1, 11, HEAD_LATE),
    ("head", POST, b"X: y\r\n", 1, 11, HEAD_LATE),
    ("empty line first", b"\r\n", b"", 1, 11, HEAD_LATE),
    ("body of known length", LENGTH, b"x", 5, 66, BODY_LATE),
    ("body that never comes", LENGTH, b"", 5, 61, BODY_LATE),
    ("chunk size", CHUNKED, b"0", 20, 81, BODY_LATE),
    ("chunk extension", CHUNKED + b"1", b";a=b", 5, 66, BODY_LATE),
    ("chunks of one byte", CHUNKED, b"1\r\nx\r\n", 5, 66, BODY_LATE),
    ("trailers", CHUNKED + b"0\r\n", b"X: y\r\n", 5, 66, BODY_LATE),
    ("body of a denied request", PUT_DENIED, b"x", 5, 66, ""),
    ("nothing at all", b"", b"", 5, 16, ""),
    ("between requests", b"PUT /x HTTP/1.1\r\nHost: s\r\n\r\n", b"", 50, 301, ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("at_once", "drip", "every_s", "latest_s", "detail"),
    [row[1:] for row in DRIPS], ids=[row[0] for row in DRIPS],
)  # fmt: skip
def test_a_client_that_drips_is_given_up(at_once, drip, every_s, latest_s, detail):
    script = Script(snapshot(rules=RULES))
    begun = script.now
    if at_once:
        script.perform("client_data", at_once)
    script.perform("upstream_opened")
    before = len(script.commands)
    count = 0
    while not any(isinstance(one, CloseClient | ShutdownClient) for one in script.commands):
        assert script.now - begun < latest_s, "still served"
        script.now += every_s
        script.perform("tick")
        if drip:
            script.perform("client_data", drip[count % len(drip) :][:1])
            count += 1
    records = [one.record for one in script.commands[before:] if isinstance(one, Log)]
    assert [record.detail for record in records] == ([detail] if detail else [])
    if detail:
        counted = Metrics()
        counted.observe(records[0])
        named = {row["name"] for row in counted.rows() if row.get("value")}
        kind = "header_timeout" if "header" in detail else "timeout"
        assert f"http_downstream_rq_{kind}_total" in named
        assert records[0].flag == "SI"


def test_an_upload_in_time_is_not_cut_however_long_it_takes():
    script = Script(snapshot(rules=RULES))
    script.perform("client_data", POST + b"Content-Length: 99999\r\n\r\n")
    script.perform("upstream_opened")
    for _ in range(1000):
        script.now += 1
        script.perform("tick")
        script.perform("client_data", b"x" * 60)
    assert script.exchange.deadline > script.now
    assert [written(one) for one in script.commands if isinstance(one, Log)] == [
        "log request POST /public/a"
    ]


def test_a_whole_request_may_be_bounded():
    script = Script(snapshot(rules=RULES), request_timeout_s=30.0)
    script.perform("client_data", POST + b"Content-Length: 99999\r\n\r\n")
    script.perform("upstream_opened")
    for _ in range(29):
        script.now += 1
        script.perform("tick")
        script.perform("client_data", b"x" * 600)
    script.check(r"""
        >> wait 1
        << log response POST /public/a 408 SI request_overall_timeout
        << close-upstream reset
        << client "HTTP/1.1 408 Request Timeout\r\nContent-Type: text/plain\r\nContent-Length: 17\r\nConnection: close\r\n\r\nRequest Timeout\r\n"
        << shutdown
    """)


def test_a_server_that_takes_its_time_is_not_the_clients_fault():
    """While the server does not read, nothing is asked of the client; then it begins anew."""
    script = Script(snapshot(rules=RULES))
    script.perform("client_data", POST + b"Content-Length: 9999\r\n\r\n")
    script.perform("upstream_opened")
    script.perform("upstream_blocked", True)
    script.now += 600
    assert script.perform("tick") == []
    script.perform("upstream_blocked", False)
    script.now += 59
    assert script.perform("tick") == []


def test_an_answer_that_nobody_reads_ends_with_rst():
    script = Script(snapshot(rules=RULES))
    script.perform("client_data", b"GET /public/a HTTP/1.1\r\nHost: s\r\n\r\n")
    script.perform("upstream_opened")
    script.perform("upstream_data", b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\nx")
    script.check("""
        >> client-blocked yes
        << pause-client
        << pause-upstream
        >> wait 299
        >> wait 1
        << log response GET /public/a 200 SI client_flush_timeout
        << close-upstream reset
        << close reset
    """)


# --- HTTP/2 --------------------------------------------------------------------------------------


def _given_up(peers, latest_s, every_s, drip):
    begun = peers.now
    while not peers.end and not any(answer.get("ended") for answer in peers.answers.values()):
        assert peers.now - begun < latest_s, "still served"
        peers.tick(every_s)
        if not peers.end and not any(answer.get("ended") for answer in peers.answers.values()):
            drip()
    return peers.details


FRAME = b"\x00\x10\x00\x00\x00\x00\x00\x00\x01"
STREAM_DRIPS = [
    ("preface", PREFACE[:20], HEAD_LATE),
    ("frame", PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + FRAME[:4], HEAD_LATE),
    ("header block", PREFACE + b"\x00\x00\x01\x01\x00\x00\x00\x00\x01\x82", HEAD_LATE),
    ("inside a frame of data", PREFACE + FRAME, HEAD_LATE),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sent", "detail"), [row[1:] for row in STREAM_DRIPS], ids=[row[0] for row in STREAM_DRIPS]
)
def test_frames_that_drip_end_the_connection(sent, detail):
    peers = Peers()
    peers.raw(sent)
    assert detail in _given_up(peers, 12, 1, lambda: None)


def test_settings_that_never_come_are_no_reason_to_wait():
    """RFC 9113 3.4 wants them first; a connection without a stream is an idle one."""
    peers = Peers()
    peers.raw(PREFACE)
    peers.tick(301.0)
    assert peers.end
    assert not peers.details


def test_a_stream_whose_body_drips_is_answered_408():
    peers = Peers(source=snapshot(rules=RULES))
    peers.request(1, method=b"POST", end=False).flush()

    def drip():
        peers.client.send_data(1, b"x")
        peers.flush()

    assert "request_body_timeout" in _given_up(peers, 80, 5, drip)
    assert peers.status(1) == 408


def test_a_grpc_stream_may_say_little_for_long():
    """Messages come when there is something to say; `stream_idle_timeout_s` without any ends it."""
    peers = Peers(H2Server, source=snapshot(rules=RULES))
    peers.request(
        1, b"/public/a", (b"content-type", b"application/grpc"), method=b"POST", end=False
    )
    peers.flush()
    for _ in range(20):
        peers.tick(100.0)
        peers.client.send_data(1, b"x")
        peers.flush()
    assert not peers.answers
    peers.tick(301.0)
    assert peers.details[-1] == "request_body_timeout"


def test_a_grpc_stream_is_bounded_as_a_whole_where_requests_are():
    """Who calls itself gRPC is not slower for that."""
    peers = Peers(H2Server, source=snapshot(rules=RULES), request_timeout_s=250.0)
    grpc = (b"content-type", b"application/grpc")
    peers.request(1, b"/public/a", grpc, method=b"POST", end=False).flush()
    for _ in range(2):
        peers.tick(100.0)
        peers.client.send_data(1, b"x")
        peers.flush()
    peers.tick(50.0)
    assert peers.details[-1] == "request_overall_timeout"
