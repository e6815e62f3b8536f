"""One client connection as transcripts (`>>` events, `<<` commands)."""

# ruff: noqa: E501 - a message is one line of a transcript

import pytest
from http_transcript import PUBLIC, Script, snapshot

OK = r'"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"'
DENIED = (
    r'"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: 15\r\n\r\n'
    r'Access denied\r\n"'
)
DENIED_CLOSE = (
    r'"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: 15\r\n'
    r'Connection: close\r\n\r\nAccess denied\r\n"'
)
BAD_REQUEST = (
    r'"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 13\r\n'
    r'Connection: close\r\n\r\nBad Request\r\n"'
)
GET = r'"GET /public/a HTTP/1.1\r\nHost: s\r\n\r\n"'
GET_ADMIN = r'"GET /admin HTTP/1.1\r\nHost: s\r\n\r\n"'


def test_allowed_request_is_sent_on_and_answered():
    Script(snapshot()).check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> upstream {OK}
        << client {OK}
        << log response GET /public/a 200 via_upstream
    """)


def test_denied_request_opens_no_upstream_and_keeps_the_connection():
    """Research l7 section 0.4; Cilium: the connection stays open."""
    Script(snapshot()).check(rf"""
        >> client {GET_ADMIN}
        << log request GET /admin 403 UAEX access_denied
        << client {DENIED}
        >> client {GET}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> upstream {OK}
        << client {OK}
        << log response GET /public/a 200 via_upstream
        >> client {GET}
        << log request GET /public/a
        << upstream {GET}
    """)


def test_pipelined_requests_are_judged_one_by_one_and_answered_in_order():
    both = GET[:-1] + GET_ADMIN[1:]
    Script(snapshot()).check(rf"""
        >> client {both}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> upstream {OK}
        << client {OK}
        << log response GET /public/a 200 via_upstream
        << log request GET /admin 403 UAEX access_denied
        << client {DENIED}
    """)


def test_policy_change_applies_to_the_next_request_of_an_open_connection():
    script = Script(snapshot())
    script.check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> upstream {OK}
        << client {OK}
        << log response GET /public/a 200 via_upstream
    """)
    script.policy.install(snapshot(PUBLIC[1:], revision=2))
    script.check(rf"""
        >> policy
        >> client {GET}
        << log request GET /public/a 403 UAEX access_denied
        << client {DENIED}
    """)


def test_connection_that_lost_its_permission_is_reset_at_once():
    script = Script(snapshot())
    script.check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
    """)
    script.policy.install(snapshot(deny=True, revision=2))
    script.check(r"""
        >> policy
        << log response GET /public/a UAEX connection_denied
        << close-upstream reset
        << close reset
    """)


def test_connection_that_lost_its_rules_goes_on_as_allowed():
    script = Script(snapshot())
    script.check(rf"""
        >> client {GET_ADMIN}
        << log request GET /admin 403 UAEX access_denied
        << client {DENIED}
    """)
    script.policy.install(snapshot(None, plain=True, revision=2))
    script.check(rf"""
        >> policy
        >> client {GET_ADMIN}
        << log request GET /admin
        << open
    """)


def test_without_a_snapshot_everything_is_refused():
    Script(None).check(rf"""
        >> client {GET}
        << log request GET /public/a UAEX connection_denied
        << close reset
    """)


def test_malformed_request_is_refused_and_nothing_after_it_is_read():
    Script(snapshot()).check(rf"""
        >> client "GET /public/a HTTP/1.1\r\nHost: s\r\nHost: t\r\n\r\nGET /public/a HTTP/1.1\r\n"
        << log request GET /public/a 400 DPE http1.several_host_headers
        << client {BAD_REQUEST}
        << shutdown
        >> client {GET}
        >> client-ended
        << close
    """)


def test_refused_client_that_does_not_close_is_closed_after_the_linger_time():
    """Envoy delayed_close_timeout."""
    Script(snapshot()).check(rf"""
        >> client "\x16\x03\x01"
        << log request 400 DPE http1.invalid_characters
        << client {BAD_REQUEST}
        << shutdown
        >> wait 0.5
        >> wait 0.6
        << close
    """)


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
        << shutdown
    """)


@pytest.mark.parametrize("event", ["upstream-ended", "upstream-lost"])
def test_answer_cut_short_resets_the_client_so_that_it_cannot_look_complete(event):
    Script(snapshot()).check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> upstream "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"
        << client "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"
        >> {event}
        << log response GET /public/a 200 UC upstream_reset_after_response_started{{termination}}
        << close-upstream reset
        << close reset
    """)


def test_server_that_closes_instead_of_answering_gives_502_and_the_client_stays():
    Script(snapshot()).check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> upstream-ended
        << log response GET /public/a 502 UC upstream_reset_before_response_started{{termination}}
        << close-upstream reset
        << client "HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/plain\r\nContent-Length: 13\r\n\r\nBad Gateway\r\n"
    """)


def test_request_lost_in_a_kept_connection_is_sent_once_more():
    """RFC 9112 9.3.1."""
    Script(snapshot()).check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> upstream {OK}
        << client {OK}
        << log response GET /public/a 200 via_upstream
        >> client {GET}
        << log request GET /public/a
        << upstream {GET}
        >> upstream-lost
        << close-upstream
        << count upstream_rq_retry
        << open
        >> opened
        << upstream {GET}
        >> upstream-lost
        << log response GET /public/a 502 UC upstream_reset_before_response_started{{termination}}
        << close-upstream reset
        << client "HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/plain\r\nContent-Length: 13\r\n\r\nBad Gateway\r\n"
    """)


def test_second_answer_to_one_request_poisons_the_servers_connection():
    """Otherwise the next request would get it: response queue poisoning."""
    Script(snapshot()).check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> upstream "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
        << client "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
        << log response GET /public/a 200 via_upstream
        << close-upstream
        >> client {GET}
        << log request GET /public/a
        << open
    """)


def test_unsolicited_bytes_of_the_server_reset_its_connection():
    Script(snapshot()).check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> upstream {OK}
        << client {OK}
        << log response GET /public/a 200 via_upstream
        >> upstream {OK}
        << count upstream_unsolicited_bytes
        << close-upstream reset
    """)


@pytest.mark.parametrize(
    ("failure", "status", "reason", "length", "detail"),
    [
        ("refused", 502, "Bad Gateway", 13,
         "upstream_reset_before_response_started{connection_failure}"),
        ("timeout", 504, "Gateway Timeout", 17, "upstream_connect_timeout"),
    ],
)  # fmt: skip
def test_server_that_cannot_be_reached_is_told_to_the_client(
    failure, status, reason, length, detail
):
    Script(snapshot()).check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> failed {failure}
        << log response GET /public/a {status} UF {detail}
        << client "HTTP/1.1 {status} {reason}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\r\n{reason}\r\n"
    """)


def test_silent_server_is_given_up_after_the_connect_timeout():
    Script(snapshot()).check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> wait 5
        << log response GET /public/a 504 UF upstream_connect_timeout
        << close-upstream reset
        << client "HTTP/1.1 504 Gateway Timeout\r\nContent-Type: text/plain\r\nContent-Length: 17\r\n\r\nGateway Timeout\r\n"
    """)


def test_head_that_drips_is_given_up_however_busy_it_looks():
    """Slowloris: the time counts from the first byte of the head."""
    Script(snapshot()).check(r"""
        >> client "GET /public/a HTTP/1.1\r\n"
        >> wait 6
        >> client "Host: s\r\n"
        >> wait 3
        >> client "X: y\r\n"
        >> wait 1
        << log request 408 SI request_header_timeout
        << client "HTTP/1.1 408 Request Timeout\r\nContent-Type: text/plain\r\nContent-Length: 17\r\nConnection: close\r\n\r\nRequest Timeout\r\n"
        << shutdown
    """)


def test_body_that_stops_is_given_up():
    Script(snapshot()).check(r"""
        >> client "GET /public/a HTTP/1.1\r\nHost: s\r\nContent-Length: 9\r\n\r\nabc"
        << log request GET /public/a
        << open
        >> opened
        << upstream "GET /public/a HTTP/1.1\r\nHost: s\r\nContent-Length: 9\r\n\r\nabc"
        >> wait 59
        >> client "d"
        << upstream "d"
        >> wait 59
        >> wait 1
        << log response GET /public/a 408 SI request_body_timeout
        << close-upstream reset
        << client "HTTP/1.1 408 Request Timeout\r\nContent-Type: text/plain\r\nContent-Length: 17\r\nConnection: close\r\n\r\nRequest Timeout\r\n"
        << shutdown
    """)


def test_idle_connections_end_silently():
    Script(snapshot()).check(r"""
        >> wait 15
        << count downstream_cx_idle_timeout
        << shutdown
        >> client-ended
        << close
    """)


def test_client_that_half_closes_still_gets_its_answers():
    both = GET[:-1] + GET_ADMIN[1:]
    Script(snapshot()).check(rf"""
        >> client {both}
        << log request GET /public/a
        << open
        >> client-ended
        >> opened
        << upstream {GET}
        >> upstream {OK}
        << client {OK}
        << log response GET /public/a 200 via_upstream
        << log request GET /admin 403 UAEX access_denied
        << client {DENIED}
        << close-upstream
        << close
    """)


def test_client_that_leaves_takes_its_server_connection_with_it():
    Script(snapshot()).check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> client-lost
        << log response GET /public/a DC downstream_remote_disconnect
        << close-upstream reset
    """)


def test_back_pressure_reaches_the_sender_in_both_directions():
    Script(snapshot()).check(r"""
        >> client "GET /public/a HTTP/1.1\r\nHost: s\r\nContent-Length: 9\r\n\r\nabc"
        << log request GET /public/a
        << open
        >> opened
        << upstream "GET /public/a HTTP/1.1\r\nHost: s\r\nContent-Length: 9\r\n\r\nabc"
        >> upstream-blocked yes
        << pause-client
        >> upstream-blocked no
        << resume-client
        >> client "defghi"
        << upstream "defghi"
        >> client-blocked yes
        << pause-client
        << pause-upstream
        >> client-blocked no
        << resume-client
        << resume-upstream
    """)


def test_body_for_a_server_that_does_not_accept_yet_is_held_up_to_the_limit():
    Script(snapshot(), buffer_bytes=100).check(r"""
        >> client "GET /public/a HTTP/1.1\r\nHost: s\r\nContent-Length: 300\r\n\r\n"
        << log request GET /public/a
        << open
        >> client "x" * 100
        << pause-client
        >> opened
        << upstream "GET /public/a HTTP/1.1\r\nHost: s\r\nContent-Length: 300\r\n\r\nxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
        << resume-client
    """)


def test_requests_that_wait_for_their_turn_are_bounded():
    Script(snapshot(), buffer_bytes=100).check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> client "GET /public/a HTTP/1.1\r\nHost: s\r\n\r\n" * 3
        << pause-client
    """)


def test_drain_finishes_what_has_begun():
    Script(snapshot()).check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> drain
        >> upstream {OK}
        << client "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"
        << log response GET /public/a 200 via_upstream
        << close-upstream
        << shutdown
    """)


def test_drain_lets_a_client_that_has_just_connected_ask_once():
    Script(snapshot()).check(rf"""
        >> drain
        >> client {GET_ADMIN}
        << log request GET /admin 403 UAEX access_denied
        << client {DENIED_CLOSE}
        << shutdown
    """)


def test_finish_closes_a_connection_between_requests():
    Script(snapshot()).check(r"""
        >> drain
        >> finish
        << shutdown
    """)


def test_one_record_tells_who_denied_and_one_who_allowed():
    script = Script(snapshot())
    script.check(rf"""
        >> client {GET_ADMIN}
        << log request GET /admin 403 UAEX access_denied
        << client {DENIED}
        >> client {GET}
        << log request GET /public/a
        << open
    """)
    denied = script.commands[0].record.judgement
    allowed = script.commands[2].record.judgement
    assert [row.name for row in denied.denied_by] == ["public"]
    assert [row.name for row in denied.isolated_by] == ["public"]
    assert [row.name for row in allowed.allowed_by] == ["public"]
    assert (allowed.source_identity, allowed.destination_identity) == (1001, 1002)


def test_unexpected_error_resets_both_sides():
    """Fail closed, and say what it was."""
    script = Script(snapshot())
    script.exchange._judge = None
    script.check(rf"""
        >> client {GET}
        << log request DPE internal_error{{AttributeError: 'NoneType' object has no attribute 'request'}}
        << close reset
    """)
