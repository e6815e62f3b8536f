"""The command's reader of HTTP answers: whole, or not at all."""

import io

import pytest

from firewall.cli.client import read_head


def answered(text):
    return read_head(io.BytesIO(text))


def test_a_body_of_the_promised_length_is_whole():
    answer = answered(b"HTTP/1.0 200 OK\r\nServer: x\r\nCONTENT-length:  2\r\n\r\n{}")
    assert (answer.status, answer.length_bytes, answer.read()) == (200, 2, b"{}")


@pytest.mark.parametrize(("said", "enforced"), [("yes", True), ("no", False)])
def test_a_change_that_is_not_enforced_yet_says_so(said, enforced):
    head = f"HTTP/1.0 200 OK\r\nBartizan-Enforced: {said}\r\nContent-Length: 2\r\n\r\n{{}}"
    assert answered(head.encode()).enforced is enforced


def test_without_a_length_the_body_ends_with_the_stream():
    """RFC 1945 section 7.2.2: so a stream of flows is read."""
    answer = answered(b"HTTP/1.1 422 Unprocessable Entity\r\n\r\none\ntwo\n")
    assert (answer.status, list(answer.body)) == (422, [b"one\n", b"two\n"])


@pytest.mark.parametrize("sent", [b"", b"{", b'{"a": 1'])
def test_a_body_that_is_cut_short_is_no_answer(sent):
    with pytest.raises(ValueError, match=f"{len(sent)} of 9 bytes came"):
        answered(b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n" + sent).read()


@pytest.mark.parametrize("sent", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.0\r\n\r\n", b"HTTP/1.0 OK\r\n"])
def test_what_is_no_http_answer_is_said_to_be_none(sent):
    with pytest.raises(ValueError, match=r"no HTTP answer|invalid literal"):
        answered(sent)
