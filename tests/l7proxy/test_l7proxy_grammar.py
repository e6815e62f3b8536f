"""The patterns hold under every interpreter that we support, and say what they mean to."""

import re

import pytest

from l7proxy import grammar, target

PATTERNS = {
    f"{module.__name__}.{name}": value
    for module in (grammar, target)
    for name, value in vars(module).items()
    if isinstance(value, re.Pattern)
}


@pytest.mark.parametrize("name", PATTERNS)
def test_no_group_is_repeated_possessively(name):
    """CPython before 3.11.5 keeps what a failed repetition consumed (gh-106052)."""
    without_classes = re.sub(rb"\[(?:\\.|[^\]\\])*\]", b"x", PATTERNS[name].pattern)
    assert not re.search(rb"(?<!\\)\)(?:[*+?]|\{[0-9,]+\})\+", without_classes)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (grammar.request_head, b"GET / HTTP/1.1\r\nHost: a\r\nbroken\r\n"),
        (grammar.request_head, b"GET / HTTP/1.1\r\nHost: a\r\nbroken\r\n\r\n"),
        (grammar.response_head, b"HTTP/1.1 200\r\nA: b\r\nbroken\r\n\r\n"),
        (grammar.lean_request_head, b"GET / HTTP/1.1\r\nHost: a\r\nbroken\r\n\r\n"),
        (grammar.lean_response_head, b"HTTP/1.1 200 OK\r\nA: b\r\nbroken\r\n\r\n"),
        (grammar.chunk_line, b"5;\r\n"),
        (grammar.chunk_line, b'5;a="b\r\n'),
        (grammar.chunk_line, b"5;a=\r\n"),
        (grammar.host, b"a:"),
        (grammar.host, b"a:x"),
    ],
)
def test_a_repetition_that_fails_consumes_nothing(pattern, text):
    assert pattern.fullmatch(text) is None
