"""The lean patterns and h11: what one reads, the other reads the same, or nothing passes."""

import h11
import pytest
from http_mutants import case
from http_transcript import Script, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from l7proxy import grammar
from l7proxy.framing import NO_BODY, UNTIL_CLOSE, Delimiter, Framing, FramingFault
from l7proxy.head import parse_request, parse_response
from l7proxy.limits import Limits
from l7proxy.reference import body_reader, check_request, check_response
from l7proxy.refusals import RequestRefused, ResponseRefused
from l7proxy.request import admit
from l7proxy.responses import admit_response

LIMITS = Limits()
NAMES = st.sampled_from(
    [b"Accept", b"X-Y", b"cookie", b"Te-X", b"TE", b"Te", b"Upgrade", b"Upgrade-Insecure-Requests",
     b"Connection", b"connectioN", b"Keep-Alive", b"Expect", b"EXPECT", b"Trailer",
     b"HTTP2-Settings", b"Proxy-Connection", b"Transfer-Encoding", b"transfer-encodinG",
     b"Content-Length", b"content-LENGTH", b"Host", b"X_Y", b"!odd"]
)  # fmt: skip
VALUES = st.sampled_from(
    [b"", b"a", b" a", b"  a\t", b"close", b" close", b" Keep-Alive", b" keep-alive ", b" upgrade",
     b" close, x-y", b"chunked", b" Chunked", b"gzip, chunked", b" 3", b" 03", b"+3", b" 3, 3",
     b"100-continue", b"trailers", b"websocket", b"\x80\xff", b"a\tb", b"0", b"x:y", b" h"]
)  # fmt: skip
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=5).map(
    lambda fields: b"".join(b"%b:%b\r\n" % field for field in fields)
)
EDITS = st.lists(
    st.tuples(st.integers(0, 400), st.sampled_from([b"", b" ", b"\t", b"\r", b"\n", b"\x00", b":",
                                                    b"a", b"\x80", b"\r\n", b"\r\n ", b"#"])),
    max_size=2,
)  # fmt: skip


def mutated(head, edits):
    """The head with a few bytes replaced by others; still one head."""
    for at, piece in edits:
        place = at % max(1, len(head) - 4)
        head = head[:place] + piece + head[place + 1 :]
    return head[: head.index(b"\r\n\r\n") + 4]


REQUESTS = st.builds(
    lambda method, target, version, fields, edits: mutated(
        b"%b %b HTTP/1.%b\r\nHost: h\r\n%b\r\n" % (method, target, version, fields), edits
    ),
    st.sampled_from([b"GET", b"POST", b"HEAD", b"OPTIONS", b"DELETE", b"get", b"M-SEARCH"]),
    st.sampled_from([b"/", b"/a?b=c", b"*", b"http://h/a", b"//a/../b", b"/a#b", b'/"', b"h:80"]),
    st.sampled_from([b"1", b"1", b"1", b"0", b"2"]),
    FIELDS,
    EDITS,
)
RESPONSES = st.builds(
    lambda version, status, reason, fields, edits: mutated(
        b"HTTP/1.%b %b%b\r\n%b\r\n" % (version, status, reason, fields), edits
    ),
    st.sampled_from([b"1", b"1", b"0"]),
    st.sampled_from([b"200", b"204", b"304", b"404", b"500", b"100", b"103", b"101", b"600"]),
    st.sampled_from([b"", b" ", b" OK", b" Not  F\xe9und", b" a\tb"]),
    FIELDS,
    EDITS,
)


@given(REQUESTS)
@settings(max_examples=300)
def test_whatever_request_the_lean_pattern_takes_h11_reads_the_same(data):
    """Method, target, fields, framing."""
    compare_request(data)


def heads_of_attacks(count):
    """The first head of each of the fuzzer's cases, and of its first answer."""
    for seed in range(count):
        made = case(seed)
        for data in (made.sent, *made.answers):
            end = data.find(b"\r\n\r\n") + 4
            if end >= 4:
                yield data[:end]


def test_whatever_head_of_an_attack_the_lean_patterns_take_h11_reads_the_same():
    lean_count = 0
    for data in heads_of_attacks(4000):
        lean_count += compare_request(data)
        lean_count += compare_response(data, b"GET")
        compare_response(data, b"HEAD")
    assert lean_count > 500


def compare_request(data) -> bool:
    """Whether the pattern took it and it was admitted."""
    lean = grammar.lean_request_head.fullmatch(data)
    if lean is None:
        return False
    strict = grammar.request_head.fullmatch(data)
    assert strict is not None
    assert strict.groups() == lean.groups()
    head = parse_request(data, LIMITS)
    assert head.raw == b""
    try:
        request = admit(head, LIMITS)
    except RequestRefused:
        return False
    check_request(head._replace(raw=data), request.framing)
    assert request.framing.delimiter is not Delimiter.CHUNKED
    assert not (request.upgrade or request.expects_continue)
    return True


@given(RESPONSES, st.sampled_from([b"GET", b"HEAD"]))
@settings(max_examples=300)
def test_whatever_response_the_lean_pattern_takes_h11_reads_the_same(data, method):
    compare_response(data, method)


def compare_response(data, method) -> bool:
    """As `compare_request`."""
    lean = grammar.lean_response_head.fullmatch(data)
    if lean is None:
        return False
    assert grammar.response_head.fullmatch(data).groups() == lean.groups()
    head = parse_response(data, LIMITS)
    try:
        response = admit_response(head, method, 1)
    except ResponseRefused:
        return False
    check_response(head._replace(raw=data), method, response.framing)
    assert response.framing.delimiter is not Delimiter.CHUNKED
    return True


@given(REQUESTS)
@settings(max_examples=300)
def test_whatever_request_is_admitted_h11_reads_the_same(data):
    """Lean or not; h11 is asked with a connection of its own here."""
    try:
        head = parse_request(data, LIMITS)
        request = admit(head, LIMITS)
    except RequestRefused:
        return
    assert bool(head.raw) is (request.reference is not None)
    theirs = h11.Connection(h11.SERVER)
    theirs.receive_data(data)
    event = theirs.next_event()
    assert (event.method, event.target) == (head.method, head.target)
    assert [name for name, _ in event.headers] == [name for name, _, _ in head.fields]


POST = b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "change",
    [{"method": b"PUT"}, {"target": b"/b"}, {"minor": 0}, {"fields": []},
     {"raw": POST.replace(b"chunked", b"chunked\r\nContent-Length: 3")},
     {"raw": POST.replace(b"chunked", b"gzip, chunked")}, {"raw": POST[:-2]}],
)  # fmt: skip
def test_request_that_h11_reads_differently_is_refused(change):
    """The two codecs never differ on purpose, so the difference is made here."""
    head = parse_request(POST, LIMITS)
    framing = admit(head, LIMITS).framing
    check_request(head, framing)
    with pytest.raises(RequestRefused) as caught:
        check_request(head._replace(**change), framing)
    assert caught.value.refusal.detail == "http1.codecs_disagree"


@pytest.mark.parametrize("framing", [NO_BODY, UNTIL_CLOSE, Framing(Delimiter.LENGTH, 3)])
def test_framing_that_h11_reads_differently_is_refused(framing):
    with pytest.raises(RequestRefused):
        check_request(parse_request(POST, LIMITS), framing)
    answer = parse_response(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", LIMITS)
    with pytest.raises(ResponseRefused):
        check_response(answer, b"GET", framing)


@pytest.mark.parametrize(
    ("data", "framing"),
    [(b"HTTP/1.0 200 OK\r\n\r\n", NO_BODY),
     (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\n", Framing(Delimiter.LENGTH, 4)),
     (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", NO_BODY)],
)  # fmt: skip
def test_response_that_h11_reads_differently_is_refused(data, framing):
    with pytest.raises(ResponseRefused) as caught:
        check_response(parse_response(data, LIMITS), b"GET", framing)
    assert caught.value.refusal.status == 502


def test_trailer_that_h11_refuses_ends_the_request():
    """Our reader drops trailers by their grammar; h11 also looks at framing fields in them."""
    Script(snapshot(rules=None, plain=True)).check(r"""
        >> client "POST /a HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n"
        << log request POST /a
        << open
        >> opened
        << upstream "POST /a HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n"
        >> client "2\r\nab\r\n0\r\nContent-Length: x\r\n\r\n"
        << log response POST /a 400 DPE http1.codecs_disagree
        << close-upstream reset
        << client "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 13\r\nConnection: close\r\n\r\nBad Request\r\n"
        << shutdown
    """)  # noqa: E501


@given(
    st.lists(st.binary(min_size=1, max_size=6), max_size=4),
    st.lists(st.integers(1, 9), max_size=20),
)
def test_chunks_cut_anywhere_are_decoded_alike(pieces, cuts):
    """h11's payload goes on, in step with our reader."""
    body = b"".join(b"%x;e=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    body += b"0\r\nX-T: 1\r\n\r\nrest"
    head = parse_request(POST, LIMITS)
    framing = admit(head, LIMITS).framing
    reader = body_reader(framing, LIMITS, check_request(head, framing))
    decoded = left = b""
    for size in [*cuts, len(body)]:
        payload, rest = reader.read(left + body[:size]) if not reader.done else (b"", body[:size])
        decoded, left, body = decoded + payload, b"", body[size:]
        if reader.done:
            left = rest
            break
    assert decoded == b"".join(pieces)
    assert left + body == b"rest"


def test_chunks_that_only_we_would_read_are_a_fault():
    head = parse_request(POST, LIMITS)
    framing = admit(head, LIMITS).framing
    theirs = check_request(head, framing)
    theirs.receive_data(b"1\r\n")  # h11 is one line ahead
    theirs.next_event()
    with pytest.raises(FramingFault):
        body_reader(framing, LIMITS, theirs).read(b"2\r\nab\r\n")
