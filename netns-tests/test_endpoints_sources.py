"""The node's side of a link is found from the namespace it leads into, without entering it."""

import pytest
from traffic import eventually

from firewall.endpoints.sources import (
    SourceError,
    bridges,
    find_interface,
    find_interfaces,
    interface_named,
    netns_path,
)


def ip(node, *argv):
    done = node.run(["ip", *argv])
    assert done.returncode == 0, done.stderr
    return done.stdout


def found(lab, namespace, ask=find_interface):
    """Ask from within the node's namespace, where the agent runs."""
    return lab.node.netns.within(lambda: ask(namespace))


def index_of(lab, name):
    return int(ip(lab.node, "-o", "link", "show", name).split(":")[0])


def test_the_link_into_a_namespace_is_found_by_path(lab):
    two = lab(a="app=a", b="app=b")
    answers = {}
    for name in ("a", "b"):
        interface, number = found(two, str(two.host(name).netns.path))
        assert number == index_of(two, interface.partition("@")[0])
        answers[name] = interface
    assert answers["a"] != answers["b"]


def test_the_link_is_found_by_the_pid_of_a_process_inside(lab):
    one = lab(a="app=a")
    host = one.host("a")
    sleeper = host.start(["sleep", "60"])
    eventually(lambda: sleeper.pid in host.netns.processes(), "the process is inside")
    assert found(one, sleeper.pid) == found(one, "a")
    assert found(one, str(sleeper.pid)) == found(one, "a")


def test_several_links_into_one_namespace_must_be_told_apart(lab):
    one = lab(a="app=a")
    host = one.host("a")
    first = found(one, "a")
    ip(
        one.node,
        "link",
        "add",
        "second",
        "type",
        "veth",
        "peer",
        "name",
        "eth9",
        "netns",
        host.name,
    )
    assert {link.name for link in found(one, "a", find_interfaces)} == {first.name, "second"}
    with pytest.raises(SourceError, match=r"several interfaces .* second; name one"):
        found(one, "a")


def test_a_namespace_without_a_link_and_the_nodes_own_are_refused(lab):
    one = lab(a="app=a")
    with pytest.raises(SourceError, match="the node's own"):
        found(one, str(one.node.netns.path))
    with pytest.raises(SourceError, match="No such file"):
        found(one, "no-such-namespace")


def test_an_interface_is_found_by_its_name(lab):
    one = lab(a="app=a")
    name, number = found(one, str(one.host("a").netns.path))
    assert one.node.netns.within(lambda: interface_named(name)) == (name, number)
    with pytest.raises(SourceError, match="no interface 'nosuch'"):
        one.node.netns.within(lambda: interface_named("nosuch"))


def test_ports_of_bridges_are_found_and_nothing_else(lab):
    two = lab(a="app=a", b="app=b")
    assert two.node.netns.within(bridges) == {}
    port = two.host("a").interface
    ip(two.node, "link", "add", "br0", "type", "bridge")
    ip(two.node, "link", "set", port, "master", "br0")
    assert two.node.netns.within(bridges) == {port: "br0"}


@pytest.mark.parametrize(
    ("said", "path"),
    [
        ("web", "/run/netns/web"),
        ("/a/b", "/a/b"),
        (42, "/proc/42/ns/net"),
        ("42", "/proc/42/ns/net"),
    ],
)
def test_a_namespace_is_named_by_name_path_or_pid(said, path):
    assert str(netns_path(said)) == path
