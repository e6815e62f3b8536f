"""Lab files: what they mean, and that every mistake is reported with its place."""

import json
import re
from pathlib import Path

import pytest

from lab.topology import HostPlan, NamedPort, Topology, TopologyError, assigned, hosts, parse, read

ROOT = Path(__file__).resolve().parents[2]


def problems(text: str) -> list[str]:
    with pytest.raises(TopologyError) as caught:
        parse(text, "f.yaml")
    return [str(problem) for problem in caught.value.problems]


def test_a_host_without_anything_gets_an_address_of_each_family():
    """The Nth host has 10.0.1.N and fd00:0:0:1::N (hexadecimal)."""
    plan = parse("hosts: {" + ", ".join(f"h{n}: {{}}" for n in range(1, 13)) + "}")
    assert plan.hosts[0].addresses == ("10.0.1.1", "fd00:0:0:1::1")
    assert plan.hosts[11].addresses == ("10.0.1.12", "fd00:0:0:1::c")


def test_everything_that_can_be_said_of_a_host_is_kept():
    """One file with every field."""
    plan = parse(
        """
        name: two
        node: {addresses: [192.0.2.1]}
        hosts:
          a:
            namespace: shop
            labels: {app: a, "k8s:tier": db, number: 7, empty: ""}
            addresses: ["2001:db8::5", 198.51.100.5]
            ports: [{name: http, port: 80}, {name: dns, port: 53, protocol: udp}]
            names: [a.example]
            processes: [[sleep, 5]]
            managed: false
            link: {mtu: 9000}
        """
    )
    assert plan == Topology(
        name="two",
        node_addresses=("192.0.2.1",),
        hosts=(
            HostPlan(
                name="a",
                namespace="shop",
                labels={"app": "a", "k8s:tier": "db", "number": "7", "empty": ""},
                addresses=("2001:db8::5", "198.51.100.5"),
                ports=(
                    NamedPort(name="http", port=80),
                    NamedPort(name="dns", port=53, protocol="UDP"),
                ),
                names=("a.example",),
                processes=(("sleep", "5"),),
                managed=False,
                mtu_bytes=9000,
            ),
        ),
    )


def test_labels_may_be_a_list():
    """As in `bartizan endpoint add --label`."""
    plan = parse("hosts: {a: {labels: [app=a, tier=, flag]}}")
    assert plan.hosts[0].labels == {"app": "a", "tier": "", "flag": ""}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "f.yaml:1:1: .: empty file"),
        ("hosts: {a: {", "f.yaml:1:13: .:"),
        ("hosts: [a]", "f.yaml:1:8: hosts: expected a mapping, found a list"),
        ("name: x", "f.yaml:1:1: hosts: is missing"),
        (
            "hosts: {}\nhots: {}",
            "f.yaml:2:1: hots: unknown field (known: name, node, resolver, hosts)",
        ),
        ("hosts:\n  a: {}\n  a: {}", "f.yaml:3:3: hosts.a: is given twice"),
        ("hosts:\n  A_B: {}", "f.yaml:2:8: hosts.A_B: 'A_B' is not a name"),
        ("hosts:\n  a: {adresses: []}", "f.yaml:2:7: hosts.a.adresses: unknown field"),
        ("hosts: {a: {addresses: [10.0.0.300]}}", "'10.0.0.300' is not an IP address"),
        ("hosts: {a: {addresses: [10.0.0.3/24]}}", "'10.0.0.3/24' is not an IP address"),
        (
            "hosts:\n  a: {addresses: ['fd00::1:2']}\n  b: {addresses: ['fd00:0::1:2']}",
            "f.yaml:3:19: hosts.b.addresses[0]: fd00:0::1:2 is also hosts.a.addresses[0]",
        ),
        (
            "node: {addresses: [10.1.1.1]}\nhosts: {a: {addresses: [10.1.1.1]}}",
            "10.1.1.1 is also node.addresses[0]",
        ),
        ("hosts: {a: {ports: [{port: 80}]}}", "hosts.a.ports[0].name: is missing"),
        ("hosts: {a: {ports: [{name: x, port: 0}]}}", "'0' is not a number from 1 to 65535"),
        ("hosts: {a: {ports: [{name: x, port: 65536}]}}", "is not a number from 1 to 65535"),
        ("hosts: {a: {ports: [{name: x, port: 1, protocol: ICMP}]}}", "is not one of TCP, UDP"),
        ("hosts: {a: {processes: [sleep]}}", "processes[0]: expected a list, found 'sleep'"),
        ("hosts: {a: {managed: maybe}}", "'maybe' is not true or false"),
        ("hosts: {a: {link: {mtu: 100}}}", "'100' is not a number from 1280 to 65535"),
        ("hosts: {a: {names: [under_score]}}", "'under_score' is not a host name"),
        ("hosts: {node: {}}", "hosts.node: is the name of the lab's own node"),
        ("hosts: {a: {addresses: [127.0.0.1]}}", "127.0.0.1 is a loopback address"),
        ("hosts: {a: {addresses: ['::ffff:10.0.0.3']}}", "write 10.0.0.3: no host can have it"),
        ("hosts: {a: {labels: {app: 'x y'}}}", "1:27: hosts.a.labels.app: label 'app=x y' holds"),
        ("hosts: {a: {labels: [reserved:host]}}", "labels[0]: label reserved:host is reserved"),
        ("hosts: {a: {processes: [[]]}}", "processes[0]: is empty"),
        ('hosts: {a: {processes: [["x\\0"]]}}', "processes[0][0]: holds a NUL"),
        ("[" * 5000, "f.yaml:1:1: .: nested too deep"),
    ],
)
def test_a_mistake_is_reported_with_file_line_column_and_path(text, problem):
    """The columns are those of the word that is wrong."""
    assert any(problem in said for said in problems(text)), problems(text)


def test_a_label_without_a_value_has_the_empty_one():
    assert parse("hosts: {a: {labels: {app: , tier: ~}}}").hosts[0].labels == {
        "app": "",
        "tier": "",
    }


def test_all_mistakes_are_reported_at_once():
    """Not one per run."""
    said = problems("hosts:\n  a: {managed: x}\n  b: {link: {mtu: y}}\nz: 1")
    assert [re.match(r"f\.yaml:(\d+):", line)[1] for line in said] == ["4", "2", "3"]


def test_an_address_that_the_lab_would_assign_is_taken_only_once():
    """A written 10.0.1.1 at the second host and the default of the first do not collide."""
    plan = parse("hosts:\n  a: {}\n  b: {addresses: [10.0.1.1]}")
    everywhere = [address for host in plan.hosts for address in host.addresses]
    assert len(everywhere) == len(set(everywhere))


def test_hosts_in_one_line_have_labels_and_addresses():
    """The short form for tests."""
    plan = hosts(a="app=a", b="app=b,tier=db")
    assert [host.labels for host in plan.hosts] == [{"app": "a"}, {"app": "b", "tier": "db"}]
    assert assigned(plan) == plan


def test_the_example_is_a_lab():
    """The file that users are told to try."""
    plan = read(ROOT / "examples/shop.lab.yaml")
    assert [host.name for host in plan.hosts if host.managed] == ["web", "db"]


def test_the_published_schema_knows_exactly_the_fields_that_the_reader_knows():
    """So that an editor never completes what the reader refuses."""
    schema = json.loads((ROOT / "docs/lab.schema.json").read_text())
    host = schema["$defs"]["host"]["properties"]
    for known, text in (
        (schema["properties"], "{?: 1, hosts: {}}"),
        (schema["properties"]["node"]["properties"], "{node: {?: 1}, hosts: {}}"),
        (host, "hosts: {a: {?: 1}}"),
        (host["link"]["properties"], "hosts: {a: {link: {?: 1}}}"),
        (host["ports"]["items"]["properties"], "hosts: {a: {ports: [{?: 1, name: a, port: 1}]}}"),
    ):
        said = problems(text.replace("?", "unheard"))
        listed = re.search(r"\(known: (.*)\)", "\n".join(said))
        assert listed, said
        assert set(listed[1].split(", ")) == set(known)


def test_a_lab_may_have_a_resolver():
    assert parse("{resolver: 203.0.113.53, hosts: {a: {}}}").resolver == "203.0.113.53"
    (problem,) = problems("{resolver: ns.example, hosts: {a: {}}}")
    assert "resolver: 'ns.example' is not an IP address" in problem
