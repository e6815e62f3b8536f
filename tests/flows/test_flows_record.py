"""Flow records are Hubble's JSON (research/ux.md a.4, flow.proto)."""

import json

import pytest
from flow_samples import (
    AT_NS,
    RULE,
    SYN_ACK,
    allowed,
    flow,
    packet,
    question,
    request,
    response,
)
from hypothesis import given
from hypothesis import strategies as st

from conntrack.address import parse_address
from firewall.flows.compact import line
from firewall.flows.filters import Filter, Term
from firewall.flows.record import (
    FlowError,
    format_time,
    from_json,
    lost,
    parse_time,
    to_json,
)
from firewall.policy.verdict import DropReason, PolicyMatch, TrafficDirection, Verdict


def decoded(event):
    return json.loads(to_json(flow(event)))["flow"]


def test_a_denied_packet_is_the_record_that_hubble_would_write():
    """The target line of research/ux.md a.4; only uuid and extensions are ours."""
    record = decoded(packet())
    uuid = record.pop("uuid")
    record.pop("extensions")
    assert record == {
        "time": "2026-11-22T13:31:12.129456789Z",
        "verdict": "DROPPED",
        "drop_reason": 133,
        "IP": {"source": "10.0.0.30", "destination": "10.0.0.147", "ipVersion": "IPv4"},
        "l4": {"TCP": {"source_port": 54842, "destination_port": 80, "flags": {"SYN": True}}},
        "source": {
            "ID": 3184,
            "identity": 22654,
            "namespace": "default",
            "labels": [
                "k8s:class=xwing",
                "k8s:io.kubernetes.pod.namespace=default",
                "k8s:org=alliance",
            ],
            "pod_name": "xwing",
        },
        "destination": {
            "ID": 232,
            "identity": 16530,
            "namespace": "default",
            "labels": [
                "k8s:class=deathstar",
                "k8s:io.kubernetes.pod.namespace=default",
                "k8s:org=empire",
            ],
            "pod_name": "deathstar",
        },
        "Type": "L3_L4",
        "node_name": "lab0",
        "event_type": {"type": 5},
        "traffic_direction": "INGRESS",
        "drop_reason_desc": "POLICY_DENIED",
        "is_reply": False,
        "Summary": "TCP Flags: SYN",
    }
    assert len(uuid) == 36


def test_a_line_wraps_the_flow_with_node_and_time():
    line = to_json(flow())
    assert b"\n" not in line
    outer = json.loads(line)
    assert set(outer) == {"flow", "node_name", "time"}
    assert outer["node_name"] == "lab0"
    assert outer["time"] == outer["flow"]["time"]


def test_zero_values_are_left_out_and_an_unknown_reply_too():
    """proto3 JSON; is_reply is a wrapper, so only unknown is absent."""
    record = decoded(packet(reply=None, source_port=0))
    assert "is_reply" not in record
    assert "source_port" not in record["l4"]["TCP"]
    assert "policy_match_type" not in record
    assert "proxy_port" not in record


def test_64_bit_integers_are_text():
    assert decoded(response())["l7"]["latency_ns"] == "1700000"
    assert decoded(allowed())["ingress_allowed_by"][0]["revision"] == "7"


def test_who_allowed_is_named_once_per_policy():
    other_rule = RULE.__class__("CiliumNetworkPolicy", "default", "rule1", "spec.ingress[1]")
    record = decoded(allowed(ingress_allowed_by=(RULE, other_rule)))
    assert record["ingress_allowed_by"] == [
        {
            "name": "rule1",
            "namespace": "default",
            "labels": ["k8s:io.cilium.k8s.policy.name=rule1"],
            "revision": "7",
            "kind": "CiliumNetworkPolicy",
        }
    ]
    assert record["policy_match_type"] == 2
    assert record["verdict"] == "FORWARDED"


def test_a_default_deny_says_who_isolated_the_endpoint_and_where_it_is_written():
    """Cilium leaves a default deny unnamed (cilium#42044); extensions hold what Hubble cannot."""
    record = decoded(packet(isolated_by=(RULE,), detail="x"))
    assert "ingress_denied_by" not in record
    assert record["extensions"] == {
        "@type": "type.googleapis.com/google.protobuf.Struct",
        "value": {
            "why": "no ingress rule allows it: default deny by rule1 (CiliumNetworkPolicy) "
            "sw_l3_l4_policy.yaml:12",
            "isolated_by": [
                {
                    "kind": "CiliumNetworkPolicy",
                    "namespace": "default",
                    "name": "rule1",
                    "path": "spec.ingress[0]",
                    "file": "sw_l3_l4_policy.yaml",
                    "line": 12,
                    "column": 5,
                }
            ],
            "ct_state": "new",
            "detail": "x",
            "policy_revision": 7,
        },
    }


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (allowed(), "allowed by rule1 (CiliumNetworkPolicy) sw_l3_l4_policy.yaml:12"),
        (
            packet(drop_reason=DropReason.POLICY_DENY, ingress_denied_by=(RULE, RULE)),
            "denied by rule1 (CiliumNetworkPolicy) sw_l3_l4_policy.yaml:12 and 1 more",
        ),
        (packet(), "no ingress rule allows it: default deny"),
        (packet(drop_reason=DropReason.INVALID_SOURCE_IP), "Invalid source ip"),
        (
            allowed(ingress_allowed_by=(), match=PolicyMatch.ALL),
            "no policy restricts ingress of the endpoint",
        ),
        (request(), "no ingress rule allows it: default deny"),
    ],
)
def test_a_record_explains_itself_in_one_sentence(event, why):
    assert decoded(event)["extensions"]["value"]["why"] == why


@pytest.mark.parametrize(
    ("event", "verdict", "kind"),
    [
        (allowed(), "FORWARDED", {"type": 5}),
        (allowed(verdict=Verdict.REDIRECT, proxy_port=10001), "REDIRECTED", {"type": 5}),
        (allowed(audited=True, ingress_allowed_by=()), "AUDIT", {"type": 5}),
        (packet(drop_reason=DropReason.AUTH_REQUIRED), "DROPPED", {"type": 5}),
        (
            packet(drop_reason=DropReason.INVALID_SOURCE_IP, direction=0),
            "DROPPED",
            {"type": 1, "sub_type": 132},
        ),
        (allowed(direction=0), "FORWARDED", {"type": 4, "sub_type": 3}),
        (request(), "DROPPED", {"type": 129}),
        (response(), "FORWARDED", {"type": 129}),
    ],
)
def test_the_event_type_tells_policy_from_other_drops(event, verdict, kind):
    record = decoded(event)
    assert record["verdict"] == verdict
    assert record["event_type"] == kind


def test_an_audited_packet_was_not_dropped():
    """AUDIT carries no drop reason; what would have happened is explained."""
    record = decoded(packet(verdict=Verdict.ACCEPT, audited=True, isolated_by=(RULE,)))
    assert "drop_reason" not in record
    assert "drop_reason_desc" not in record
    assert record["extensions"]["value"]["why"].startswith("no ingress rule allows it")


def test_an_l7_deny_has_a_drop_reason():
    """cilium#22402: Hubble shows DROP_REASON_UNKNOWN there."""
    record = decoded(request())
    assert record["Type"] == "L7"
    assert record["drop_reason_desc"] == "POLICY_DENIED"
    assert record["l7"] == {
        "type": "REQUEST",
        "http": {
            "method": "PUT",
            "url": "http://deathstar.default.svc.cluster.local/v1/exhaust-port",
            "protocol": "HTTP/1.1",
        },
    }
    assert record["Summary"] == (
        "HTTP/1.1 PUT http://deathstar.default.svc.cluster.local/v1/exhaust-port"
    )


def test_a_connection_that_passes_unread_has_a_name_and_no_request():
    """Hubble has no word for it: what it lacks stands in the extensions."""
    event = request(
        protocol="TLS", method="", url="https://a.example", server_name="a.example",
        detail="server_name_denied",
    )  # fmt: skip
    record = decoded(event)
    assert record["l7"] == {"type": "REQUEST"}
    said = record["extensions"]["value"]
    assert (said["layer7"], said["server_name"]) == ("TLS", "a.example")
    assert record["Summary"] == "TLS a.example server_name_denied"
    assert " tls-request DROPPED " in line(flow(event))
    wanted = Filter([Term("protocol", "tls")])
    assert wanted(flow(event))
    assert wanted(flow(request(server_name="a.example")))
    assert not wanted(flow(request()))


def test_a_response_comes_from_the_server():
    record = decoded(response(headers=(("x-id", "1"),)))
    assert record["is_reply"] is True
    assert record["source"]["pod_name"] == "deathstar"
    assert record["destination"]["pod_name"] == "tiefighter"
    assert record["IP"]["source"] == "10.0.0.147"
    assert record["l4"]["TCP"] == {"source_port": 80, "destination_port": 33656}
    assert record["l7"]["http"]["code"] == 200
    assert record["l7"]["http"]["headers"] == [{"key": "x-id", "value": "1"}]
    assert record["Summary"] == "HTTP/1.1 200 1ms (POST http://deathstar/v1/request-landing)"


@pytest.mark.parametrize(
    ("fields", "l4", "summary"),
    [
        ({"protocol": 17}, {"UDP": {"source_port": 54842, "destination_port": 80}}, "UDP"),
        ({"protocol": 132}, {"SCTP": {"source_port": 54842, "destination_port": 80}}, "SCTP"),
        ({"tcp_flags": SYN_ACK}, None, "TCP Flags: SYN, ACK"),
        ({"tcp_flags": 0}, None, "TCP"),
        (
            {"protocol": 1, "icmp_type": 8, "icmp_code": 0},
            {"ICMPv4": {"type": 8}},
            "ICMPv4 EchoRequest",
        ),
        (
            {"protocol": 1, "icmp_type": 3, "icmp_code": 3},
            {"ICMPv4": {"type": 3, "code": 3}},
            "ICMPv4 DestinationUnreachable(Port)",
        ),
        (
            {"protocol": 58, "icmp_type": 135, "icmp_code": 0},
            {"ICMPv6": {"type": 135}},
            "ICMPv6 NeighborSolicitation",
        ),
        ({"protocol": 1, "icmp_type": 250, "icmp_code": 1}, None, "ICMPv4 250(1)"),
        ({"protocol": 47}, {}, "IP protocol 47"),
    ],
)
def test_the_summary_says_what_the_packet_was(fields, l4, summary):
    record = decoded(packet(**fields))
    assert record["Summary"] == summary
    if l4 is not None:
        assert record.get("l4", {}) == l4


def test_addresses_outside_get_their_dns_names_and_no_pod():
    record = decoded(
        packet(
            direction=TrafficDirection.EGRESS,
            destination=parse_address("1.1.1.1"),
            destination_identity=2,
            destination_endpoint=0,
        )
    )
    assert record["destination"] == {"identity": 2, "labels": ["reserved:world"]}
    assert record["destination_names"] == ["one.one.one.one"]
    assert record["traffic_direction"] == "EGRESS"


def test_the_namespace_of_an_unmanaged_peer_comes_from_its_labels():
    record = decoded(packet(source_endpoint=0))
    assert record["source"]["namespace"] == "default"
    assert "pod_name" not in record["source"]


def test_a_packet_that_could_not_be_parsed_has_no_addresses():
    record = decoded(
        packet(
            source=b"", destination=b"", protocol=0, direction=0,
            drop_reason=DropReason.CT_TRUNCATED_OR_INVALID_HEADER,
        )
    )  # fmt: skip
    assert "IP" not in record
    assert "l4" not in record
    assert record["event_type"] == {"type": 1, "sub_type": 135}


def test_equal_events_make_equal_records_and_others_do_not():
    """The id is derived from the event, so nothing random is in a record."""
    assert flow(packet()) == flow(packet())
    assert flow(packet()).uuid != flow(packet(source_port=1)).uuid
    assert flow().uuid[14] == "8"
    assert flow().uuid[19] in "89ab"


def test_a_record_stays_short_however_many_rules_agree():
    """Go's scanner stops at 64 KiB a line."""
    rules = tuple(
        RULE.__class__("CiliumNetworkPolicy", "default", f"rule{n}", f"spec.ingress[{n}]")
        for n in range(500)
    )
    line = to_json(flow(allowed(ingress_allowed_by=rules, isolated_by=rules)))
    assert len(line) < 16 * 1024


def test_what_was_written_reads_back():
    for event in (packet(isolated_by=(RULE,)), allowed(), request(), response()):
        assert from_json(to_json(flow(event))).flow == flow(event)


def test_a_line_of_hubble_reads_and_unknown_fields_are_ignored():
    """As Hubble's own reader does (io_reader_observer.go)."""
    line = (
        '{"flow":{"time":"2026-02-07T12:53:39.168Z","verdict":"FORWARDED","ethernet":'
        '{"source":"a"},"source":{"identity":1,"new_field":2},"extensions":'
        '{"@type":"type.googleapis.com/other","x":1},"event_type":{"type":4,"sub_type":3}},'
        '"node_name":"n","time":"2026-02-07T12:53:39.168Z"}'
    )
    read = from_json(line)
    assert read.flow.source.identity == 1
    assert parse_time(read.flow.time) == 1_770_468_819_168_000_000


@pytest.mark.parametrize("line", ["", "{}", "[]", "null", '{"flow":{"verdict":1}}', "{"])
def test_what_is_no_flow_is_refused(line):
    with pytest.raises(FlowError, match="not a flow"):
        from_json(line)


def test_lost_flows_are_a_record_too():
    line = to_json(lost("HUBBLE_RING_BUFFER", 3, first_ns=AT_NS, last_ns=AT_NS, node_name="lab0"))
    assert json.loads(line) == {
        "lost_events": {
            "source": "HUBBLE_RING_BUFFER",
            "num_events_lost": "3",
            "first": "2026-11-22T13:31:12.129456789Z",
            "last": "2026-11-22T13:31:12.129456789Z",
        },
        "node_name": "lab0",
        "time": "2026-11-22T13:31:12.129456789Z",
    }


@given(st.integers(0, 4_000_000_000 * 10**9))
def test_times_survive_writing_and_reading(time_ns):
    assert parse_time(format_time(time_ns)) == time_ns


@pytest.mark.parametrize("text", ["", "yesterday", "2026-02-07T12:53:39", "2026-02-07T12:53:39.Z"])
def test_a_time_without_zone_or_form_is_refused(text):
    with pytest.raises(ValueError, match=r"time|format"):
        parse_time(text)


def test_a_time_with_another_zone_is_the_same_moment():
    assert parse_time("2026-11-22T14:31:12.5+01:00") == parse_time("2026-11-22T13:31:12.500Z")


@given(
    st.fixed_dictionaries(
        {
            "protocol": st.integers(0, 255),
            "drop_reason": st.integers(0, 255),
            "icmp_type": st.integers(-1, 255),
            "icmp_code": st.integers(-1, 255),
            "tcp_flags": st.integers(0, 255),
            "match": st.integers(0, 7),
            "direction": st.integers(0, 3),
            "verdict": st.integers(0, 7),
            "audited": st.booleans(),
            "reply": st.none() | st.booleans(),
        }
    )
)
def test_any_event_makes_a_record_that_reads_back_and_prints(fields):
    """Property: a worker of a later version cannot make the agent fail."""
    made = flow(packet(**fields))
    assert from_json(to_json(made)).flow == made
    assert line(made, policy_names=True)


@pytest.mark.parametrize(("transport", "layer"), [(17, "UDP"), (6, "TCP")])
def test_a_dns_question_and_its_answer_are_hubbles_records(transport, layer):
    asked = decoded(question(transport=transport))
    assert asked["l7"] == {
        "type": "REQUEST",
        "dns": {"query": "api.example.", "observation_source": "proxy", "qtypes": ["A"]},
    }
    assert asked["l4"] == {layer: {"source_port": 33656, "destination_port": 53}}
    assert (asked["Type"], asked["traffic_direction"]) == ("L7", "EGRESS")
    assert asked["egress_allowed_by"][0]["name"] == "rule1"
    answered = decoded(
        question(
            kind="response",
            transport=transport,
            addresses=(parse_address("192.0.2.1"), parse_address("2001:db8::1")),
            ttl_s=30,
            cnames=("cdn.example.",),
            answer_types=("CNAME", "A"),
            latency_ns=5,
        )
    )
    assert answered["l7"] == {
        "type": "RESPONSE",
        "latency_ns": "5",
        "dns": {
            "query": "api.example.",
            "ips": ["192.0.2.1", "2001:db8::1"],
            "ttl": 30,
            "cnames": ["cdn.example."],
            "observation_source": "proxy",
            "qtypes": ["A"],
            "rrtypes": ["CNAME", "A"],
        },
    }
    assert answered["is_reply"] is True
    assert answered["IP"]["source"] == "203.0.113.53"
