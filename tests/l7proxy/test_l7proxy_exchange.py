"""One client connection as transcripts (`>>` events, `<<` commands)."""

from http_transcript import BAD_REQUEST, DENIED, GET, GET_ADMIN, OK, PUBLIC, Script, snapshot

from firewall.policy.snapshot import HttpRuleRow


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


def test_request_that_waits_for_its_server_is_judged_by_the_new_policy():
    """It has reached nobody, and would after the new policy was acknowledged."""
    script = Script(snapshot())
    script.check(rf"""
        >> client {GET}
        << log request GET /public/a
        << open
    """)
    script.policy.install(snapshot(PUBLIC, revision=2))
    script.check(">> policy")
    script.policy.install(snapshot(PUBLIC[1:], revision=3))
    script.check(rf"""
        >> policy
        << log response GET /public/a 403 UAEX access_denied
        << close-upstream reset
        << client {DENIED}
        >> opened
        >> client "GET / HTTP/1.1\r\nHost: s\r\n\r\n"
        << log request GET /
        << open
    """)


def test_request_that_is_sent_once_more_is_judged_by_the_new_policy():
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
        >> client {GET}
        << log request GET /public/a
        << upstream {GET}
    """)
    script.policy.install(snapshot(PUBLIC[1:], revision=2))
    script.check(rf"""
        >> policy
        >> upstream-ended
        << close-upstream
        << count upstream_rq_retry
        << open
        << log response GET /public/a 403 UAEX access_denied
        << close-upstream reset
        << client {DENIED}
    """)


def test_body_of_a_request_that_waits_is_thrown_away_with_it():
    script = Script(snapshot((HttpRuleRow(path="/up"),)))
    script.check(r"""
        >> client "PUT /up HTTP/1.1\r\nHost: s\r\nContent-Length: 4\r\n\r\nab"
        << log request PUT /up
        << open
    """)
    script.policy.install(snapshot(PUBLIC, revision=2))
    script.check(rf"""
        >> policy
        << log response PUT /up 403 UAEX access_denied
        << close-upstream reset
        << client {DENIED}
        >> client "cdGET / HTTP/1.1\r\nHost: s\r\n\r\n"
        << log request GET /
        << open
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
