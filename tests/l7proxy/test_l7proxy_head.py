"""Heads: accepted as a whole, refused with the first rule they break; h11 is the second opinion."""

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l7proxy.head import Progress, parse_request, parse_response, walk_lines
from l7proxy.limits import Limits
from l7proxy.refusals import RequestRefused, ResponseRefused

LIMITS = Limits()
START = b"GET /a HTTP/1.1\r\n"


def detail(data: bytes, **limits) -> tuple[int, str]:
    with pytest.raises(RequestRefused) as caught:
        parse_request(data, Limits(**limits))
    return caught.value.refusal.status, caught.value.refusal.detail


def test_head_is_read_in_the_order_received():
    head = parse_request(START + b"Host: s\r\nX-A:\t b c \r\nx-a:\r\n\r\n", LIMITS)
    assert (head.method, head.target, head.minor) == (b"GET", b"/a", 1)
    assert head.fields == [
        (b"host", b"Host", b"s"),
        (b"x-a", b"X-A", b"b c"),
        (b"x-a", b"x-a", b""),
    ]


BROKEN = [
    (b"GET  /a HTTP/1.1\r\n\r\n", 400, "http1.invalid_request_line"),
    (b"GET /a HTTP/1.1 \r\n\r\n", 400, "http1.invalid_request_line"),
    (b"GET /a\r\n\r\n", 400, "http1.invalid_request_line"),
    (b"GET\t/a\tHTTP/1.1\r\n\r\n", 400, "http1.invalid_request_line"),
    (b"G(T /a HTTP/1.1\r\n\r\n", 400, "http1.invalid_method"),
    (b" GET /a HTTP/1.1\r\n\r\n", 400, "http1.invalid_method"),
    (b"GET /\x01 HTTP/1.1\r\n\r\n", 400, "http1.invalid_url"),
    (b"GET /\ta HTTP/1.1\r\n\r\n", 400, "http1.invalid_url"),
    (b"GET /\xe9 HTTP/1.1\r\n\r\n", 400, "http1.invalid_url"),
    (b"GET /a HTTP/1.32\r\n\r\n", 400, "http1.invalid_version"),
    (b"GET /a http/1.1\r\n\r\n", 400, "http1.invalid_version"),
    (b"GET /a RTSP/1.0\r\n\r\n", 400, "http1.invalid_version"),
    (b"GET /a HTTP/1.2\r\n\r\n", 505, "http1.unsupported_version"),
    (b"PRI * HTTP/2.0\r\n\r\n", 505, "http1.unsupported_version"),
    (b"GET /a HTTP/1.1\n\r\n\r\n", 400, "http1.bare_line_feed"),
    (b"GET /a\rHTTP/1.1\r\n\r\n", 400, "http1.bare_carriage_return"),
    (b"\r\nGET /a HTTP/1.1\r\n\r\n", 400, "http1.invalid_characters"),
    (b"\x16\x03\x01\r\n\r\n", 400, "http1.invalid_characters"),
    (START + b"X : a\r\n\r\n", 400, "http1.invalid_header_name"),
    (START + b": a\r\n\r\n", 400, "http1.invalid_header_name"),
    (START + b"X\x00: a\r\n\r\n", 400, "http1.invalid_header_name"),
    (START + b"X a\r\n\r\n", 400, "http1.invalid_header_line"),
    (START + b" X: a\r\n\r\n", 400, "http1.obsolete_line_folding"),
    (START + b"X: a\r\n\tb\r\n\r\n", 400, "http1.obsolete_line_folding"),
    (START + b"X: a\x00\r\n\r\n", 400, "http1.invalid_characters"),
    (START + b"X: a\x7f\r\n\r\n", 400, "http1.invalid_characters"),
    (START + b"X: a\rY: b\r\n\r\n", 400, "http1.bare_carriage_return"),
    (START + b"X: a\nY: b\r\n\r\n", 400, "http1.bare_line_feed"),
    (START + b"X: a\r\n" * 101 + b"\r\n", 431, "http1.too_many_headers"),
    (START + b"X: " + b"a" * 61440 + b"\r\n\r\n", 431, "http1.headers_too_large"),
]


@pytest.mark.parametrize(("data", "status", "reason"), BROKEN)
def test_broken_head_is_refused_with_its_first_fault(data, status, reason):
    """RFC 9112 2.2, 2.3, 3, 5, 5.1, 5.2."""
    assert detail(data) == (status, reason)


def test_limits_allow_exactly_their_number():
    assert len(parse_request(START + b"X: a\r\n" * 100 + b"\r\n", LIMITS).fields) == 100
    fits = START + b"X: " + b"a" * (61440 - len(START) - 7) + b"\r\n\r\n"
    assert parse_request(fits, LIMITS).fields
    assert detail(fits[:-4] + b"a\r\n\r\n") == (431, "http1.headers_too_large")


PIECES = st.lists(
    st.sampled_from(
        [b"GET", b" ", b"/a", b"HTTP/1.1", b"\r\n", b"\n", b"\r", b"Host: s", b"X", b":", b"a",
         b"\t", b"\x00", b"\x80", b"GET / HTTP/1.1\r\n", b"Host: a\r\n", b"Content-Length: 1\r\n"]
    ),
    max_size=20,
).map(b"".join)  # fmt: skip


@given(PIECES | st.binary(max_size=60))
@settings(max_examples=300)
def test_walk_and_parser_agree_and_never_raise_anything_else(data):
    """A head that the pattern refuses has a fault that the walk over its lines names."""
    data += b"\r\n\r\n"
    data = data[: data.index(b"\r\n\r\n") + 4]
    try:
        parse_request(data, LIMITS)
    except RequestRefused as refused:
        assert refused.refusal.detail != "http1.codec_error"
    else:
        walk_lines(data, Progress(), LIMITS)


NAMES = st.sampled_from([b"Accept", b"X-Y", b"cookie", b"Content-Type"])
VALUES = st.text(
    st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=10
).map(lambda text: text.encode("latin-1"))  # fmt: skip


@given(
    st.sampled_from([b"GET", b"POST", b"M-SEARCH"]),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=20),
    st.lists(st.tuples(NAMES, VALUES), max_size=6),
    st.sampled_from([b"", b"Content-Length: 12\r\n", b"Transfer-Encoding: chunked\r\n"]),
)
def test_whatever_is_accepted_h11_reads_in_the_same_way(method, target, fields, framing):
    """The reference codec sees the same method, target, fields and framing."""
    data = b"%b %b HTTP/1.1\r\nHost: h\r\n" % (method, target.encode())
    data += b"".join(b"%b: %b\r\n" % field for field in fields) + framing + b"\r\n"
    try:
        head = parse_request(data, LIMITS)
    except RequestRefused:
        return
    reference = h11.Connection(h11.SERVER)
    reference.receive_data(data)
    request = reference.next_event()
    assert isinstance(request, h11.Request)
    assert (request.method, request.target) == (head.method, head.target)
    assert list(request.headers) == [(name, value) for name, _, value in head.fields]


def test_response_head_is_read():
    head = parse_response(b"HTTP/1.0 404 Not  F\xe9und\r\nX: y\r\n\r\n", LIMITS)
    assert head[:4] == (404, b"Not  F\xe9und", 0, [(b"x", b"X", b"y")])
    assert parse_response(b"HTTP/1.1 200\r\n\r\n", LIMITS).reason == b""


@pytest.mark.parametrize(
    "data",
    [b"HTTP/2 200 OK\r\n\r\n", b"HTTP/1.1 20 OK\r\n\r\n", b"HTTP/1.1 099 OK\r\n\r\n",
     b"HTTP/1.1 200 OK\n\r\n\r\n", b"HTTP/1.1 200 OK\r\nX : y\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nX: y\r\n z\r\n\r\n", b"HTTP/1.1 200 O\x00K\r\n\r\n",
     b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101 + b"\r\n"],
)  # fmt: skip
def test_response_head_that_clients_could_read_differently_is_refused(data):
    """RFC 9112 5.2: a proxy may answer 502."""
    with pytest.raises(ResponseRefused) as caught:
        parse_response(data, LIMITS)
    assert caught.value.refusal.status == 502
