"""Records as flow events, and what is counted of them."""

from http_transcript import Script, snapshot

from firewall.policy.verdict import DropReason, TrafficDirection, Verdict
from l7proxy.accesslog import Ends, http_event, is_final
from l7proxy.commands import Log
from l7proxy.metrics import Metrics, all_refusals, counted_details
from l7proxy.plan import Policy
from l7proxy.policy import ConnectionJudge

ENDS = Ends(bytes((10, 0, 1, 1)), 5000, bytes((10, 0, 2, 1)), 80)


def records(*events, **limits):
    script = Script(snapshot(), **limits)
    for event, *arguments in events:
        script.perform(event, *arguments)
        script.now += 0.25
    return [command.record for command in script.commands if isinstance(command, Log)]


def get(path=b"/public/a", headers=b""):
    return b"GET %b HTTP/1.1\r\nHost: svc\r\n%b\r\n" % (path, headers)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


def test_allowed_request_and_its_response_share_an_id_and_name_the_rule():
    request, response = records(
        ("client_data", get()), ("upstream_opened",), ("upstream_data", OK), request_id=True
    )
    first, second = http_event(request, ENDS, 7), http_event(response, ENDS, 8)
    assert (first.kind, first.code, first.verdict) == ("request", 0, Verdict.ACCEPT)
    assert (second.kind, second.code, second.latency_ns) == ("response", 200, 500_000_000)
    assert first.request_id == second.request_id == "id-1"
    assert first.url == "http://svc/public/a"
    assert first.allowed_by[0].name == "public"
    assert (first.source_identity, first.destination_endpoint) == (1001, 2)


def test_denied_request_is_one_event_with_the_rules_that_refused_it():
    (record,) = records(("client_data", get(b"/admin")))
    event = http_event(record, ENDS, 7)
    assert (event.verdict, event.drop_reason) == (Verdict.DROP, DropReason.POLICY_DENIED)
    assert (event.direction, event.code) == (TrafficDirection.INGRESS, 0)
    assert event.denied_by[0].name == event.isolated_by[0].name == "public"
    assert is_final(record)


def test_malformed_request_is_one_event_without_its_bytes():
    (record,) = records(("client_data", b"GET /\x1b[2J HTTP/1.1\r\n\r\n"))
    event = http_event(record, ENDS, 7)
    assert event.drop_reason == DropReason.INVALID_PACKET_DROPPED
    assert (event.method, event.url, event.detail) == ("", "", "http1.invalid_url")


def test_malformed_request_is_told_with_the_identities_of_its_connection():
    policy = Policy()
    policy.install(snapshot())
    connection = ConnectionJudge(policy, ENDS.source, ENDS.destination, 80).connection()
    (record,) = records(("client_data", b"GET /a/%2f HTTP/1.1\r\nHost: svc\r\n\r\n"))
    event = http_event(record, ENDS, 7, connection)
    assert (event.source_identity, event.destination_identity) == (1001, 1002)
    assert (event.source_endpoint, event.destination_endpoint) == (1, 2)
    assert (event.verdict, event.drop_reason) == (
        Verdict.DROP, DropReason.INVALID_PACKET_DROPPED,
    )  # fmt: skip
    assert event.allowed_by == event.denied_by == event.isolated_by == ()


def test_counters_follow_from_records():
    metrics = Metrics()
    for record in records(
        ("client_data", get(b"/admin")),
        ("client_data", get()),
        ("upstream_opened",),
        ("upstream_data", OK),
        ("client_data", get()),
        ("upstream_data", OK.replace(b"200", b"999")),
        ("client_data", b"GET /\r\n"),
    ):
        metrics.observe(record)
    found = {
        (row["name"], *row["labels"].values()): row["value"] for row in metrics.rows()
    }  # fmt: skip
    assert found["http_downstream_rq_total",] == 4
    assert found["http_downstream_rq_xx_total", "2xx"] == 1
    assert found["http_downstream_rq_xx_total", "5xx"] == 1
    assert found["http_downstream_rq_xx_total", "4xx"] == 2
    assert found["policy_l7_total", "envoy", "denied"] == 1
    assert found["policy_l7_total", "envoy", "parse_errors"] == 1
    assert found["http_response_details_total", "access_denied"] == 1


def test_every_refusal_has_a_detail_of_its_own():
    details = [refusal.detail for refusal in all_refusals()]
    assert len(details) == len(set(details))
    assert counted_details() <= set(details)
