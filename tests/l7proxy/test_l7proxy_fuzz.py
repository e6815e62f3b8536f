"""Thousands of hostile clients and servers against the core; the same ones meet a live proxy in
netns-tests/test_l7proxy_fuzz.py. FUZZ_SEED and FUZZ_CASES choose others and more of them."""

import os

import pytest
from http_answers import stream_faults
from http_mutants import case, shrunk
from http_observer import Observer, paths
from http_sent import asked, unasked
from http_world import World

from l7proxy.heads import Heads
from l7proxy.limits import Limits

FIRST = int(os.environ.get("FUZZ_SEED", "1"))
COUNT = int(os.environ.get("FUZZ_CASES", "3000"))
BATCH = 500


@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, BATCH))
def test_no_server_is_sent_what_the_policy_denies_under_any_reading(first):
    for seed in range(first, first + BATCH):
        played = case(seed)
        faults = World(played).faults
        if faults:
            small = shrunk(played, lambda one: bool(World(one).faults))
            pytest.fail(f"seed {seed}: {World(small).faults[:3]}\n{small}")


def test_heads_that_were_read_before_change_nothing():
    """What clients and servers get is the same when nothing is remembered."""
    for seed in range(FIRST, FIRST + BATCH):
        remembered, fresh = World(case(seed)), World(case(seed), Heads(Limits()))
        assert remembered.client == fresh.client
        assert [server.raw for server in remembered.servers] == [
            server.raw for server in fresh.servers
        ]


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"GET /admin HTTP/1.1\r\nHost: a\r\n\r\n", "not allowed"),
        (b"GET /public/..;/admin HTTP/1.1\r\nHost: a\r\n\r\n", "not allowed"),
        (b"GET /public/%252e%252e/admin HTTP/1.1\r\nHost: a\r\n\r\n", "not allowed"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "not one Host"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: y\nZ: a\r\n\r\n", "field line"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
         "two framings"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n", "field line"),
        (b"POST /upload/a HTTP/1.1\r\nHost: other\r\n\r\n", "not allowed"),
        (b"GET /role HTTP/1.1\r\nHost: a\r\nX-Role: user\r\nX_Role: admin\r\n\r\n", "not allowed"),
    ],
)  # fmt: skip
def test_the_observer_sees_what_it_is_there_for(sent, why):
    observer = Observer(bytearray(sent))
    assert why in " ".join(observer.faults())


def test_the_observer_is_content_with_plain_requests():
    plain = b"GET /public/a HTTP/1.1\r\nHost: a\r\nX-Request-Id: i\r\n\r\n"
    body = b"PUT /upload/a HTTP/1.1\r\nHost: svc.local\r\nTransfer-Encoding: chunked\r\n\r\n"
    observer = Observer(bytearray(plain + body + b"1\r\nx\r\n0\r\n\r\n" + plain))
    assert observer.faults() == []
    assert [seen.body for seen in observer.complete()] == [b"", b"x", b""]
    assert observer.complete() == []


def test_a_target_has_the_paths_that_servers_make_of_it():
    assert b"/admin" in paths(b"/public/%2e%2e%2fadmin")
    assert b"/admin" in paths(b"/public/..;x/admin?y")
    assert paths(b"/public/a") == {b"/public/a"}


WEBSOCKET = (
    b"GET /public/a HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
)
CHUNKED = b"PUT /upload/a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
GET = b"GET /public/a HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "count"),
    [
        (GET + GET, 2),
        (b"\r\n" + GET, 1),
        (WEBSOCKET + GET, 1),
        (GET.replace(b"1.1", b"1.0") + GET, 1),
        (CHUNKED + b"0\r\n\r\n" + GET, 2),
        (CHUNKED + b"1;a\r\nx\r\n0\r\nX: y\r\n\r\n" + GET, 2),
        (CHUNKED + b"+1\r\nx\r\n0\r\n\r\n" + GET, 1),
        (GET.replace(b"Host", b"Connection: close\r\nHost") + GET, 1),
        (GET.replace(b"Host: a", b"Host: a\nX: y") + GET, 0),
        (GET.replace(b"Host: a", b"Host: a\r\nHost: a") + GET, 0),
    ],
)
def test_a_client_asked_for_what_it_said_by_the_letter(sent, count):
    assert len(asked(sent)) == count


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (GET, GET + GET.replace(b"a HTTP", b"b HTTP")),  # invented
        (GET, GET.replace(b"\r\n\r\n", b"\r\nX: y\r\n\r\n")),  # a field more
        (CHUNKED + b"+1\r\nx\r\n0\r\n\r\n", CHUNKED + b"1\r\nx\r\n0\r\n\r\n"),  # repaired
        (CHUNKED + b"1\r\nx\r\n0\r\n\r\n", CHUNKED + b"1\r\ny\r\n0\r\n\r\n"),
    ],
)
def test_what_nobody_asked_for_is_seen(sent, received):
    assert unasked(sent, [Observer(bytearray(received))])


def frame(kind, flags, stream, payload=b""):
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
    return head + payload


SETTINGS, OK = frame(4, 0, 0), b"\x88"
LENGTH_3 = OK + b"\x0f\x0d\x013"


def test_the_reader_is_content_with_whole_answers():
    answers = frame(1, 4, 1, LENGTH_3) + frame(0, 1, 1, b"abc") + frame(1, 5, 3, OK)
    assert stream_faults(SETTINGS + answers + frame(0, 0, 5)[:4]) == []


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        (frame(1, 5, 1, OK) * 2, "after the end"),
        (frame(1, 4, 1, OK) * 2, "a second head"),
        (frame(1, 4, 1, OK) + frame(3, 0, 1, bytes(4)) + frame(0, 0, 1), "after the end"),
        (frame(1, 4, 1, LENGTH_3) + frame(0, 1, 1, b"ab"), "2 bytes of 3"),
        (frame(0, 0, 1, b"x"), "before a status"),
        (frame(1, 4, 2, OK), "on stream 2"),
        (frame(1, 0, 1, OK) + frame(0, 0, 1), "in the middle"),
        (frame(5, 4, 1, bytes(4) + OK), "frame 5"),
        (frame(1, 4, 1, OK + b"\x40\x01A\x01b"), "field b'A'"),
        (frame(1, 4, 1, OK + b"\x40\x01a\x03b\r\n"), "field b'a'"),
        (frame(1, 4, 1, b"\x40\x07:status\x03101"), "or a switch"),
    ],
)
def test_the_reader_of_answers_sees_what_it_is_there_for(frames, why):
    assert why in " ".join(stream_faults(SETTINGS + frames))


@pytest.mark.parametrize(
    ("spelling", "switches"),
    [
        (b"Sec-WebSocket-Accept: {accept}", True),
        (b"Sec-WebSocket-ACcept:{accept}", True),
        (b"sec-websocket-accept: \t{accept} ", True),
        (b"Sec-WebSocket-Accept: x{accept}", False),
        (b"X-Accept: {accept}", False),
    ],
)
def test_a_server_switches_however_its_101_is_spelled(spelling, switches):
    handshake = WEBSOCKET.replace(b"\r\n\r\n", b"\r\nSec-WebSocket-Key: k\r\n\r\n")
    server = Observer(bytearray(handshake))
    head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
    server.answer(server.complete()[0], head + spelling + b"\r\n\r\n")
    assert (server.switched_at is not None) is switches
