"""Where bodies end; h11 is the second opinion on chunks."""

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l7proxy.framing import (
    CHUNKED,
    NO_BODY,
    UNTIL_CLOSE,
    ChunkedReader,
    Delimiter,
    Framing,
    FramingFault,
    LengthReader,
    chunk,
    request_framing,
    response_framing,
)
from l7proxy.limits import Limits
from l7proxy.refusals import RequestRefused, ResponseRefused

LIMITS = Limits()


@pytest.mark.parametrize(
    ("lengths", "codings", "minor", "framing"),
    [
        ([], [], 1, NO_BODY),
        ([b"0"], [], 1, Framing(Delimiter.LENGTH, 0)),
        ([b"0047"], [], 0, Framing(Delimiter.LENGTH, 47)),
        ([], [b"CHUNKED"], 1, CHUNKED),
    ],
)
def test_request_with_one_reading_is_framed(lengths, codings, minor, framing):
    assert request_framing(lengths, codings, minor) == framing


@pytest.mark.parametrize(
    ("lengths", "codings", "minor"),
    [
        ([b"5"], [b"chunked"], 1),
        ([b"5", b"5"], [], 1),
        ([b"5, 5"], [], 1),
        ([b"+5"], [], 1),
        ([b"-0"], [], 1),
        ([b"5_0"], [], 1),
        ([b"0x5"], [], 1),
        ([b""], [], 1),
        ([b"\xef\xbc\x94"], [], 1),
        ([b"1" * 19], [], 1),
        ([], [b"chunked", b"chunked"], 1),
        ([], [b"identity, chunked"], 1),
        ([], [b",chunked"], 1),
        ([], [b"chunked;q=1"], 1),
        ([], [b"chunkedchunked"], 1),
        ([], [b""], 1),
        ([], [b"chunked"], 0),
    ],
)
def test_request_with_several_readings_is_refused(lengths, codings, minor):
    """RFC 9112 6.1, 6.3; stricter where the RFC allows a repair."""
    with pytest.raises(RequestRefused):
        request_framing(lengths, codings, minor)


def values(given, name):
    return [value for key, value in given if key == name]


def framed(method, status, minor, given):
    lengths, codings = values(given, b"content-length"), values(given, b"transfer-encoding")
    return response_framing(method, status, minor, lengths, codings)


@pytest.mark.parametrize(
    ("method", "status", "minor", "given", "framing"),
    [
        (b"GET", 200, 1, [], UNTIL_CLOSE),
        (b"GET", 200, 1, [(b"content-length", b"3")], Framing(Delimiter.LENGTH, 3)),
        (b"GET", 200, 1, [(b"transfer-encoding", b"chunked")], CHUNKED),
        (b"HEAD", 200, 1, [(b"content-length", b"3")], NO_BODY),
        (b"GET", 204, 1, [], NO_BODY),
        (b"GET", 304, 1, [(b"content-length", b"3")], NO_BODY),
    ],
)
def test_response_is_framed(method, status, minor, given, framing):
    """RFC 9112 6.3."""
    assert framed(method, status, minor, given) == framing


@pytest.mark.parametrize(
    "given",
    [
        [(b"content-length", b"3"), (b"transfer-encoding", b"chunked")],
        [(b"content-length", b"3"), (b"content-length", b"4")],
        [(b"transfer-encoding", b"gzip, chunked")],
        [(b"content-length", b"x")],
    ],
)
def test_response_with_several_readings_is_refused(given):
    with pytest.raises(ResponseRefused):
        framed(b"GET", 200, 1, given)


@pytest.mark.parametrize(
    "body",
    [b"+5\r\nhello\r\n", b"0x5\r\nhello\r\n", b"5_0\r\n", b"\r\n", b"5 \r\nhello\r\n", b" 5\r\n",
     b"5\nhello\r\n", b"5\r\nhelloXX", b"5\r\nhello\n0\r\n", b"5\r\nhelloworld\r\n",
     b"100000005\r\n", b"5;a=\x00\r\n", b"5;a=b\r\rX\r\n", b"5;\r\n", b"5;a b\r\n", b'5;a="b\r\n',
     b"\xef\xbc\x95\r\n", b"0\r\nXX: y\n\r\n", b"0\r\nX : y\r\n\r\n", b"0\r\nX: y\r\n z\r\n\r\n",
     b"0\r\nGET /admin HTTP/1.1\r\n\r\n", b"5" * 5000, b"0\r\n" + b"X: y\r\n" * 3000,
     b"1;" + b"a" * 5000 + b"\r\n", (b"1;" + b"a" * 3000 + b"\r\nx\r\n") * 6],
)  # fmt: skip
def test_broken_chunks_are_refused_however_they_are_cut(body):
    """RFC 9112 7.1; CVE-2025-43859, CVE-2025-22871, CVE-2023-39326."""
    for pieces in ([body], [body[i : i + 1] for i in range(len(body))]):
        reader = ChunkedReader(LIMITS)
        with pytest.raises(FramingFault):
            for piece in pieces:
                reader.read(piece)


@given(
    st.lists(st.binary(min_size=1, max_size=30), max_size=5),
    st.sampled_from([b"", b";a=b", b';a="x;\\"y";c']),
    st.binary(max_size=10),
    st.lists(st.integers(1, 20), max_size=30),
)
def test_chunks_are_decoded_however_they_are_cut(chunks, extension, rest, cuts):
    """And h11 decodes them to the same payload."""
    body = b"".join(
        b"%x%b\r\n%b\r\n" % (len(data), extension, data) for data in chunks
    ) + b"0\r\nX-T: y\r\n\r\n"  # fmt: skip
    reader = ChunkedReader(LIMITS)
    payload, left, data = b"", b"", body + rest
    while data:
        size = cuts.pop() if cuts else len(data)
        more, excess = reader.read(data[:size])
        payload += more
        left += excess
        data = data[size:]
        if reader.done:
            left += data
            break
    assert payload == b"".join(chunks)
    assert left == rest
    reference = h11.Connection(h11.SERVER)
    reference.receive_data(
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + body
    )
    seen = b""
    while not isinstance(event := reference.next_event(), h11.EndOfMessage):
        seen += event.data if isinstance(event, h11.Data) else b""
    assert seen == payload


@given(st.binary(min_size=1, max_size=100))
def test_written_chunk_reads_back(payload):
    reader = ChunkedReader(LIMITS)
    assert reader.read(chunk(payload) + b"0\r\n\r\n") == (payload, b"")
    assert reader.done


def test_known_length_ends_exactly():
    reader = LengthReader(5)
    assert reader.read(b"abc") == (b"abc", b"")
    assert reader.read(b"defg") == (b"de", b"fg")
    assert reader.done
