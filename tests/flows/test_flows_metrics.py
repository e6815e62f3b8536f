"""Hubble's metric names and labels (research/ux.md a.6)."""

import pytest
from flow_samples import SYN_ACK, allowed, note, packet, question, request, response

from conntrack.address import parse_address
from firewall.flows import metrics
from firewall.flows.metrics import FlowMetrics
from firewall.policy.verdict import DropReason, TrafficDirection, Verdict


def counted(*events):
    """Return every sample above zero as text, without the histogram's buckets and time stamps."""
    counts = FlowMetrics()
    for event in events:
        counts.observe(note(event))
    return samples(counts)


def samples(counts):
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in counts.text().decode().splitlines()
        if not line.startswith("#") and "_created" not in line and "_bucket" not in line
    }


def test_a_denied_packet_is_a_drop_and_a_verdict():
    assert counted(packet()) == {
        'hubble_flows_processed_total{subtype="",type="PolicyVerdict",verdict="DROPPED"}': 1.0,
        'hubble_drop_total{protocol="TCP",reason="Policy denied"}': 1.0,
        'hubble_policy_verdicts_total{action="dropped",direction="ingress",match="none"}': 1.0,
    }


def test_an_allowed_packet_counts_its_port_and_flag():
    assert counted(allowed(), allowed()) == {
        'hubble_flows_processed_total{subtype="",type="PolicyVerdict",verdict="FORWARDED"}': 2.0,
        'hubble_policy_verdicts_total{action="forwarded",direction="ingress",match="l3-l4"}': 2.0,
        'hubble_tcp_flags_total{family="IPv4",flag="SYN"}': 2.0,
        'hubble_port_distribution_total{port="80",protocol="TCP"}': 2.0,
    }


def test_an_answered_syn_is_told_apart():
    """Missing SYN-ACKs are a panel of Hubble's dashboard."""
    found = counted(allowed(tcp_flags=SYN_ACK, reply=True))
    assert found['hubble_tcp_flags_total{family="IPv4",flag="SYN-ACK"}'] == 1.0
    assert not any("port_distribution" in name for name in found)


def test_a_drop_that_is_no_policys_has_its_own_reason():
    found = counted(packet(drop_reason=DropReason.INVALID_SOURCE_IP, direction=0))
    assert found['hubble_drop_total{protocol="TCP",reason="Invalid source ip"}'] == 1.0
    assert not any("policy_verdicts" in name for name in found)


def test_icmp_and_the_world_have_counters():
    found = counted(
        allowed(
            protocol=1, icmp_type=8, icmp_code=0, direction=TrafficDirection.EGRESS,
            destination=parse_address("1.1.1.1"), destination_identity=2, destination_endpoint=0,
        )
    )  # fmt: skip
    assert found['hubble_icmp_total{family="IPv4",type="EchoRequest"}'] == 1.0
    assert found['hubble_flows_to_world_total{protocol="ICMPv4",verdict="FORWARDED"}'] == 1.0


def test_a_request_is_counted_once_by_its_answer():
    """httpV2: from the request's point of view, with the status the client got."""
    found = counted(
        request(verdict=Verdict.ACCEPT, drop_reason=0, method="POST"),
        response(),
        request(),
        response(verdict=Verdict.DROP, method="PUT", code=403),
    )
    requests = {name: count for name, count in found.items() if "http_requests" in name}
    labels = 'method="{}",protocol="HTTP/1.1",reporter="server",status="{}"'
    assert requests == {
        f"hubble_http_requests_total{{{labels.format('POST', 200)}}}": 1.0,
        f"hubble_http_requests_total{{{labels.format('PUT', 403)}}}": 1.0,
    }
    durations = 'hubble_http_request_duration_seconds_sum{method="POST",reporter="server"}'
    assert found[durations] == pytest.approx(0.0017)
    verdicts = 'hubble_policy_verdicts_total{action="dropped",direction="ingress",match="l7/http"}'
    assert found[verdicts] == 1.0


def test_what_a_peer_chooses_cannot_grow_the_series():
    methods = [response(method=f"M{n}") for n in range(50)]
    found = counted(*methods)
    assert sum("http_requests_total" in name for name in found) == 1
    assert any('method="other"' in name for name in found)


def test_ports_beyond_the_limit_are_counted_together(monkeypatch):
    monkeypatch.setattr(metrics, "PORTS_MAX_COUNT", 3)
    found = counted(*(allowed(destination_port=port) for port in (1, 2, 3, 4, 5, 1)))
    ports = {name: count for name, count in found.items() if "port_distribution" in name}
    assert len(ports) == 4
    assert ports['hubble_port_distribution_total{port="other",protocol="TCP"}'] == 2.0
    assert ports['hubble_port_distribution_total{port="1",protocol="TCP"}'] == 2.0


def test_lost_flows_are_counted_by_where_they_were_lost():
    counts = FlowMetrics()
    counts.lost("HUBBLE_RING_BUFFER", 5)
    counts.lost("HUBBLE_RING_BUFFER", 2)
    assert samples(counts) == {'hubble_lost_events_total{source="hubble_ring_buffer"}': 7.0}


def test_every_metric_is_there_before_the_first_flow():
    """A dashboard that finds no metric shows an error instead of a zero."""
    text = FlowMetrics().text().decode()
    for name in (
        "lost_events_total", "flows_processed_total", "drop_total", "policy_verdicts_total",
        "http_requests_total", "http_request_duration_seconds", "tcp_flags_total", "icmp_total",
        "port_distribution_total", "flows_to_world_total",
    ):  # fmt: skip
        assert f"# TYPE hubble_{name} " in text


def test_dns_questions_and_answers_have_hubbles_counters():
    answer = {"kind": "response", "addresses": (parse_address("192.0.2.1"),)}
    refused = {"verdict": Verdict.DROP, "drop_reason": DropReason.POLICY_DENIED, "rcode": 5}
    found = counted(
        question(),
        question(**answer),
        question(kind="response", rcode=3),
        question(**refused),
        question(**refused),
    )
    assert {name: value for name, value in found.items() if "hubble_dns" in name} == {
        'hubble_dns_queries_total{ips_returned="0",qtypes="A",rcode=""}': 1.0,
        'hubble_dns_queries_total{ips_returned="0",qtypes="A",rcode="Policy denied"}': 2.0,
        'hubble_dns_responses_total{ips_returned="1",qtypes="A",rcode="No Error"}': 1.0,
        'hubble_dns_responses_total{ips_returned="0",qtypes="A",rcode="Non-Existent Domain"}': 1.0,
    }
    assert (
        found['hubble_policy_verdicts_total{action="dropped",direction="egress",match="l7/dns"}']
        == 2.0
    )
