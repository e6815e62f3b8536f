"""Which flows are shown: Hubble's flags (research/ux.md a.2)."""

import msgspec
import pytest
from flow_samples import RULE, allowed, flow, packet, request, response

from conntrack.address import parse_address
from firewall.flows.filters import Filter, FilterError, Term, flags
from firewall.flows.flow import Dns, Layer7
from firewall.flows.sides import parse_label_selector
from firewall.policy.verdict import DropReason, TrafficDirection, Verdict

XWING = flow(packet())
TIE = flow(allowed())
PUT = flow(request())
LANDED = flow(response())
SPOOFED = flow(packet(drop_reason=DropReason.INVALID_SOURCE_IP, direction=0, reply=None))
OUTSIDE = flow(
    packet(
        protocol=17, direction=TrafficDirection.EGRESS, destination=parse_address("1.1.1.1"),
        destination_identity=2, destination_endpoint=0, destination_port=53,
    )
)  # fmt: skip
SIX = flow(
    allowed(
        protocol=58, icmp_type=128, icmp_code=0, source=parse_address("fd00::1"),
        destination=parse_address("fd00::2"), source_port=0, destination_port=0,
    )
)  # fmt: skip
AUDITED = flow(packet(audited=True, verdict=Verdict.ACCEPT))
ASKED = msgspec.structs.replace(
    OUTSIDE, l7=Layer7(type="REQUEST", dns=Dns(query="x.org.")), type="L7"
)
FLOWS = {
    "xwing": XWING, "tie": TIE, "put": PUT, "landed": LANDED, "spoofed": SPOOFED,
    "outside": OUTSIDE, "six": SIX, "audited": AUDITED, "asked": ASKED,
}  # fmt: skip


def chosen(*terms):
    wanted = Filter(Term(*term) for term in terms)
    return " ".join(name for name, one in FLOWS.items() if wanted(one))


EVERYTHING = " ".join(FLOWS)


@pytest.mark.parametrize(
    ("flag", "value", "names"),
    [
        ("pod", "xwing", "xwing spoofed outside audited asked"),
        ("pod", "default/tie", "tie put landed six"),
        ("pod", "default/", EVERYTHING),
        ("pod", "/xwing", "xwing spoofed outside audited asked"),
        ("pod", "other/xwing", ""),
        ("pod", "wing", ""),  # a prefix, not a part
        ("from-pod", "deathstar", "landed"),
        ("to-pod", "deathstar", "xwing tie put spoofed six audited"),
        ("namespace", "default", EVERYTHING),
        ("namespace", "def", ""),
        ("to-namespace", "default", "xwing tie put landed spoofed six audited"),
        ("label", "class=tiefighter", "tie put landed six"),
        ("label", "k8s:class=tiefighter", "tie put landed six"),
        ("label", "container:class=tiefighter", ""),
        ("from-label", "org=empire", "tie put landed six"),
        ("from-label", "org=empire,class!=deathstar", "tie put six"),
        ("from-label", "org in (empire, alliance)", EVERYTHING),
        ("from-label", "class notin (xwing)", "tie put landed six"),
        ("to-label", "reserved:world", "outside asked"),
        ("to-label", "!org", "outside asked"),
        ("to-label", "org", "xwing tie put landed spoofed six audited"),
        ("ip", "10.0.0.30", "xwing spoofed outside audited asked"),
        ("to-ip", "10.0.0.128/25", "xwing tie put spoofed audited"),
        ("from-ip", "fd00::/8", "six"),
        ("ip", "0.0.0.0/0", "xwing tie put landed spoofed outside audited asked"),
        ("port", "53", "outside asked"),
        ("from-port", "80", "landed"),
        ("to-port", "80", "xwing tie put spoofed audited"),
        ("port", "0", ""),  # ICMP has no port, not port 0
        ("identity", "22654", "xwing spoofed outside audited asked"),
        ("to-identity", "world", "outside asked"),
        ("to-identity", "reserved:world", "outside asked"),
        ("from-identity", "16530", "landed"),
        ("fqdn", "one.one.one.one", "outside asked"),
        ("to-fqdn", "*.ONE.one.", "outside asked"),
        ("from-fqdn", "*", ""),
        ("fqdn", "one", ""),
        ("verdict", "dropped", "xwing put spoofed outside asked"),
        ("verdict", "AUDIT", "audited"),
        ("type", "policy-verdict", "xwing tie outside six audited asked"),
        ("type", "drop", "xwing spoofed outside asked"),
        ("type", "drop:132", "spoofed"),
        ("type", "drop:invalid_source_ip", "spoofed"),
        ("type", "drop:133", "xwing outside asked"),
        ("type", "drop:POLICY_DENIED", "xwing outside asked"),
        ("type", "l7", "put landed"),
        ("type", "trace:to-stack", ""),
        ("drop-reason-desc", "policy_denied", "xwing put outside asked"),
        ("protocol", "tcp", "xwing tie put landed spoofed audited"),
        ("protocol", "UDP", "outside asked"),
        ("protocol", "icmp", "six"),
        ("protocol", "icmpv4", ""),
        ("protocol", "icmpv6", "six"),
        ("protocol", "http", "put landed"),
        ("protocol", "dns", "asked"),
        ("tcp-flags", "syn", "xwing tie spoofed audited"),
        ("tcp-flags", "SYN,ACK", ""),
        ("traffic-direction", "egress", "outside asked"),
        ("ip-version", "v6", "six"),
        ("ip-version", "v4", "xwing tie put landed spoofed outside audited asked"),
        ("http-method", "put", "put"),
        ("http-path", "^/v1/request", "landed"),
        ("http-path", "exhaust", "put"),
        ("http-path", "deathstar", ""),  # the host is no part of the path
        ("http-url", "deathstar", "put landed"),
        ("http-status", "200", "landed"),
        ("http-status", "2+", "landed"),
        ("http-status", "4+", ""),
        ("reply", "", "landed"),
        ("reply", "false", "xwing tie put outside six audited asked"),
        ("node-name", "lab0", EVERYTHING),
        ("uuid", XWING.uuid, "xwing"),
        ("policy", "rule1", "tie landed six"),
        ("policy", "default/rule1", "tie landed six"),
        ("policy", "other/rule1", ""),
    ],
)
def test_a_filter_chooses_these_flows(flag, value, names):
    assert chosen((flag, value)) == names


def test_the_same_flag_widens():
    assert chosen(("verdict", "AUDIT"), ("verdict", "FORWARDED")) == "tie landed six audited"


def test_different_flags_narrow():
    assert chosen(("verdict", "DROPPED"), ("protocol", "http")) == "put"
    assert chosen(("from-pod", "xwing"), ("to-pod", "deathstar")) == "xwing spoofed audited"


def test_a_negated_match_excludes_whatever_else_matches():
    assert chosen(("verdict", "DROPPED"), ("pod", "xwing", True)) == "put"
    assert chosen(("pod", "xwing", True), ("pod", "tie", True)) == ""
    assert chosen(("protocol", "tcp"), ("protocol", "tcp", True)) == ""


def test_no_filter_shows_everything():
    assert chosen() == EVERYTHING
    assert not Filter()
    assert Filter([Term("verdict", "DROPPED")])


def test_a_policy_is_found_by_the_default_deny_it_caused():
    """There is no rule to name then: who isolated the endpoint is meant."""
    denied = flow(packet(isolated_by=(RULE,)))
    assert Filter([Term("policy", "rule1")])(denied)
    assert not Filter([Term("policy", "rule2")])(denied)


def test_a_header_is_compared_by_name_in_any_case_and_exact_value():
    made = flow(response(headers=(("X-Id", "42"),)))
    assert Filter([Term("http-header", "x-id: 42")])(made)
    assert not Filter([Term("http-header", "x-id:4")])(made)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("verdict", "DENIED", "one of FORWARDED, DROPPED"),
        ("type", "policy", "one of drop, trace"),
        ("type", "policy-verdict:x", "no subtype"),
        ("type", "trace:nowhere", "to-stack"),
        ("port", "http", "number 0-65535"),
        ("port", "65536", "number 0-65535"),
        ("ip", "10.0.0.300", "10.0.0.300"),
        ("ip", "10.0.0.0/33", "10.0.0.0/33"),
        ("identity", "nobody", "neither a number"),
        ("label", "a b", "no label term"),
        ("label", "a=b,,c=d", "no label term"),
        ("label", "nosuch:a=b", "unknown label source"),
        ("http-path", "(", r"\(RE2\): missing \): \("),
        ("http-status", "40", "plus sign"),
        ("http-status", "x+", "three digits"),
        ("http-header", "x-id", "name:value"),
        ("tcp-flags", "SYN,FOO", "one of FIN, SYN"),
        ("protocol", "kafka", "one of tcp"),
        ("drop-reason-desc", "BECAUSE", "POLICY_DENIED"),
        ("pod", "/", "name a pod"),
        ("fqdn", "", "name a host"),
        ("from-verdict", "DROPPED", "no such filter"),
        ("colour", "red", "no such filter; there are .*from-pod.*verdict"),
    ],
)
def test_a_wrong_value_names_its_flag(flag, value, message):
    with pytest.raises(FilterError, match=message) as caught:
        Filter([Term(flag, value)])
    assert str(caught.value).startswith(f"--{flag} {value!r}: ")
    assert caught.value.flag == flag


def test_every_flag_of_hubble_that_has_a_meaning_here_exists():
    """ux.md a.2, without services, workloads, clusters and tunnels."""
    sided = ("pod", "namespace", "label", "ip", "port", "identity", "fqdn")
    expected = {f"{p}{name}" for name in sided for p in ("", "from-", "to-")} | {
        "verdict", "type", "drop-reason-desc", "protocol", "tcp-flags", "traffic-direction",
        "ip-version", "http-method", "http-path", "http-url", "http-status", "http-header",
        "uuid", "node-name",
    }  # fmt: skip
    assert set(flags()) == expected | {"reply", "policy"}


def test_a_label_selector_reads_as_for_kubectl():
    selector = parse_label_selector("k8s:app=a, tier in (x,y),!old,env!=prod,zone==z")
    assert selector.describe() == (
        "any:env NotIn (prod), any:old DoesNotExist, any:tier In (x, y), any:zone=z, k8s:app=a"
    )


def test_a_flow_without_labels_or_with_strange_ones_is_no_error():
    """Records come from files too."""
    strange = msgspec.structs.replace(
        XWING, source=msgspec.structs.replace(XWING.source, labels=("nosuch:x", "")), ip=None
    )
    assert not Filter([Term("from-label", "class=xwing")])(strange)
    assert not Filter([Term("ip", "10.0.0.0/8")])(strange)
