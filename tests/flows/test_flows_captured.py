"""A packet beside its flow: the line of the stream, and the comment in a capture."""

import pytest
from flow_samples import AT_NS, RULE, flow, packet

from firewall.flows.captured import Captured, comment, from_line, to_line


def test_a_line_brings_packet_and_flow_back():
    captured = Captured(AT_NS, b"\x45\x00\xff", 60, flow(packet()), 3)
    line = to_line(captured)
    assert line.endswith(b"\n")
    assert from_line(line) == captured


def test_a_line_may_tell_a_loss_alone():
    assert from_line(to_line(Captured(lost_count=9))) == Captured(lost_count=9)


def test_what_is_no_line_is_refused():
    with pytest.raises(ValueError, match="packet"):
        from_line(b'{"packet": 7}')


def test_the_comment_says_verdict_reason_and_ends():
    assert comment(flow(packet(isolated_by=(RULE,)))) == (
        "DENIED: POLICY_DENIED: no ingress rule allows it: default deny by rule1 "
        "(CiliumNetworkPolicy) sw_l3_l4_policy.yaml:12; "
        "default/xwing:54842 (ID:22654) -> default/deathstar:80 (ID:16530) INGRESS"
    )


def test_the_comment_says_what_the_reason_alone_does_not():
    text = comment(flow(packet(detail="not an address of default/xwing")))
    assert ": not an address of default/xwing; " in text


def test_no_control_character_reaches_the_comment():
    assert comment(flow(packet(detail="\x1b[2J"))).isprintable()
