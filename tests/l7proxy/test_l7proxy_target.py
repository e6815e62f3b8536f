"""The request target has one reading: what is matched is what is sent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l7proxy.limits import Limits
from l7proxy.refusals import RequestRefused
from l7proxy.target import check_host, normalise

LIMITS = Limits()


def wire(target: bytes, host: bytes = b"svc.local", method: bytes = b"GET", **limits) -> bytes:
    return normalise(method, target, host, Limits(**limits)).wire


def refusal(target: bytes, host: bytes = b"svc.local", method: bytes = b"GET", **limits) -> str:
    with pytest.raises(RequestRefused) as caught:
        normalise(method, target, host, Limits(**limits))
    return caught.value.refusal.detail


NORMALISED = [
    (b"/", b"/"),
    (b"/public/a", b"/public/a"),
    (b"/a?x=/../b#"[:-1], b"/a?x=/../b"),
    (b"/a?", b"/a?"),
    (b"/public/../admin", b"/admin"),
    (b"/public/a/../../admin", b"/admin"),
    (b"/public/%2e%2e/admin", b"/admin"),
    (b"/public/%2E./admin", b"/admin"),
    (b"/public/.%2e", b"/"),
    (b"/..", b"/"),
    (b"/../../x", b"/x"),
    (b"/a/.", b"/a/"),
    (b"/a/b/..", b"/a/"),
    (b"/./a", b"/a"),
    (b"//admin", b"/admin"),
    (b"/a//../b", b"/b"),
    (b"///", b"/"),
    (b"/%70ublic/%7e", b"/public/~"),
    (b"/a%c3%a9%2b", b"/a%C3%A9%2B"),
    (b"/public/;/../../admin", b"/admin"),
    (b"/a;x=1/b", b"/a;x=1/b"),
    (b"/.well-known/x", b"/.well-known/x"),
    (b"/a/...", b"/a/..."),
    (b"/a?b=%2f%00\\", b"/a?b=%2f%00\\"),
    (b"http://svc.local/public/a", b"/public/a"),
    (b"HTTP://SVC.local", b"/"),
    (b"http://svc.local?x", b"/?x"),
    (b"http://svc.local/public/../admin", b"/admin"),
]


@pytest.mark.parametrize(("raw", "expected"), NORMALISED)
def test_target_is_normalised(raw, expected):
    """RFC 3986 6.2.2, 5.2.4."""
    assert wire(raw) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(b"*", b"*"), (b"http://svc.local", b"*"), (b"http://svc.local/", b"/"),
     (b"http://svc.local?", b"/?"), (b"http://svc.local?x", b"/?x")],
)  # fmt: skip
def test_options_may_ask_about_the_server_as_a_whole(raw, expected):
    """RFC 9112 3.2.4."""
    assert wire(raw, method=b"OPTIONS") == expected


REFUSED = [
    (b"/a#b", "path_with_fragment"),
    (b"/public/..%2fadmin", "path_with_escaped_slashes_rejected"),
    (b"/public%5c..", "path_with_escaped_slashes_rejected"),
    (b"/public\\..\\admin", "path_with_escaped_slashes_rejected"),
    (b"/%252e%252e/", "path_escaped_twice"),
    (b"/%25%32e", "path_escaped_twice"),
    (b"/a%", "path_normalization_failed"),
    (b"/a%1", "path_normalization_failed"),
    (b"/%u002e", "path_normalization_failed"),
    (b"/%00", "path_normalization_failed"),
    (b"/%0d%0aHost:", "path_normalization_failed"),
    (b"/%c0%ae", "path_normalization_failed"),
    (b"/%ff", "path_normalization_failed"),
    (b"/public/..%e0%80%af..%e0%80%afadmin", "path_normalization_failed"),
    (b"/public/%f0%80%80%ae./admin", "path_normalization_failed"),
    (b"/" + b"a" * 16 * 1024, "request_uri_too_long"),
    (b"/a/..;/b", "path_normalization_failed"),
    (b"/a/.;x=1/b", "path_normalization_failed"),
    (b"/a/%2e%2e;/b", "path_normalization_failed"),
    (b"/a/..%3b/b", "path_normalization_failed"),
    (b"/a/..%20/b", "path_normalization_failed"),
    (b"/a/..%3Fx", "path_normalization_failed"),
    (b"/a/%2e%2e%23", "path_normalization_failed"),
    (b"/a/.%3f/b", "path_normalization_failed"),
    (b"/a/..%ef%bc%8fb", "path_normalization_failed"),
    (b"*", "http1.invalid_url"),
    (b"svc.local:80", "http1.invalid_url"),
    (b"admin", "http1.invalid_url"),
    (b"ftp://svc.local/", "http1.invalid_url"),
    (b"https://svc.local/", "http1.invalid_url"),
    (b"http://user@svc.local/", "http1.invalid_host"),
    (b"http:///a", "http1.invalid_host"),
    (b"http://other/", "http1.host_differs_from_target"),
    (b"http://svc.local:80/", "http1.host_differs_from_target"),
]


@pytest.mark.parametrize(("raw", "detail"), REFUSED)
def test_target_that_servers_read_differently_is_refused(raw, detail):
    """Research l7 3.1, column "Secure policy proxy"."""
    assert refusal(raw) == detail


def test_asterisk_is_a_target_of_options_only():
    """RFC 9112 3.2.4."""
    assert wire(b"*", method=b"OPTIONS") == b"*"


def test_absolute_form_has_the_scheme_of_its_connection():
    """RFC 9112 3.2.2: a server must accept it; 3.3: inside TLS the scheme is https."""
    assert normalise(b"GET", b"HTTPS://s/a/../b", b"s", LIMITS, b"https").wire == b"/b"
    with pytest.raises(RequestRefused):
        normalise(b"GET", b"http://s/a", b"s", LIMITS, b"https")


def test_settings_decide_about_double_escapes_and_parameters():
    assert wire(b"/%252e", escaped_twice="keep") == b"/%252e"
    assert refusal(b"/a;x", path_parameters="reject") == "path_normalization_failed"


def test_escaped_slashes_may_be_slashes_or_part_of_a_name():
    unescape = {"escaped_slashes": "unescape"}
    assert wire(b"/@scope%2fname", **unescape) == b"/@scope/name"
    assert wire(b"/public/..%2fadmin%5cx", **unescape) == b"/admin/x"
    assert wire(b"/a%2F%2fb", **unescape) == b"/a/b"
    assert wire(b"/a%2Fb/%5c?%2f", escaped_slashes="keep") == b"/a%2Fb/%5C?%2f"


@pytest.mark.parametrize(
    "raw",
    [b"/public/..%2fadmin", b"/public/a%2f..%2f..%2fadmin", b"/public/a%5C%2e%2e", b"/a%2f./b",
     b"/a%2f..;x/b", b"/a%2f..%20/b", b"/a/..%2f..;/b", b"/%2f..", b"/a\\b"],
)  # fmt: skip
def test_a_kept_escaped_slash_hides_no_dot_segment(raw):
    assert refusal(raw, escaped_slashes="keep") == "path_with_escaped_slashes_rejected"


def test_dot_segments_may_be_refused():
    for raw in (b"/a/../b", b"/a/%2e", b"/.", b"/a/%2E%2e/b"):
        assert refusal(raw, dot_segments="reject") == "path_normalization_failed"
    for raw in (b"/.well-known/x", b"/a/...", b"/a.b/..c"):
        assert wire(raw, dot_segments="reject") == raw


def test_slashes_may_be_kept_but_not_beside_dot_segments():
    assert wire(b"/a//b///", merge_slashes=False) == b"/a//b///"
    assert wire(b"///evil//x", merge_slashes=False) == b"/evil//x"
    assert wire(b"/a/../b", merge_slashes=False) == b"/b"
    assert refusal(b"/a//../b", merge_slashes=False) == "path_normalization_failed"


@pytest.mark.parametrize(
    "host",
    [
        b"a",
        b"A.b-c_d",
        b"a.",
        b"10.0.0.1:80",
        b"[::1]",
        b"[fd00::1]:8080",
        b"a:65535",
        b"[::ffff:1.2.3.4]",
    ],
)
def test_host_is_name_or_address_with_optional_port(host):
    check_host(host)


@pytest.mark.parametrize(
    "host",
    [b"", b"a b", b"a/b", b"u@a", b"a:", b"a:65536", b"a:999999", b"a:8x", b"::1", b"[::1", b"a,b",
     b"a%2e", b"a?", b"a\xe9", b"a:80:80", b"[....]", b"[:]", b"[12345::]", b"[1.2.3.4]",
     b"[::1.2.3.999]", b"[1:2:3:4:5:6:7:8:9]"],
)  # fmt: skip
def test_anything_else_is_no_host(host):
    """RFC 9110 7.2."""
    with pytest.raises(RequestRefused):
        check_host(host)


PATHS = st.lists(
    st.sampled_from(
        [b"/", b".", b"..", b"%2e", b"%2E", b"%25", b"%32", b"%35", b"%41", b"a", b";", b"?", b"2",
         b"e", b"%c3", b"//", b"x=1", b"%2f", b"%5C"]
    ),
    max_size=12,
).map(b"".join)  # fmt: skip


SETTINGS = st.fixed_dictionaries(
    {
        "escaped_twice": st.sampled_from(["keep", "reject"]),
        "escaped_slashes": st.sampled_from(["keep", "reject", "unescape"]),
        "dot_segments": st.sampled_from(["remove", "reject"]),
        "merge_slashes": st.booleans(),
    }
)


@given(PATHS, SETTINGS)
def test_normalising_twice_changes_nothing(rest, settings):
    limits = Limits(**settings)
    try:
        once = normalise(b"GET", b"/" + rest, b"h", limits)
    except RequestRefused:
        return
    assert normalise(b"GET", once.wire, b"h", limits) == once


@given(PATHS, SETTINGS)
def test_no_dot_segment_and_no_empty_segment_is_ever_sent(rest, settings):
    try:
        path = normalise(b"GET", b"/" + rest, b"h", Limits(**settings)).path
    except RequestRefused:
        return
    segments = path.replace(b"%2F", b"/").replace(b"%5C", b"/").split(b"/")[1:]
    assert not {b".", b"..", b"%2e", b"%2E"} & set(segments)
    if settings["merge_slashes"]:
        assert b"" not in path.split(b"/")[1:-1]


@given(st.binary(max_size=40))
def test_any_bytes_give_a_target_or_a_refusal(raw):
    try:
        target = normalise(b"GET", raw, b"h", LIMITS)
    except RequestRefused:
        return
    assert target.path.startswith(b"/")
