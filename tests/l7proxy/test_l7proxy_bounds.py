"""Every bound is a setting: a smaller value refuses what the usual one lets through."""

import pytest
from http2_peers import H2Server, Peers
from http_transcript import Script, snapshot

from firewall.policy.snapshot import HttpRuleRow
from l7proxy.commands import CloseClient, Count, Log, OpenUpstream, SendClient
from l7proxy.metrics import Metrics
from l7proxy.shares import Shares

RULES = (HttpRuleRow(method="POST|GET", path="/public/.*"),)
GET = b"GET /public/abcdefgh HTTP/1.1\r\nHost: s\r\n\r\n"
POST = b"POST /public/a HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
HINT = b"HTTP/1.1 103 Early Hints\r\n\r\n"
UPSTREAM = "upstream_reset_before_response_started{protocol_error}"

MESSAGES = [
    ("head_bytes", 30, GET, b"", "http1.headers_too_large"),
    ("target_bytes", 10, GET, b"", "request_uri_too_long"),
    (
        "header_count",
        1,
        GET.replace(b"\r\n\r\n", b"\r\nA: b\r\n\r\n"),
        b"",
        "http1.too_many_headers",
    ),
    (
        "connection_token_count",
        1,
        GET.replace(b"\r\n\r\n", b"\r\nConnection: a, b\r\n\r\n"),
        b"",
        "connection_header_rejected",
    ),
    ("chunk_line_bytes", 5, POST + b"1;abcdef\r\nx\r\n0\r\n\r\n", b"", "http1.invalid_chunk"),
    (
        "chunk_extension_bytes",
        5,
        POST + b"1;abc\r\nx\r\n1;abc\r\nx\r\n0\r\n\r\n",
        b"",
        "http1.invalid_chunk",
    ),
    ("trailer_bytes", 5, POST + b"0\r\nA: bcdef\r\n\r\n", b"", "http1.invalid_trailer"),
    ("accept_http_10", False, GET.replace(b"1.1", b"1.0"), b"", "low_version"),
    ("response_head_bytes", 20, GET, OK, "upstream_response_headers_too_large"),
    ("informational_count", 1, GET, HINT + HINT + OK, UPSTREAM),
]


def played(sent, answer, **limits):
    script = Script(snapshot(rules=RULES), **limits)
    script.perform("client_data", sent)
    script.perform("upstream_opened")
    if answer:
        script.perform("upstream_data", answer)
    return [one.record for one in script.commands if isinstance(one, Log)]


@pytest.mark.parametrize(
    ("setting", "small", "sent", "answer", "detail"), MESSAGES, ids=[row[0] for row in MESSAGES]
)
def test_a_message_is_bounded_by_a_setting_and_counted(setting, small, sent, answer, detail):
    assert detail not in [record.detail for record in played(sent, answer)]
    (*_, record) = played(sent, answer, **{setting: small})
    assert record.detail == detail
    counted = Metrics()
    counted.observe(record)
    labels = [row.get("labels") for row in counted.rows() if row.get("value")]
    assert {"detail": detail.partition("{")[0]} in labels


@pytest.mark.parametrize(
    ("setting", "sent", "detail"),
    [
        ("response_timeout_s", GET, "response_timeout"),
        ("body_timeout_s", POST, "request_body_timeout"),
        ("request_timeout_s", POST, "request_overall_timeout"),
        ("head_timeout_s", GET[:-2], "request_header_timeout"),
    ],
)
def test_a_wait_is_bounded_by_a_setting(setting, sent, detail):
    script = Script(snapshot(rules=RULES), **{setting: 4.0})
    script.perform("client_data", sent)
    script.perform("upstream_opened")
    script.now += 3.9
    assert script.perform("tick") == []
    script.now += 0.1
    assert detail in [one.record.detail for one in script.perform("tick") if isinstance(one, Log)]


def test_the_rate_of_a_body_is_a_setting():
    for rate, cut in ((50, False), (2000, True)):
        script = Script(snapshot(rules=RULES), body_rate_bytes=rate, body_timeout_s=5.0)
        script.perform("client_data", POST)
        script.perform("upstream_opened")
        for _ in range(10):
            script.now += 1
            script.perform("tick")
            script.perform("client_data", b"64\r\n" + bytes(100) + b"\r\n")
        details = [one.record.detail for one in script.commands if isinstance(one, Log)]
        assert ("request_body_timeout" in details) is cut


def test_idle_and_lingering_connections_last_as_long_as_is_set():
    script = Script(snapshot(rules=RULES), idle_timeout_s=4.0, linger_s=3.0)
    script.perform("client_data", GET.replace(b"GET", b"PUT"))
    script.now += 3.9
    assert script.perform("tick") == []
    script.now += 0.1
    assert Count("http_downstream_cx_idle_timeout") in script.perform("tick")
    script.now += 2.9
    assert script.perform("tick") == []
    script.now += 0.1
    assert script.perform("tick") == [CloseClient(reset=False)]


@pytest.mark.parametrize("again", [True, False])
def test_whether_a_lost_request_is_sent_again_is_a_setting(again):
    script = Script(snapshot(rules=RULES), retry_idle_close=again)
    script.perform("client_data", GET)
    script.perform("upstream_opened")
    script.perform("upstream_data", OK)
    script.perform("client_data", GET)
    asked = script.perform("upstream_lost")
    assert any(isinstance(one, OpenUpstream) for one in asked) is again
    assert any(isinstance(one, SendClient) and b" 502 " in one.data for one in asked) is not again


# --- HTTP/2 --------------------------------------------------------------------------------------


def frame(kind, stream=0, payload=b"", flags=0):
    return (
        len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
    )


PING = frame(6, 0, bytes(8))
PRIORITY = frame(2, 1, b"\0\0\0\0\x10")
WINDOW = frame(8, 0, b"\0\0\0\1")
BLOCK = b"\x82\x86\x41\x01s"  # :method GET, :scheme http, :authority s; no :path, so no request
FLOODS = [
    ("h2_control_count", 3, PING * 4, "http2.inbound_control_frames_flood"),
    ("h2_priority_count", 1, PRIORITY * 3, "http2.inbound_priority_frames_flood"),
    ("h2_window_update_count", 1, WINDOW * 3, "http2.inbound_window_update_frames_flood"),
    ("h2_empty_count", 2, frame(0, 1) * 3, "http2.inbound_empty_frames_flood"),
    (
        "h2_continuation_count",
        1,
        frame(1, 3, BLOCK[:1]) + frame(9, 3, BLOCK[1:2]) + frame(9, 3, BLOCK[2:], 4),
        "http2.continuation_flood",
    ),
]


@pytest.mark.parametrize(
    ("setting", "small", "sent", "detail"), FLOODS, ids=[row[0] for row in FLOODS]
)
def test_what_floods_is_a_setting(setting, small, sent, detail):
    for limits, flooded in (({}, False), ({setting: small}, True)):
        peers = Peers(source=snapshot(rules=RULES), **limits)
        peers.request(1, method=b"POST", end=False).flush()
        peers.raw(sent)
        assert (detail in peers.details) is flooded


def test_a_flood_is_one_within_a_time():
    peers = Peers(h2_control_count=3, h2_window_s=2.0)
    peers.flush()
    for _ in range(3):
        peers.raw(PING * 2)
        peers.now += 2.0
    assert not peers.details


def test_streams_and_window_are_announced_as_set():
    peers = Peers(h2_stream_count=7, h2_connection_bytes=200_000)
    peers.request(1).flush()
    assert peers.client.remote_settings.max_concurrent_streams == 7
    assert peers.client.outbound_flow_control_window == 200_000


def test_a_larger_window_of_a_stream_takes_more_of_a_body_at_once_at_both_ends():
    peers = Peers(H2Server, h2_stream_bytes=300_000, h2_upstream="prefer",
                  source=snapshot((HttpRuleRow(),)))  # fmt: skip
    peers.request(1, method=b"PUT", end=False).flush()
    assert peers.client.local_flow_control_window(1) == 300_000
    (server,) = peers.servers.values()
    assert server.codec.remote_settings.initial_window_size == 300_000
    body = b"x" * 200_000
    for at in range(0, len(body), 16_384):
        peers.client.send_data(1, body[at : at + 16_384], end_stream=at + 16_384 >= len(body))
    peers.flush()
    assert [request[3] for request in peers.seen] == [body]
    assert peers.status(1) == 200


def test_one_source_does_not_take_the_room_of_others():
    shares = Shares(4, 2)
    assert [shares.take(b"a") for _ in range(3)] == [True, True, False]
    assert [shares.take(b"b") for _ in range(2)] == [True, True]
    assert not shares.take(b"c")
    shares.give_back(b"a")
    assert not shares.take(b"b")
    assert shares.take(b"c")
    assert shares.count == 4


def test_what_is_counted_without_room_is_given_back_as_well():
    shares = Shares(1, 1)
    for _ in range(2):
        shares.add(b"a")
    shares.give_back(b"a")
    assert not shares.has_room(b"a")
    shares.give_back(b"a")
    assert shares.has_room(b"a")
