"""Heads that were read before."""

import pytest

from l7proxy import heads as module
from l7proxy.head import parse_response
from l7proxy.heads import Heads
from l7proxy.limits import Limits
from l7proxy.refusals import RequestRefused
from l7proxy.responses import admit_response

LIMITS = Limits()
GET = b"GET /public/a HTTP/1.1\r\nHost: s\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"


def remembered(raw, method=b"GET", minor=1):
    heads = Heads(LIMITS)
    heads.remember(raw, method, minor, admit_response(parse_response(raw, LIMITS), method, minor))
    return heads


def test_same_bytes_are_read_once():
    heads = Heads(LIMITS)
    assert heads.request(GET) is heads.request(bytes(bytearray(GET)))


@pytest.mark.parametrize(
    "raw",
    [
        b"POST /a HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /a HTTP/1.0\r\nHost: s\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: s\r\nX: " + b"y" * 2048 + b"\r\n\r\n",
    ],
    ids=["h11 goes on with its body", "not lean", "too long"],
)
def test_a_head_is_read_anew_if(raw):
    heads = Heads(LIMITS)
    assert heads.request(raw) is not heads.request(raw)


def test_what_is_refused_is_refused_again_with_its_head():
    heads = Heads(LIMITS)
    for _ in range(2):
        with pytest.raises(RequestRefused) as caught:
            heads.request(b"GET /a#b HTTP/1.1\r\nHost: s\r\n\r\n")
        assert caught.value.head.target == b"/a#b"


def test_a_response_to_head_is_another_than_to_get():
    heads = remembered(OK)
    assert heads.response(OK, b"GET", 1).response.framing.length == 2
    assert heads.response(OK, b"HEAD", 1) is None
    assert heads.response(OK, b"GET", 0) is None


def test_a_client_that_leaves_is_told_so():
    known = remembered(OK).response(OK, b"GET", 1)
    assert b"Connection" not in known.kept
    assert b"\r\nConnection: close\r\n\r\n" in known.closing


def test_a_response_that_ends_with_the_connection_is_not_kept():
    until_close = b"HTTP/1.1 200 OK\r\n\r\n"
    assert remembered(until_close, minor=0).response(until_close, b"GET", 0) is None


def test_memory_is_bounded():
    heads = Heads(LIMITS)
    for number in range(3 * module._COUNT):
        heads.request(b"GET /%d HTTP/1.1\r\nHost: s\r\n\r\n" % number)
    assert len(heads._requests) <= module._COUNT
