"""Servers and clients that fail, fall silent or leave, as transcripts of the exchange."""

# ruff: noqa: E501 - a message is one line of a transcript

import pytest
from http_transcript import DENIED, DENIED_CLOSE, GET, GET_ADMIN, OK, Script, snapshot


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
        >> wait 1
        >> wait 1
        << log response GET /public/a 408 SI request_body_timeout
        << close-upstream reset
        << client "HTTP/1.1 408 Request Timeout\r\nContent-Type: text/plain\r\nContent-Length: 17\r\nConnection: close\r\n\r\nRequest Timeout\r\n"
        << shutdown
    """)


def test_idle_connections_end_silently():
    Script(snapshot()).check(r"""
        >> wait 15
        << count http_downstream_cx_idle_timeout
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


LAST = r'"GET /public/a HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n"'
LAST_DENIED = r'"GET /admin HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n"'
LAST_ANSWER = rf"""
        << log request GET /public/a
        << open
        >> opened
        << upstream {GET}
        >> upstream {OK}
        << client "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"
        << log response GET /public/a 200 via_upstream
        << close-upstream
"""


def test_client_that_has_said_its_last_is_closed_with_the_answer():
    Script(snapshot()).check(rf"""
        >> client {LAST}
        {LAST_ANSWER}
        << close
    """)
    Script(snapshot()).check(rf"""
        >> client {LAST_DENIED}
        << log request GET /admin 403 UAEX access_denied
        << client {DENIED_CLOSE}
        << close
    """)


def test_client_from_which_something_may_come_gets_time_to_read():
    """The kernel answers bytes that nobody takes with RST, and the answer is lost."""
    pipelined = rf"{LAST[:-1]}GET /b"
    Script(snapshot()).check(rf"""
        >> client {pipelined}"
        {LAST_ANSWER}
        << shutdown
    """)
    # Of TLS the client's close_notify is to come.
    Script(snapshot(), secure=True).check(rf"""
        >> client {LAST}
        {LAST_ANSWER}
        << shutdown
    """)
    body = LAST_DENIED.replace(r"\r\n\r\n", r"\r\nContent-Length: 9\r\n\r\n")
    Script(snapshot()).check(rf"""
        >> client {body}
        << log request GET /admin 403 UAEX access_denied
        << client {DENIED_CLOSE}
        << shutdown
    """)
