"""Bodies, interim answers and ends of messages, as transcripts of the exchange."""

# ruff: noqa: E501 - a message is one line of a transcript

import pytest
from http_transcript import (
    BAD_REQUEST,
    DENIED,
    DENIED_CLOSE,
    GET,
    GET_ADMIN,
    OK,
    PUBLIC,
    Script,
    snapshot,
)


def test_body_of_known_length_is_passed_on_as_it_comes():
    Script(snapshot()).check(rf"""
        >> client "GET /public/a HTTP/1.1\r\nHost: s\r\nContent-Length: 6\r\n\r\nabc"
        << log request GET /public/a
        << open
        >> client "def"
        >> opened
        << upstream "GET /public/a HTTP/1.1\r\nHost: s\r\nContent-Length: 6\r\n\r\nabcdef"
        >> upstream {OK}
        << client {OK}
        << log response GET /public/a 200 via_upstream
    """)


def test_chunked_body_is_framed_anew_without_extensions_and_trailers():
    Script(snapshot()).check(r"""
        >> client "GET /public/a HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: Chunked\r\n\r\n"
        << log request GET /public/a
        << open
        >> opened
        << upstream "GET /public/a HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n"
        >> client "00A;a=b\r\n0123456789\r\n"
        << upstream "a\r\n0123456789\r\n"
        >> client "0\r\nX-Role: admin\r\n\r\n"
        << upstream "0\r\n\r\n"
    """)


def test_broken_chunk_resets_the_server_so_that_the_request_cannot_look_complete():
    Script(snapshot()).check(rf"""
        >> client "GET /public/a HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n"
        << log request GET /public/a
        << open
        >> opened
        << upstream "GET /public/a HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n"
        >> client "5\r\nhelloX\r\n"
        << log response GET /public/a 400 DPE http1.invalid_chunk
        << close-upstream reset
        << client {BAD_REQUEST}
        << shutdown
    """)


def test_body_of_a_denied_request_is_thrown_away_even_if_it_looks_like_a_request():
    inner = r"GET /public/x HTTP/1.1\r\nHost: s\r\n\r\n"
    Script(snapshot()).check(rf"""
        >> client "POST /public/a HTTP/1.1\r\nHost: s\r\nContent-Length: 35\r\n\r\n{inner}"
        << log request POST /public/a 403 UAEX access_denied
        << client {DENIED}
        >> client {GET_ADMIN}
        << log request GET /admin 403 UAEX access_denied
        << client {DENIED}
    """)


def test_denied_request_with_a_long_body_closes_the_connection():
    Script(snapshot(), discard_bytes=10).check(rf"""
        >> client "POST / HTTP/1.1\r\nHost: s\r\nContent-Length: 11\r\n\r\n"
        << log request POST / 403 UAEX access_denied
        << client {DENIED_CLOSE}
        << shutdown
    """)


def test_denied_chunked_body_beyond_the_limit_closes_the_connection():
    Script(snapshot(), discard_bytes=10).check(rf"""
        >> client "POST / HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n"
        << log request POST / 403 UAEX access_denied
        << client {DENIED}
        >> client "b\r\n01234567890\r\n"
        << shutdown
    """)


def test_expectation_is_answered_only_after_the_decision():
    """RFC 9110 10.1.1; the server does not get the expectation."""
    Script(snapshot()).check(r"""
        >> client "GET /public/a HTTP/1.1\r\nHost: s\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
        << log request GET /public/a
        << client "HTTP/1.1 100 Continue\r\n\r\n"
        << open
        >> opened
        << upstream "GET /public/a HTTP/1.1\r\nHost: s\r\nContent-Length: 3\r\n\r\n"
        >> client "abc"
        << upstream "abc"
    """)


def test_denied_expectation_closes_because_the_body_may_or_may_not_come():
    Script(snapshot()).check(rf"""
        >> client "POST /x HTTP/1.1\r\nHost: s\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
        << log request POST /x 403 UAEX access_denied
        << client {DENIED_CLOSE}
        << shutdown
        >> client "GET /public/a HTTP/1.1\r\nHost: s\r\n\r\n"
    """)


def test_answer_before_the_end_of_the_request_ends_both_connections():
    """RFC 9112 9.3: what the client still sends is not a request."""
    Script(snapshot()).check(rf"""
        >> client "GET /public/a HTTP/1.1\r\nHost: s\r\nContent-Length: 100\r\n\r\nabc"
        << log request GET /public/a
        << open
        >> opened
        << upstream "GET /public/a HTTP/1.1\r\nHost: s\r\nContent-Length: 100\r\n\r\nabc"
        >> upstream {OK}
        << client "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"
        << log response GET /public/a 200 via_upstream
        << close-upstream reset
        << shutdown
    """)


def test_websocket_is_refused_and_early_data_is_not_read():
    upgrade = (
        r"GET /public/ws HTTP/1.1\r\nHost: s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    )
    Script(snapshot()).check(rf"""
        >> client "{upgrade}GET /public/a HTTP/1.1\r\nHost: s\r\n\r\n"
        << log request GET /public/ws 403 UAEX upgrade_failed
        << client {DENIED_CLOSE}
        << shutdown
    """)


def test_nothing_is_read_behind_an_upgrade_that_no_rule_allows():
    """It may be in the other protocol, and read as requests all the same."""
    upgrade = r"GET /admin HTTP/1.1\r\nHost: s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    Script(snapshot()).check(rf"""
        >> client "{upgrade}GET /public/a HTTP/1.1\r\nHost: s\r\n\r\n"
        << log request GET /admin 403 UAEX access_denied
        << client {DENIED_CLOSE}
        << shutdown
    """)


def test_h2c_upgrade_is_dropped_and_the_request_goes_on():
    Script(snapshot()).check(rf"""
        >> client "GET /public/a HTTP/1.1\r\nHost: s\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n"
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
    """)


def test_switch_of_protocols_that_nobody_asked_for_is_a_server_error():
    Script(snapshot()).check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> upstream "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"
        << log response GET /public/a 502 UPE upstream_reset_before_response_started{{protocol_error}}
        << close-upstream reset
        << client "HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/plain\r\nContent-Length: 13\r\n\r\nBad Gateway\r\n"
    """)


def test_connect_is_refused_and_the_rest_is_not_read():
    Script(snapshot()).check(rf"""
        >> client "CONNECT s:80 HTTP/1.1\r\nHost: s\r\n\r\nGET /public/a HTTP/1.1\r\nHost: s\r\n\r\n"
        << log request CONNECT s:80 403 UAEX connect_refused
        << client {DENIED_CLOSE}
        << shutdown
    """)


def test_interim_responses_pass_but_not_the_servers_100():
    Script(snapshot()).check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> upstream "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
        << client "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
        >> upstream {OK}
        << client {OK}
        << log response GET /public/a 200 via_upstream
    """)


def test_answer_to_head_has_no_body_whatever_its_length_says():
    Script(snapshot((PUBLIC[0].__class__(),))).check(r"""
        >> client "HEAD / HTTP/1.1\r\nHost: s\r\n\r\n"
        << log request HEAD /
        << open
        >> opened
        << upstream "HEAD / HTTP/1.1\r\nHost: s\r\n\r\n"
        >> upstream "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"
        << client "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"
        << log response HEAD / 200 via_upstream
    """)


def test_denied_head_gets_no_body():
    Script(snapshot()).check(r"""
        >> client "HEAD /public/a HTTP/1.1\r\nHost: s\r\n\r\n"
        << log request HEAD /public/a 403 UAEX access_denied
        << client "HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: 15\r\n\r\n"
    """)


@pytest.mark.parametrize("status", [204, 304])
def test_statuses_without_body_end_with_their_head(status):
    Script(snapshot()).check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> upstream "HTTP/1.1 {status} x\r\n\r\n"
        << client "HTTP/1.1 {status} x\r\n\r\n"
        << log response GET /public/a {status} via_upstream
    """)


def test_answer_until_close_becomes_chunked_and_the_client_stays():
    Script(snapshot()).check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> upstream "HTTP/1.0 200 OK\r\n\r\nabc"
        << client "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
        >> upstream-ended
        << client "0\r\n\r\n"
        << log response GET /public/a 200 via_upstream
        << close-upstream
        >> client {GET}
        << log request GET /public/a
        << open
    """)


def test_http10_client_gets_its_answer_until_the_close():
    Script(snapshot()).check(rf"""
        >> client "GET /public/a HTTP/1.0\r\nHost: s\r\n\r\n"
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> upstream "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
        << client "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabc"
        >> upstream "0\r\n\r\n"
        << log response GET /public/a 200 via_upstream
        << close-upstream
        << close
    """)


def test_absolute_form_inside_tls_is_https():
    """RFC 9112 3.2.2 and 3.3; the server gets origin-form either way."""
    Script(snapshot(), secure=True).check(r"""
        >> client "GET https://s/public/a HTTP/1.1\r\nHost: s\r\n\r\n"
        << log request GET /public/a
        << open
        >> opened
        << upstream "GET /public/a HTTP/1.1\r\nHost: s\r\n\r\n"
    """)


def test_an_empty_request_id_is_replaced():
    """Two of them would be one value with a comma."""
    Script(snapshot(), request_id=True).check(r"""
        >> client "GET /public/a HTTP/1.1\r\nHost: s\r\nX-Request-ID:\r\nX-A:\r\n\r\n"
        << log request GET /public/a
        << open
        >> opened
        << upstream "GET /public/a HTTP/1.1\r\nHost: s\r\nX-A: \r\nX-Request-Id: id-1\r\n\r\n"
    """)
