"""Flows as Hubble prints them (research/ux.md a.3, hubble/pkg/printer)."""

from datetime import UTC, timedelta, timezone

import msgspec
import pytest
from flow_samples import AT_NS, RULE, SYN_ACK, allowed, flow, packet, request, response

from conntrack.address import parse_address
from firewall.flows.compact import (
    DICT_SEPARATOR,
    TIME_FORMATS,
    Style,
    dict_lines,
    escape,
    format_stamp,
    line,
    lost_line,
    table_lines,
)
from firewall.flows.flow import Dns, Layer7, Service
from firewall.flows.record import lost
from firewall.flows.summary import flow_text
from firewall.policy.verdict import DropReason, PolicyMatch, TrafficDirection, Verdict

XWING = "Nov 22 13:31:12.129: default/xwing:54842 (ID:22654)"
TIE = "Nov 22 13:31:12.129: default/tiefighter:54842 (ID:31028)"
FIGHTER = "Nov 22 13:31:12.129: default/tiefighter:33656 (ID:31028)"
STAR = "default/deathstar:80 (ID:16530)"


def shown(event, **style):
    return line(flow(event), zone=UTC, **style)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (packet(), f"{XWING} -> {STAR} policy-verdict:none INGRESS DENIED (TCP Flags: SYN)"),
        (
            packet(reply=None),
            f"{XWING} <> {STAR} policy-verdict:none INGRESS DENIED (TCP Flags: SYN)",
        ),
        (allowed(), f"{TIE} -> {STAR} policy-verdict:L3-L4 INGRESS ALLOWED (TCP Flags: SYN)"),
        (
            allowed(verdict=Verdict.REDIRECT, match=PolicyMatch.L4_ONLY),
            f"{TIE} -> {STAR} policy-verdict:L4-Only INGRESS ALLOWED (TCP Flags: SYN)",
        ),
        (
            packet(audited=True, verdict=Verdict.ACCEPT),
            f"{XWING} -> {STAR} policy-verdict:none INGRESS AUDITED (TCP Flags: SYN)",
        ),
        (
            packet(drop_reason=DropReason.INVALID_SOURCE_IP, direction=0),
            f"{XWING} -> {STAR} Invalid source ip DROPPED (TCP Flags: SYN)",
        ),
        (
            allowed(direction=0),
            f"{TIE} -> {STAR} to-stack FORWARDED (TCP Flags: SYN)",
        ),
        (
            request(),
            (
                f"{FIGHTER} -> {STAR} http-request DROPPED "
                "(HTTP/1.1 PUT http://deathstar.default.svc.cluster.local/v1/exhaust-port)"
            ),
        ),
        (
            response(),
            (
                f"{FIGHTER} <- {STAR} http-response FORWARDED "
                "(HTTP/1.1 200 1ms (POST http://deathstar/v1/request-landing))"
            ),
        ),
        (
            packet(protocol=1, icmp_type=8, icmp_code=0, source_port=0, destination_port=0),
            (
                "Nov 22 13:31:12.129: default/xwing (ID:22654) -> default/deathstar (ID:16530) "
                "policy-verdict:none INGRESS DENIED (ICMPv4 EchoRequest)"
            ),
        ),
    ],
)
def test_a_line_is_laid_out_as_hubble_does(event, text):
    assert shown(event) == text


def test_a_reply_is_printed_with_the_client_first():
    """`<-` and the sides exchanged."""
    event = allowed(
        source=parse_address("10.0.0.147"), source_identity=16530, source_endpoint=232,
        source_port=80, destination=parse_address("10.0.0.99"), destination_identity=31028,
        destination_endpoint=99, destination_port=54842, reply=True, tcp_flags=SYN_ACK,
    )  # fmt: skip
    assert shown(event).startswith(f"{TIE} <- {STAR} ")


def test_the_policies_that_decided_are_named_if_asked():
    """--print-policy-names, cilium#39453."""
    assert shown(allowed(), policy_names=True).endswith(
        "policy-verdict:L3-L4 INGRESS ALLOWED BY rule1 (CiliumNetworkPolicy) (TCP Flags: SYN)"
    )
    denied = packet(drop_reason=DropReason.POLICY_DENY, ingress_denied_by=(RULE,))
    assert " DENIED BY rule1 (CiliumNetworkPolicy) (TCP" in shown(denied, policy_names=True)
    egress = allowed(
        direction=TrafficDirection.EGRESS, ingress_allowed_by=(), egress_allowed_by=(RULE,)
    )
    assert "EGRESS ALLOWED BY rule1 " in shown(egress, policy_names=True)
    assert " BY " not in shown(allowed())


def test_a_default_deny_names_who_isolated_the_endpoint():
    """cilium#42044: upstream leaves the most frequent drop without a name."""
    text = shown(packet(isolated_by=(RULE, RULE)), policy_names=True)
    assert " DENIED BY default deny of rule1 (CiliumNetworkPolicy) (TCP Flags: SYN)" in text
    assert " BY " not in shown(packet(), policy_names=True)


def test_numeric_shows_addresses_and_brackets_ipv6():
    assert " 10.0.0.30:54842 (ID:22654) -> 10.0.0.147:80 " in shown(packet(), numeric=True)
    six = packet(source=parse_address("fd00::1"), destination=parse_address("fd00::2"))
    assert " [fd00::1]:54842 (ID:22654) -> [fd00::2]:80 " in shown(six, numeric=True)


def test_a_host_without_pod_shows_service_then_dns_name_then_address():
    outside = packet(
        destination=parse_address("1.1.1.1"), destination_endpoint=0, destination_identity=2
    )
    made = flow(outside)
    assert " one.one.one.one:80 (world) " in line(made)
    service = msgspec.structs.replace(made, destination_service=Service("dns", "kube-system"))
    assert " kube-system/dns:80 (world) " in line(service)
    bare = msgspec.structs.replace(made, destination_names=())
    assert " 1.1.1.1:80 (world) " in line(bare)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "(unknown)"), (1, "(host)"), (6, "(remote-node)"), (10, "(world-ipv6)"),
     (256, "(ID:256)"), (16777217, "(ID:16777217)")],
)  # fmt: skip
def test_reserved_identities_have_names(number, text):
    assert f" {text} -> " in shown(packet(source_identity=number))


def test_the_node_is_named_if_asked():
    assert shown(packet(), node_name=True).startswith("Nov 22 13:31:12.129 [lab0]: default/xwing")


def test_colours_only_if_asked_and_without_them_the_text_is_the_same():
    plain = shown(packet())
    coloured = shown(packet(), colour=True)
    assert "\x1b" not in plain
    assert "\x1b[31mDENIED\x1b[0m" in coloured
    assert "\x1b[36mdefault/xwing\x1b[0m:\x1b[33m54842\x1b[0m \x1b[35m(ID:22654)\x1b[0m" in coloured
    for code in (31, 32, 33, 35, 36, 0):
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured == plain


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\r\tc", r"a\x0ab\x0d\x09c"),
        ("\x7f\x9b", r"\x7f\x9b"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("größe", "größe"),
    ],
)
def test_control_characters_are_shown_and_not_sent(text, safe):
    assert escape(text) == safe


def test_a_hostile_url_cannot_reach_the_terminal():
    text = shown(request(url="http://x/\x1b]0;owned\x07\n2nd line"))
    assert "\x1b" not in text
    assert "\n" not in text
    assert r"http://x/\x1b]0;owned\x07\x0a2nd line" in text


def test_a_flow_without_anything_still_prints():
    bare = packet(
        source=b"", destination=b"", protocol=0, source_identity=0, destination_identity=0,
        source_endpoint=0, destination_endpoint=0, direction=0, reply=None,
        drop_reason=DropReason.CT_TRUNCATED_OR_INVALID_HEADER,
    )  # fmt: skip
    assert shown(bare) == (
        "Nov 22 13:31:12.129: (unknown) <> (unknown) CT: Truncated or invalid header DROPPED"
    )


def test_dns_is_summarised_as_hubble_does():
    """Lines of Hubble files print as well, whatever our own proxies report."""
    made = flow(response())
    question = Dns(query="x.org.", qtypes=("A",), observation_source="proxy")
    asked = Layer7(type="REQUEST", dns=question)
    answer = msgspec.structs.replace(question, ips=("10.1.1.1",), ttl=3)
    answered = Layer7(type="RESPONSE", dns=answer)
    missing = Layer7(type="RESPONSE", dns=msgspec.structs.replace(question, rcode=3))
    assert flow_text(msgspec.structs.replace(made, l7=asked)) == "DNS Query x.org. A"
    assert flow_text(msgspec.structs.replace(made, l7=answered)) == (
        'DNS Answer "10.1.1.1" TTL: 3 (Proxy x.org. A)'
    )
    assert flow_text(msgspec.structs.replace(made, l7=missing)) == (
        "DNS Answer RCode: Non-Existent Domain TTL: 0 (Proxy x.org. A)"
    )
    assert " dns-request proxy " in line(msgspec.structs.replace(made, l7=asked))


def test_dict_layout_has_right_aligned_keys():
    assert dict_lines(flow(), Style(zone=UTC, node_name=True)) == [
        "  TIMESTAMP: Nov 22 13:31:12.129",
        "       NODE: lab0",
        "     SOURCE: default/xwing:54842 (ID:22654)",
        "DESTINATION: default/deathstar:80 (ID:16530)",
        "       TYPE: policy-verdict:none INGRESS",
        "    VERDICT: DENIED",
        "    SUMMARY: TCP Flags: SYN",
    ]
    assert len(dict_lines(flow())) == 6
    assert DICT_SEPARATOR == "-" * 12


def test_table_layout_aligns_columns_and_is_never_coloured():
    rows = table_lines([flow(), flow(request())], Style(zone=UTC, colour=True))
    assert rows[0].split() == ["TIMESTAMP", "SOURCE", "DESTINATION", "TYPE", "VERDICT", "SUMMARY"]
    assert len({row.index("default/deathstar") for row in rows[1:]} | {rows[0].index("DEST")}) == 1
    assert not any("\x1b" in row for row in rows)
    assert table_lines([]) == ["TIMESTAMP   SOURCE   DESTINATION   TYPE   VERDICT   SUMMARY"]


def test_lost_flows_are_told_in_the_stream():
    text = lost_line(lost("HUBBLE_RING_BUFFER", 12, first_ns=AT_NS, last_ns=AT_NS), zone=UTC)
    assert text == (
        "Nov 22 13:31:12.129 EVENTS LOST: HUBBLE_RING_BUFFER 12 "
        "(first: Nov 22 13:31:12.129, last: Nov 22 13:31:12.129)"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("StampMilli", "Feb  7 13:53:39.168"),
        ("RFC3339", "2026-02-07T13:53:39+01:00"),
        ("RFC3339Milli", "2026-02-07T13:53:39.168+01:00"),
        ("RFC3339Micro", "2026-02-07T13:53:39.168000+01:00"),
        ("RFC3339Nano", "2026-02-07T13:53:39.168000001+01:00"),
        ("RFC1123Z", "Sat, 07 Feb 2026 13:53:39 +0100"),
    ],
)
def test_time_formats_are_gos(name, text):
    zone = timezone(timedelta(hours=1))
    assert format_stamp(1_770_468_819_168_000_001, name, zone) == text
    assert name in TIME_FORMATS


def test_utc_is_z_and_an_unknown_format_is_refused():
    assert format_stamp(0, "RFC3339", UTC) == "1970-01-01T00:00:00Z"
    with pytest.raises(ValueError, match="unknown time format 'Stamp'"):
        format_stamp(0, "Stamp", UTC)
