"""CiliumNetworkPolicy: ports, layer 7, and what is refused (research a.7-a.11)."""

import pytest
from policy_reading import (
    EVERY_CAPABILITY,
    ccnp,
    cnp,
    egress,
    entries,
    entry,
    ingress,
    read_text,
    refuse,
    refuse_egress,
    refuse_ingress,
)

from firewall.policy.model import (
    EntityPeer,
    PortRange,
)
from firewall.policy.readers import ReaderSettings, read
from firewall.policy.readers.settings import CAPABILITIES, ENFORCED, SWITCHED

TCP, UDP, SCTP = 6, 17, 132


# --- ports (a.7) -------------------------------------------------------------------------------


def ports(item):
    return ingress(f"{{toPorts: [{{ports: [{item}]}}]}}").ports


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ('{port: "80", protocol: TCP}', [PortRange(TCP, 80, 80)]),
        ('{port: "80", protocol: tcp}', [PortRange(TCP, 80, 80)]),
        ('{port: "80", endPort: 90, protocol: UDP}', [PortRange(UDP, 80, 90)]),
        ('{port: "80", endPort: 0, protocol: UDP}', [PortRange(UDP, 80, 80)]),
        ('{port: "0", protocol: TCP}', [PortRange(TCP, 0, 65535)]),
        ('{port: "53"}', [PortRange(p, 53, 53) for p in (TCP, UDP, SCTP)]),
        ('{port: "53", protocol: ANY}', [PortRange(p, 53, 53) for p in (TCP, UDP, SCTP)]),
        ("{port: Web-1, protocol: TCP}", [PortRange(TCP, 0, 0, "web-1")]),
        ('{port: "0x10", protocol: TCP}', [PortRange(TCP, 0, 0, "0x10")]),
        ("{port: http, endPort: 90, protocol: TCP}", [PortRange(TCP, 0, 0, "http")]),
        ("{protocol: GRE}", [PortRange(47)]),
        ('{port: "0", protocol: VRRP}', [PortRange(112)]),
    ],
)
def test_ports(item, expected):
    assert list(ports(item)) == expected


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("{protocol: TCP}", "port must be specified"),
        ('{port: ""}', "port must be specified"),
        ('{port: "65536"}', "the highest port is 65535"),
        ('{port: "-1"}', "unable to parse port"),
        ('{port: "8 0"}', "unable to parse port"),
        ('{port: "080"}', "unable to parse port"),
        ('{port: "web--1"}', "unable to parse port"),
        ('{port: "a234567890123456"}', "unable to parse port"),
        ('{port: "80", protocol: ICMP}', "ICMP has types, not ports; use icmps"),
        ('{port: "80", endPort: 79}', "must not be lower than port 80"),
        ('{port: "80", endPort: 65536}', "must be between 0 and 65535"),
        ('{port: "0", endPort: 5}', "already means every port"),
        ('{port: "80", protocol: GRE}', "the protocol has no ports"),
        ("80", "must be a mapping, not 80"),
    ],
)
def test_what_is_no_port(item, message):
    assert message in refuse_ingress(f"{{toPorts: [{{ports: [{item}]}}]}}")


def test_at_most_forty_ports():
    items = ", ".join(f'{{port: "{n}"}}' for n in range(1, 42))
    found = refuse_ingress(f"{{toPorts: [{{ports: [{items}]}}]}}")
    assert "too many ports, the max is 40" in found


def test_every_ports_item_is_an_entry_with_the_same_peers():
    item = """{fromEntities: [world], toPorts: [
        {ports: [{port: "80", protocol: TCP}], rules: {http: [{}]}},
        {ports: [{port: "81", protocol: TCP}]}]}"""
    first, second = entries(cnp(f"endpointSelector: {{}}\ningress: [{item}]"))
    assert first.peers == second.peers == (EntityPeer("world"),)
    assert (first.l7 is not None, second.l7) == (True, None)
    assert second.origin.path == "spec.ingress[0].toPorts[1]"


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("{type: 8}", PortRange(1, 8, 8)),
        ('{family: IPv4, type: "255"}', PortRange(1, 255, 255)),
        ("{family: IPv4, type: EchoRequest}", PortRange(1, 8, 8)),
        ("{family: IPv6, type: EchoRequest}", PortRange(58, 128, 128)),
        ("{family: IPv6, type: NeighborSolicitation}", PortRange(58, 135, 135)),
    ],
)
def test_icmp_types(field, expected):
    assert ingress(f"{{icmps: [{{fields: [{field}]}}]}}").ports == (expected,)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("{family: hoge, type: 8}", "wrong family: hoge"),
        ("{type: 256}", "is no type of ICMP over IPv4"),
        ("{type: PacketTooBig}", "is no type of ICMP over IPv4"),
        ("{family: IPv6, type: Echo}", "is no type of ICMP over IPv6"),
        ("{family: IPv4}", "needs type"),
        ("{type: 8, code: 0}", 'unknown field "code"'),
    ],
)
def test_what_is_no_icmp_type(field, message):
    assert message in refuse_ingress(f"{{icmps: [{{fields: [{field}]}}]}}")


def test_icmps_and_ports_exclude_each_other():
    item = '{icmps: [{fields: [{type: 8}]}], toPorts: [{ports: [{port: "80"}]}]}'
    assert "may only be present without toPorts" in refuse_ingress(item)


# --- layer 7 (a.8) -----------------------------------------------------------------------------


def l7(rules, port='{port: "80", protocol: TCP}', extra=""):
    return f"{{toPorts: [{{ports: [{port}], rules: {rules}{extra}}}]}}"


def test_http_rules():
    rule = (
        "{method: GET, path: '/a|/b', host: 'x[.]com', headers: ['X-A: 1', X-B], "
        "headerMatches: [{name: X-C, value: c}, {name: X-D, mismatch: REPLACE, value: d}]}"
    )
    found = ingress(l7(f"{{http: [{rule}]}}")).l7
    assert found.kind == "http"
    (http,) = found.http
    assert (http.method, http.path, http.host) == ("GET", "/a|/b", "x[.]com")
    assert http.headers == ("X-A: 1", "X-B")
    assert [(m.name, m.value, m.mismatch) for m in http.header_matches] == [
        ("X-C", "c", ""),
        ("X-D", "d", "REPLACE"),
    ]


def test_an_empty_list_of_rules_allows_everything_through_the_proxy():
    found = ingress(l7("{http: []}"))
    assert found.l7 is not None
    assert found.l7.http == ()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (l7("{http: [{path: '*'}]}"), "error parsing regexp"),
        (l7("{http: [{method: '('}]}"), "error parsing regexp"),
        (l7("{http: [{host: '(?=a)'}]}"), "error parsing regexp"),
        (l7("{http: [{headers: ['']}]}"), "is empty"),
        (l7("{http: [{headers: [X-A: b]}]}"), "put quotes around it"),
        (l7("{http: [{headerMatches: [{value: x}]}]}"), "needs the header's name"),
        (l7("{http: [{headerMatches: [{name: a, mismatch: log}]}]}"), 'did you mean "LOG"?'),
        (l7("{http: [{headerMatches: [{name: a, secret: {}}]}]}"), "needs the secret's name"),
        (l7("{http: [{headerMatches: [{name: X Y}]}]}"), '"X Y" is no header name'),
        (l7('{http: [{headerMatches: [{name: X, value: "a\\nb"}]}]}'), "holds a control character"),
        (
            l7("{http: [{headerMatches: [{name: host, mismatch: REPLACE, value: x}]}]}"),
            "the proxy writes host itself",
        ),
        (
            l7("{http: [{headerMatches: [{name: Transfer-Encoding, mismatch: ADD}]}]}"),
            "the proxy writes Transfer-Encoding itself",
        ),
        (l7("{http: [], dns: []}"), "multiple L7 protocol rule types"),
        (l7("{}"), "needs exactly one of http, dns"),
        (l7("{htpp: []}"), 'did you mean "http"?'),
        (l7("{kafka: [{topic: a}]}"), "removed in Cilium 1.20"),
        (l7("{l7proto: x, l7: [{a: b}]}"), "removed in Cilium 1.20"),
        (l7("{http: []}", '{port: "80"}'), "L7 rules can only apply to TCP"),
        (l7("{http: []}", '{port: "80", protocol: UDP}'), "L7 rules can only apply to TCP"),
        (l7("{http: []}", '{port: "0", protocol: TCP}'), "can not be used when a port is 0"),
        (l7("{dns: [{matchName: a.com}]}", '{port: "53"}'), "not allowed on ingress"),
        (
            l7("{http: []}", extra=", serverNames: [a.com]"),
            "not allowed with L7 rules without TLS termination",
        ),
        ('{toPorts: [{ports: [{port: "443"}], serverNames: []}]}', "leave it out"),
        ('{toPorts: [{ports: [{port: "443"}], serverNames: [""]}]}', "empty server name"),
        ('{toPorts: [{ports: [{port: "443"}], terminatingTLS: {}}]}', "needs secret"),
        (
            """{toPorts: [{ports: [{port: "53", protocol: TCP}], rules: {dns: []},
                originatingTLS: {secret: {name: a}}}]}""",
            "is not allowed with DNS rules",
        ),
        (
            '{toPorts: [{ports: [{port: "443"}], listener: {name: a, envoyConfig: {name: b}}}]}',
            "listener is not allowed on ingress",
        ),
        ("{authentication: {mode: maybe}}", '"maybe" is none of disabled, required'),
        ("{authentication: {}}", "needs mode"),
    ],
)
def test_layer_7_is_checked(item, message):
    assert message in refuse_ingress(item)


def test_http_rules_may_cover_a_range_of_ports():
    found = ingress(l7("{http: [{}]}", '{port: "80", endPort: 90, protocol: TCP}'))
    assert found.ports == (PortRange(TCP, 80, 90),)


def test_dns_rules():
    rules = "{dns: [{matchName: A.com}, {matchPattern: '*'}]}"
    found = egress(l7(rules, '{port: "53"}')).l7
    assert [(d.match_name, d.match_pattern) for d in found.dns] == [("a.com", None), (None, "*")]
    assert "port 53 must be specified" in refuse_egress(f"{{toPorts: [{{rules: {rules}}}]}}")
    ranged = l7(rules, '{port: "53", endPort: 54, protocol: UDP}')
    assert "range of ports" in refuse_egress(ranged)


def test_server_names_beside_other_protocols_are_warned_of():
    """Cilium takes them; what cannot be read stays closed."""
    item = "{toPorts: [{ports: [{port: '443'}], serverNames: [a.com]}]}"
    result = read(cnp(f"endpointSelector: {{}}\negress: [{item}]"), "p.yaml")
    assert [problem.message for problem in result.problems] == [
        "TLS is read in TCP; other protocols of these ports stay closed"
    ]
    assert result.objects


def test_tls_and_listeners():
    tls = "{secret: {namespace: n, name: s}, trustedCA: ca}"
    item = f"""{{toPorts: [{{ports: [{{port: "443", protocol: TCP}}], serverNames: ["*.A.com"],
        terminatingTLS: {tls}, originatingTLS: {tls}, rules: {{http: [{{}}]}}}}]}}"""
    found = egress(item)
    assert found.server_names == ("*.a.com",)
    assert (found.terminating_tls.trusted_ca, found.terminating_tls.certificate) == ("ca", "")
    listener = "{name: l, priority: 5, envoyConfig: {kind: CiliumEnvoyConfig, name: e}}"
    item = f'{{toPorts: [{{ports: [{{port: "80", protocol: TCP}}], listener: {listener}}}]}}'
    assert egress(item).listener.priority == 5
    wrong = item.replace("priority: 5", "priority: 101")
    assert "between 0 and 100" in refuse_egress(wrong)


def test_deny_entries_have_ports_only():
    spec = f"endpointSelector: {{}}\ningressDeny: [{l7('{http: []}')}]"
    assert "is not for deny entries" in refuse(cnp(spec))[0]


def test_host_policies_have_no_layer_7_but_dns():
    on_ingress = ccnp(f"nodeSelector: {{}}\ningress: [{l7('{http: []}')}]")
    assert "not supported on host ingress yet" in refuse(on_ingress)[0]
    on_egress = ccnp(f"nodeSelector: {{}}\negress: [{l7('{http: []}')}]")
    assert "not supported on host egress" in refuse(on_egress)[0]
    port = '{port: "53", protocol: UDP}'
    assert entries(ccnp(f"nodeSelector: {{}}\negress: [{l7('{dns: []}', port)}]"))


def test_log_values_are_short_and_printable():
    spec = "endpointSelector: {}\nlog: {value: VALUE}\ningress: [{}]"
    assert entry(spec.replace("VALUE", "team a")).log == "team a"
    assert "longer than 32" in refuse(cnp(spec.replace("VALUE", "x" * 33)))[0]
    assert "cannot be printed" in refuse(cnp(spec.replace("VALUE", '"a\\u0007b"')))[0]


# --- removed, and not enforced -----------------------------------------------------------------


def test_removed_fields_say_since_when():
    assert "removed in Cilium 1.19" in refuse_ingress("{fromRequires: [{}]}")
    assert "removed in Cilium 1.19" in refuse_egress("{toRequires: [{}]}")


def test_groups_are_refused():
    assert "no cloud provider is asked" in refuse_egress("{toGroups: [{aws: {}}]}")


NEEDS = {
    "http": ("ingress", l7("{http: []}")),
    "header-matches": ("ingress", l7("{http: [{headerMatches: [{name: a}]}]}")),
    "header-mismatch-actions": (
        "ingress",
        l7("{http: [{headerMatches: [{name: a, mismatch: LOG}]}]}"),
    ),
    "secrets": ("ingress", l7("{http: [{headerMatches: [{name: a, secret: {name: s}}]}]}")),
    "dns": ("egress", l7("{dns: []}", '{port: "53"}')),
    "fqdn": ("egress", "{toFQDNs: [{matchName: a.com}]}"),
    "server-names": (
        "egress",
        '{toPorts: [{ports: [{port: "443", protocol: TCP}], serverNames: [a.com]}]}',
    ),
    "tls": (
        "egress",
        '{toPorts: [{ports: [{port: "443", protocol: TCP}], originatingTLS: {secret: {name: a}}}]}',
    ),
    "listener": (
        "egress",
        '{toPorts: [{ports: [{port: "1"}], listener: {name: a, envoyConfig: {name: b}}}]}',
    ),
    "authentication": ("ingress", "{authentication: {mode: required}}"),
    "nodes": ("ingress", "{fromNodes: [{}]}"),
    "services": ("egress", "{toServices: [{k8sService: {serviceName: a}}]}"),
    "cidr-groups": ("egress", "{toCIDRSet: [{cidrGroupRef: a}]}"),
    "extended-protocols": ("ingress", "{toPorts: [{ports: [{protocol: GRE}]}]}"),
    "host-policy": ("nodes", "{}"),
    "namespaces": ("", ""),
}


def test_every_capability_has_a_case():
    assert set(NEEDS) == set(CAPABILITIES)
    assert set(CAPABILITIES) >= ENFORCED


@pytest.mark.parametrize("capability", sorted(set(CAPABILITIES) - {"namespaces"}))
def test_what_is_not_enforced_is_refused_not_ignored(capability):
    section, item = NEEDS[capability]
    if section == "nodes":
        text = ccnp(f"nodeSelector: {{}}\ningress: [{item}]")
    else:
        text = cnp(f"endpointSelector: {{}}\n{section}: [{item}]")
    assert read_text(text, EVERY_CAPABILITY).errors == ()
    without = ReaderSettings(enforceable=frozenset(CAPABILITIES) - {capability})
    (error,) = refuse(text, without)
    assert error.endswith(f"[{capability}]")
    setting = SWITCHED.get(capability)
    told = f"needs `{setting}: on`" if setting else "is not enforced by this version"
    assert told in error


@pytest.mark.parametrize("capability", sorted(SWITCHED))
def test_offline_what_a_setting_decides_is_accepted_with_a_warning(capability):
    """No daemon is asked, so the author is told what it needs."""
    section, item = NEEDS[capability]
    spec = f"nodeSelector: {{}}\ningress: [{item}]" if section == "nodes" else ""
    text = ccnp(spec or f"endpointSelector: {{}}\n{section}: [{item}]")
    result = read_text(text, ReaderSettings(assumed=frozenset(SWITCHED)))
    assert result.errors == ()
    assert [f"`{SWITCHED[capability]}: on`" in str(w) for w in result.warnings] == [True]


def test_nodes_as_peers_are_the_other_nodes():
    """Research a.6: an added `reserved:remote-node Exists`."""
    (peer,) = ingress("{fromNodes: [{matchLabels: {a: b}}]}").peers
    assert peer.selector.has_key("remote-node", ("reserved",))


def test_authentication_that_is_off_needs_nothing():
    assert entry(
        "endpointSelector: {}\ningress: [{authentication: {mode: disabled}}]", ReaderSettings()
    )


def test_a_port_that_is_refused_is_not_missing():
    """One mistake, one message."""
    spec = "endpointSelector: {}\ningress: [{toPorts: [{ports: [{port: 80}]}]}]"
    (found,) = read_text(cnp(spec)).problems
    assert 'write "80"' in str(found)
    spec = "endpointSelector: {}\ningress: [{toPorts: [{ports: []}]}]"
    (found,) = read_text(cnp(spec)).problems
    assert "lists no ports and matches nothing" in str(found)
