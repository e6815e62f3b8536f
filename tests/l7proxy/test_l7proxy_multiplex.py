"""HTTP/2 clients: streams side by side, decisions, ways to the server, windows, floods."""

import contextlib

import h2.exceptions
import pytest
from http2_peers import H1Server, H2Server, Peers
from http_transcript import snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from firewall.policy.snapshot import HttpRuleRow
from l7proxy.frames import PREFACE

GRPC = (b"content-type", b"application/grpc+proto")
CALLS = (HttpRuleRow(method="POST", path="/demo/.*"), HttpRuleRow(method="GET", path="/public/.*"))


def frame(kind, stream=0, payload=b"", flags=0):
    return (
        len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
    )


# --- decisions -----------------------------------------------------------------------------------


def test_streams_are_judged_one_by_one():
    peers = Peers()
    peers.request(1).request(3, b"/admin").request(5, b"/public/b").flush()
    assert [peers.status(number) for number in (1, 3, 5)] == [200, 403, 200]
    assert peers.answers[3]["body"] == b"Access denied\r\n"
    assert [request[1] for request in peers.seen] == [b"/public/a", b"/public/b"]
    assert not peers.end


def test_path_is_normalised_before_it_is_judged_and_sent():
    peers = Peers()
    peers.request(1, b"/public/%2e%2e/admin").request(3, b"//public/./x?q=/../").flush()
    assert peers.status(1) == 403
    assert [request[1] for request in peers.seen] == [b"/public/x?q=/../"]


def test_new_policy_counts_for_the_next_stream():
    peers = Peers()
    peers.request(1).flush()
    peers.policy.install(snapshot(rules=CALLS[:1], revision=2))
    peers.request(3).flush()
    assert [peers.status(1), peers.status(3)] == [200, 403]


class SilentServer(H1Server):
    """Takes requests of HTTP/1 and a preface, and says nothing."""

    def receive(self, data):
        if not data.startswith(b"PRI"):
            super().receive(data)
        return b""


def test_stream_that_waits_for_its_server_is_judged_by_the_new_policy():
    """It has reached nobody, and would after the new policy was acknowledged."""
    peers = Peers(SilentServer, source=snapshot(rules=CALLS))
    peers.request(1).flush()
    assert len(peers.seen) == 1
    # HTTP/2 to the server begins with its SETTINGS, which do not come.
    peers.request(3, b"/demo/A", GRPC, method=b"POST").flush()
    peers.policy.install(snapshot(rules=(), revision=2))
    peers.perform("policy_changed")
    assert len(peers.seen) == 1
    assert peers.answers[3]["head"][b"grpc-status"] == b"7"
    assert 1 not in peers.answers, "what the server has seen goes on"


def test_connection_that_lost_its_permission_is_reset():
    peers = Peers()
    peers.request(1).flush()
    peers.policy.install(snapshot(deny=True, revision=2))
    peers.perform("policy_changed")
    assert peers.end == "closed"
    assert peers.details[-1] == "connection_denied"


def test_denied_grpc_call_gets_trailers_only():
    """grpc/doc/PROTOCOL-HTTP2.md."""
    peers = Peers(denied_body="100% no")
    peers.request(1, b"/demo/Call", GRPC, method=b"POST", end=False).flush()
    answer = peers.answers[1]
    assert answer["head"] == {
        b":status": b"200", b"content-type": b"application/grpc", b"grpc-status": b"7",
        b"grpc-message": b"100%25 no",
    }  # fmt: skip
    assert "body" not in answer
    assert answer["ended"]
    assert peers.records[0].status == 403


@pytest.mark.parametrize(
    ("extra", "pseudo", "detail"),
    [
        ([], {"path": b"/public/a b"}, "http1.invalid_url"),
        ([], {"path": b"/public/\ta"}, "http1.invalid_url"),
        ([], {"path": b"http://s/public/a"}, "http1.invalid_url"),
        ([], {"path": b"*"}, "http1.invalid_url"),
        ([], {"path": b"/public/a#b"}, "path_with_fragment"),
        ([], {"path": b"/public/%2fa"}, "path_with_escaped_slashes_rejected"),
        ([], {"scheme": b"http://s/public/a?"}, "http2.violation.of.messaging.rule"),
        ([], {"authority": b"user@s"}, "http1.invalid_host"),
        ([], {"authority": b"s/x"}, "http1.invalid_host"),
        ([(b"x", b"y")] * 100, {}, "http1.too_many_headers"),
        ([(b"cookie", b"a=b")] * 100, {}, "http1.too_many_headers"),
        ([(b"x", b"\x7f")], {}, "http1.invalid_characters"),
        ([(b"x(", b"y")], {}, "http1.invalid_header_name"),
        ([(b"http2-settings", b"AAMAAABkAAQAAP__")], {}, "http2.violation.of.messaging.rule"),
        ([(b"content-length", b"5")], {}, "http1.invalid_content_length"),
        ([(b"expect", b"magic")], {}, "expectation_failed"),
    ],
)
def test_request_with_several_readings_is_refused_on_its_stream(extra, pseudo, detail):
    """And the stream beside it is served."""
    peers = Peers()
    path = pseudo.pop("path", b"/public/a") if "path" in pseudo else b"/public/a"
    try:
        peers.request(1, path, *extra, **pseudo).request(3).flush()
    except h2.exceptions.ProtocolError:
        pytest.fail("the client's codec refused to send it")
    if peers.end:  # the library found it first
        assert peers.details == ["http2.protocol_error"]
        assert peers.seen == []
        return
    assert peers.details[0] == detail
    assert peers.status(1) in {400, 417, 431}
    assert peers.status(3) == 200
    assert len(peers.seen) == 1


@pytest.mark.parametrize(
    "extra",
    [[(b"connection", b"close")], [(b"te", b"gzip")], [(b"transfer-encoding", b"chunked")],
     [(b"host", b"other")], [(b"X-Upper", b"y")], [(b"x", b"a\r\nb: c")], [(b"x", b" y")],
     [(b":path", b"/public/b")]],
)  # fmt: skip
def test_nothing_of_a_malformed_field_list_reaches_the_server(extra):
    """RFC 9113 8.2, 8.3."""
    peers = Peers()
    codec = peers.client
    fields = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/public/a"),
              (b":authority", b"s"), *extra]  # fmt: skip
    block = codec.encoder.encode(fields)
    peers.flush().raw(frame(1, 1, block, 0x5))
    assert peers.seen == []
    assert peers.status(1) == 400 or peers.end


def test_connect_is_refused():
    peers = Peers()
    peers.client.send_headers(1, [(b":method", b"CONNECT"), (b":authority", b"s:80")])
    peers.flush()
    assert peers.seen == []
    assert peers.status(1) == 403 or peers.end


def test_host_may_stand_for_the_authority_and_cookies_are_joined():
    peers = Peers()
    cookies = [(b"cookie", b"a=1"), (b"cookie", b"b=2")]
    peers.request(1, b"/public/a", (b"host", b"h"), *cookies, authority=None).flush()
    assert dict(peers.seen[0][2]) == {b"host": b"h", b"cookie": b"a=1; b=2"}


@pytest.mark.parametrize(
    "trailer", [(b"content-length", b"3"), (b"host", b"h"), (b"x", b"\x7f"), (b"te", b"trailers")]
)
def test_trailers_that_could_change_the_request_end_it(trailer):
    """RFC 9110 6.5.1; nothing of the request may look complete to the server."""
    peers = Peers(H2Server, source=snapshot(rules=CALLS))
    peers.request(1, b"/demo/A", GRPC, method=b"POST", end=False)
    peers.client.send_data(1, b"m")
    peers.flush()
    block = peers.client.encoder.encode([trailer])
    peers.raw(frame(1, 1, block, 0x5))
    assert peers.details[-1] in {"http1.invalid_trailer", "downstream_remote_disconnect"}
    assert "trailers" not in peers.answers[1]
    assert not [detail for detail in peers.details if detail.startswith("internal")]


def test_trailers_of_the_request_are_passed_on():
    peers = Peers(H2Server, source=snapshot(rules=CALLS))
    peers.request(1, b"/demo/A", GRPC, method=b"POST", end=False).flush()
    peers.client.send_headers(1, [(b"x-sum", b"1")], end_stream=True)
    peers.flush()
    assert peers.status(1) == 200


def test_server_that_never_speaks_is_given_up_after_the_connect_timeout():
    class Silent(H2Server):
        def receive(self, data):
            return b""

    peers = Peers(Silent, source=snapshot(rules=CALLS))
    peers.request(1, b"/demo/A", GRPC, method=b"POST").flush()
    peers.tick(6.0)
    assert peers.answers[1]["head"][b"grpc-status"] == b"14"
    assert peers.servers == {}
    peers.server = H2Server
    peers.request(3, b"/demo/A", GRPC, method=b"POST").flush()
    assert peers.status(3) == 200


# --- ways to the server --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "sent"),
    [((), (b"transfer-encoding", b"chunked")),
     (((b"content-length", b"6"),), (b"content-length", b"6"))],
)  # fmt: skip
def test_body_for_a_server_of_http1_has_one_framing(extra, sent):
    peers = Peers(source=snapshot(rules=None, plain=True))
    peers.request(1, b"/x", *extra, method=b"POST", end=False)
    peers.client.send_data(1, b"abc")
    peers.client.send_data(1, b"def", end_stream=True)
    peers.flush()
    assert peers.seen[0][3] == b"abcdef"
    assert sent in peers.seen[0][2]
    assert peers.status(1) == 200


def test_connection_of_http1_is_used_again_by_later_streams():
    peers = Peers()
    for number in (1, 3, 5):
        peers.request(number).flush()
    assert peers.commands.count("open") == 1
    assert len(peers.seen) == 3


def test_grpc_goes_by_http2_with_its_trailers():
    peers = Peers(H2Server, source=snapshot(rules=CALLS))
    peers.request(1, b"/demo/A", GRPC, (b"te", b"trailers"), method=b"POST", end=False)
    peers.client.send_data(1, b"m", end_stream=True)
    peers.flush()
    assert peers.seen[0][1:2] == [b"/demo/A"]
    assert {(b":scheme", b"http"), (b"te", b"trailers")} <= set(peers.seen[0][2])
    assert peers.seen[0][3] == b"m"
    assert peers.answers[1]["trailers"] == {b"grpc-status": b"0"}
    peers.request(3).flush()  # the server has spoken HTTP/2, so this goes there too
    assert peers.status(3) == 200
    assert peers.commands.count("open") == 1


@pytest.mark.parametrize("kind", [b"application/grpc-web", b"application/grpc-web+proto"])
def test_grpc_web_is_an_ordinary_request(kind):
    """PROTOCOL-WEB.md: it asks servers of HTTP/1.1 as well, and reads no trailers of HTTP/2."""
    peers = Peers(source=snapshot(rules=CALLS))
    peers.request(1, b"/demo/A", (b"content-type", kind), method=b"POST").flush()
    peers.request(3, b"/else", (b"content-type", kind), method=b"POST").flush()
    assert (peers.status(1), peers.status(3)) == (200, 403)


def test_streams_wait_for_the_servers_limit():
    """RFC 9113 5.1.2: its SETTINGS may allow fewer streams than ours."""
    peers = Peers(
        lambda seen: H2Server(seen, MAX_CONCURRENT_STREAMS=1), source=snapshot(rules=CALLS)
    )
    for number in (1, 3, 5):
        peers.request(number, b"/demo/A", GRPC, method=b"POST")
    peers.flush()
    assert [peers.status(number) for number in (1, 3, 5)] == [200] * 3


class OldServer(H1Server):
    """Refuses the preface as a server of HTTP/1 does."""

    def receive(self, data):
        if data.startswith(b"PRI"):
            assert data.startswith(PREFACE)
            return b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
        return super().receive(data)


def test_server_without_http2_gets_the_requests_by_http1():
    """`prefer`; nothing was sent before the server showed what it speaks."""
    peers = Peers(OldServer, source=snapshot(rules=CALLS), h2_upstream="prefer")
    peers.request(1).request(3).flush()
    assert [peers.status(1), peers.status(3)] == [200, 200]
    assert len(peers.seen) == 2
    peers.request(5, b"/demo/A", GRPC, method=b"POST").flush()
    assert peers.answers[5]["head"][b"grpc-status"] == b"14"


def test_server_that_refuses_is_told_of_as_502():
    peers = Peers()
    peers.refuse = True
    peers.request(1).flush()
    assert peers.status(1) == 502
    assert not peers.end


@pytest.mark.parametrize(
    ("answer", "status", "reset"),
    [(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", 502, None),
     (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZ\r\n", 0, 2),
     (b"HTTP/1.1 204 No Content\r\n\r\n", 204, None),
     (b"HTTP/1.1 999 Denied\r\nContent-Length: 0\r\n\r\n", 999, None),
     (b"HTTP/1.1 099 No\r\nContent-Length: 0\r\n\r\n", 502, None),
     (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 304 Not Modified\r\n\r\n", 304, None)],
)  # fmt: skip
def test_answers_of_servers_are_read_strictly(answer, status, reset):
    peers = Peers(lambda seen: H1Server(seen, answer))
    peers.request(1).flush()
    assert peers.status(1) == status
    assert peers.answers[1].get("reset") == reset
    assert ("interim" in peers.answers[1]) is (status == 304)


# --- windows -------------------------------------------------------------------------------------


def test_answer_waits_for_the_clients_window_and_its_server_is_not_read():
    body = b"x" * 200_000
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + body[:100_000]
    peers = Peers(lambda seen: H1Server(seen, answer), client_settings={"INITIAL_WINDOW_SIZE": 10})
    peers.request(1).flush()
    assert peers.answers[1]["body"] == b"x" * 10
    assert "pause-upstream" in peers.commands
    peers.client.increment_flow_control_window(500_000)
    peers.client.increment_flow_control_window(500_000, 1)
    peers.flush()
    assert len(peers.answers[1]["body"]) == 100_000
    assert "resume-upstream" in peers.commands
    peers.perform("upstream_data", body[100_000:], 1)
    assert peers.answers[1]["body"] == body
    assert peers.answers[1]["ended"]


def test_stream_whose_window_stays_shut_is_reset():
    peers = Peers(client_settings={"INITIAL_WINDOW_SIZE": 0}, stream_idle_timeout_s=5.0)
    peers.request(1).flush()
    peers.tick(6.0)
    assert peers.answers[1]["reset"] == 2
    assert peers.details[-1] == "client_flush_timeout"


def test_window_is_given_back_when_the_server_has_taken_the_bytes():
    peers = Peers(source=snapshot(rules=None, plain=True))
    peers.request(1, method=b"POST", end=False).flush()
    peers._apply(peers.core.upstream_blocked(True, peers.now, 1))
    for _ in range(3):
        peers.client.send_data(1, b"x" * 16_384)
    peers.flush()
    shut = peers.client.local_flow_control_window(1)
    assert shut == 65_535 - 3 * 16_384
    peers._apply(peers.core.upstream_blocked(False, peers.now, 1))
    assert peers.client.local_flow_control_window(1) == 65_535


def test_body_of_a_denied_stream_does_not_take_the_connections_window():
    peers = Peers()
    number = 1
    for number in range(1, 99, 2):
        peers.request(number, b"/admin", method=b"POST", end=False)
        peers.client.send_data(number, b"x" * 16_000)
        peers.flush()
        assert peers.status(number) == 403
    peers.request(number + 2).flush()
    assert peers.status(number + 2) == 200
    assert peers.client.outbound_flow_control_window > 400_000


# --- floods and ends -----------------------------------------------------------------------------


def test_rapid_reset_ends_the_connection_and_bounds_the_servers_work():
    """CVE-2023-44487."""
    silent = lambda seen: H1Server(seen, b"")
    peers = Peers(silent)
    for number in range(1, 1001, 2):
        peers.request(number)
        peers.client.reset_stream(number)
    peers.flush()
    assert "http2.premature_resets" in peers.details
    assert len(peers.seen) <= 101
    assert peers.goaway == 11
    assert peers.servers == {}
    assert peers.end == "shutdown"


def test_resets_that_the_client_provokes_are_counted():
    """CVE-2025-8671: a WINDOW_UPDATE that overflows a stream's window."""
    peers = Peers(lambda seen: H1Server(seen, b""), h2_reset_count=20)
    for number in range(1, 101, 2):
        if peers.end:
            break
        peers.request(number).flush()
        peers.raw(frame(8, number, (0x7FFF_FFFF).to_bytes(4, "big")))
    assert peers.end == "shutdown"
    assert len(peers.seen) <= 21


@pytest.mark.parametrize(
    ("flood", "detail"),
    [
        (frame(4) * 1001, "http2.inbound_control_frames_flood"),
        (frame(6, 0, b"12345678") * 1001, "http2.inbound_control_frames_flood"),
        (frame(0xBB) * 1001, "http2.inbound_control_frames_flood"),
        (frame(2, 1, b"\0\0\0\0\x10") * 301, "http2.inbound_priority_frames_flood"),
        (frame(8, 0, b"\0\0\0\1") * 41, "http2.inbound_window_update_frames_flood"),
        (frame(1, 5, b"", 0) + frame(9, 5, b"") * 20, "http2.inbound_empty_frames_flood"),
        (frame(1, 5, b"\x00", 0) + frame(9, 5, b"\x00") * 20, "http2.continuation_flood"),
        (frame(1, 5, b"\x00" * 16_384, 0) + frame(9, 5, b"\x00" * 16_384) * 3,
         "http2.continuation_flood"),
        (b"\x00\x40\x01\x00\x00\x00\x00\x00\x05", "http2.protocol_error"),
        (frame(0, 0, b"x"), "http2.protocol_error"),
        (frame(1, 5, b"\xff\xff\xff", 5), "http2.protocol_error"),
    ],
)  # fmt: skip
def test_flood_ends_the_connection(flood, detail):
    peers = Peers()
    peers.request(1).flush()
    peers.raw(flood)
    assert detail in peers.details
    assert peers.goaway
    assert peers.end == "shutdown"
    peers.raw(b"anything")
    peers.tick(2.0)
    assert peers.end == "closed"


def test_empty_data_frames_are_counted():
    """CVE-2019-9518."""
    peers = Peers(source=snapshot(rules=None, plain=True))
    peers.request(1, method=b"POST", end=False).flush()
    peers.raw(frame(0, 1) * 11)
    assert "http2.inbound_empty_frames_flood" in peers.details


def test_padding_alone_is_an_empty_frame():
    peers = Peers(source=snapshot(rules=None, plain=True))
    peers.request(1, method=b"POST", end=False).flush()
    peers.raw(frame(0, 1, b"\x03\0\0\0", 0x8) * 11)
    assert "http2.inbound_empty_frames_flood" in peers.details


def test_header_block_that_drips_is_ended():
    """Slowloris in frames: CONTINUATION never comes."""
    peers = Peers()
    peers.flush()
    peers.raw(frame(1, 1, b"\x82", 0))
    peers.tick(5.0)
    peers.raw(frame(9, 1, b"\x84", 0))
    peers.tick(6.0)
    assert "request_header_timeout" in peers.details


def test_idle_connection_is_closed_with_goaway():
    peers = Peers()
    peers.request(1).flush()
    peers.tick(301.0)
    assert peers.goaway == 0
    assert peers.end == "shutdown"


def test_drain_answers_what_has_begun_and_takes_nothing_new():
    peers = Peers(lambda seen: H1Server(seen, b""))
    peers.request(1).flush()
    peers.perform("drain")
    assert peers.goaway == 0
    peers.request(3, b"/admin").flush()  # it was on its way when we announced the end
    assert peers.status(3) == 403
    peers.perform("finish")
    peers.request(5).flush()
    assert peers.answers[5]["reset"] == 7  # REFUSED_STREAM: it may be tried elsewhere
    assert not peers.end
    peers.perform("upstream_data", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 1)
    assert peers.status(1) == 200
    assert peers.end == "shutdown"


def test_client_that_leaves_takes_its_requests_with_it():
    peers = Peers(lambda seen: H1Server(seen, b""))
    peers.request(1).request(3).flush()
    peers.perform("client_lost")
    assert peers.servers == {}
    assert peers.details[-2:] == ["downstream_remote_disconnect"] * 2


def test_preface_may_come_byte_by_byte_and_must_be_whole():
    peers = Peers()
    peers.request(1)
    for byte in peers.client.data_to_send():
        peers.raw(bytes((byte,)))
    assert peers.status(1) == 200
    other = Peers()
    other.raw(PREFACE[:16] + b"Host: s\r\n\r\n")
    assert other.details == ["http2.protocol_error"]


# --- any bytes -----------------------------------------------------------------------------------

FRAMES = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0xBB]),
        st.sampled_from([0, 1, 1, 3, 5, 2]),
        st.sampled_from([b"", b"\x82", b"\0\0\0\1", b"\0\0\0\x0812345678", b"\0\0\0\0\x10",
                         b"\x82\x86\x41\x01s\x44\x06/admin", b"\x82\x86\x41\x01s\x44\x09/public/a",
                         b"\x83\x86\x41\x01s\x44\x09/public/b", b"\0\4\0\0\0\0"])
        | st.binary(max_size=12),
        st.sampled_from([0, 1, 4, 5, 5, 8, 0x20, 0x25]),
    ),
    max_size=12,
)  # fmt: skip


@given(FRAMES, st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_frames_are_survived_and_only_allowed_requests_are_sent(frames, silent):
    peers = Peers(lambda seen: H1Server(seen, b"" if silent else None))
    stream = PREFACE + frame(4) + b"".join(frame(*f[:3], f[3]) for f in frames)
    # The client's codec, which sent none of this, does not know the streams that are answered.
    with contextlib.suppress(h2.exceptions.ProtocolError):
        peers.raw(stream)
    assert not [detail for detail in peers.details if detail.startswith("internal_error")]
    for method, target, *_ in peers.seen:
        assert method == b"GET"
        assert target == b"/" or target.startswith(b"/public/")
    peers.perform("client_lost")
    assert peers.servers == {}
