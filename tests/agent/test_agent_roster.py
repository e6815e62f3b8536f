"""The roster: one owner per address, one origin per name, and all of it over restarts."""

import pytest

from conntrack.address import parse_address
from firewall.agent.declaration import parse_declaration
from firewall.agent.roster import Roster, RosterError, UnknownEndpointError
from firewall.agent.statefile import StateError
from firewall.endpoints.lifecycle import EndpointState
from firewall.identities.labels import LabelFilter, LabelSet

NOWHERE = ("", 0)


def declared(name, *addresses, **more):
    listed = ", ".join(addresses)
    extra = "".join(f"\n{key}: {value}" for key, value in more.items())
    return parse_declaration(f"name: {name}\naddresses: [{listed}]{extra}", "f.yaml", name)


@pytest.fixture
def roster(tmp_path):
    return Roster(tmp_path, "default", LabelFilter())


def again(tmp_path):
    fresh = Roster(tmp_path, "default", LabelFilter())
    fresh.restore(2)
    return fresh


def test_an_address_has_one_owner_and_the_error_names_both(roster):
    """Two endpoints with one address: which policy would count?"""
    roster.put(declared("a", "10.0.0.1", '"fd00::1"'), "api", NOWHERE, 1)
    with pytest.raises(RosterError) as caught:
        roster.put(declared("b", "10.0.0.2", '"fd00::1"'), "api", NOWHERE, 1)
    assert str(caught.value) == (
        "fd00::1 belongs to endpoint a (through the API); endpoint b cannot have it too"
    )
    assert roster.find("b") is None
    assert roster.owner(parse_address("10.0.0.2")) is None


def test_an_address_that_its_owner_gave_up_is_free(roster):
    """Also within one declaration that replaces another."""
    roster.put(declared("a", "10.0.0.1"), "api", NOWHERE, 1)
    roster.put(declared("a", "10.0.0.9"), "api", NOWHERE, 1)
    roster.put(declared("b", "10.0.0.1"), "api", NOWHERE, 1)
    assert roster.owner(parse_address("10.0.0.1")).endpoint.name == "b"
    roster.remove("b", "api")
    assert roster.owner(parse_address("10.0.0.1")) is None


def test_a_new_endpoint_does_not_take_the_place_of_another_one(roster):
    """A second `endpoint add` is a mistake, unless it says the same as the first."""
    first = declared("a", "10.0.0.1", labels="[app=a]", netns="a")
    roster.put(first, "api", NOWHERE, 1)
    with pytest.raises(RosterError, match=r"endpoint a is there already.*--replace"):
        roster.check(declared("a", "10.0.0.1"), "api", new=True)
    roster.check(declared("a", "10.0.0.1", netns="a", labels="{app: a}"), "api", new=True)
    roster.check(declared("a", "10.0.0.1"), "api")


def test_an_endpoint_is_meant_by_what_the_list_shows_of_it(roster):
    """Its name, with its namespace, or its number; a name counts before a number."""
    made = roster.put(declared("a", "10.0.0.1", namespace="red"), "api", NOWHERE, 1)
    for text in ("a", "red/a", str(made.endpoint.id)):
        assert roster.meant(text) is made
    for text in ("blue/a", "red/b", f"red/{made.endpoint.id}", "99", "", "/a"):
        with pytest.raises(UnknownEndpointError, match="no endpoint"):
            roster.meant(text)
    number = roster.put(declared(str(made.endpoint.id), "10.0.0.2"), "api", NOWHERE, 1)
    assert roster.meant(str(made.endpoint.id)) is number


def test_only_the_origin_of_an_endpoint_changes_or_removes_it(roster):
    """What a file declares is changed in the file."""
    roster.put(declared("a", "10.0.0.1"), "config", NOWHERE, 1)
    with pytest.raises(RosterError, match=r"declared in f\.yaml: change it there"):
        roster.put(declared("a", "10.0.0.2"), "api", NOWHERE, 1)
    with pytest.raises(RosterError, match="remove it there"):
        roster.remove("a", "api")
    with pytest.raises(UnknownEndpointError):
        roster.remove("b", "api")
    assert roster.of_origin("config") == ["a"]
    assert roster.of_origin("config", "g.yaml") == []


def test_another_namespace_is_another_endpoint(roster):
    """A pod does not move between namespaces."""
    roster.put(declared("a", "10.0.0.1"), "api", NOWHERE, 1)
    with pytest.raises(RosterError, match="delete it first"):
        roster.put(declared("a", "10.0.0.1", namespace="other"), "api", NOWHERE, 1)


def test_ids_are_kept_and_not_given_out_again_at_once(roster):
    """Flow records name endpoints by id: a fresh one must not look like the one before."""
    first = roster.put(declared("a", "10.0.0.1"), "api", NOWHERE, 1).endpoint.id
    second = roster.put(declared("b", "10.0.0.2"), "api", NOWHERE, 1).endpoint.id
    assert roster.put(declared("a", "10.0.0.3"), "api", NOWHERE, 1).endpoint.id == first
    roster.remove("b", "api")
    assert roster.put(declared("c", "10.0.0.4"), "api", NOWHERE, 1).endpoint.id > second
    assert roster.by_id(second) is None


def test_everything_comes_back_after_a_restart(roster, tmp_path):
    """As declared, in state restoring, with the interface it had."""
    one = declared("a", "10.0.0.1", labels="[app=web]", netns="a", ports="[http:80]", audit="on")
    roster.put(one, "api", ("veth7", 7), 1)
    roster.put(declared("b", "10.0.0.2"), "config", NOWHERE, 1)
    back = again(tmp_path)
    member = back.get("a")
    assert member.endpoint.state is EndpointState.RESTORING
    assert member.declaration.labels == one.labels
    assert member.declaration.ports == one.ports
    before = roster.get("a").endpoint.row()
    assert member.endpoint.row() == before
    assert (back.get("b").origin, back.get("b").declaration.place.file) == ("config", "f.yaml")
    third = back.put(declared("c", "10.0.0.3"), "api", NOWHERE, 3)
    assert third.endpoint.id not in {m.endpoint.id for m in roster}


def test_a_refused_change_is_not_persisted(roster, tmp_path):
    """What the API answered with an error does not appear after a restart."""
    roster.put(declared("a", "10.0.0.1"), "api", NOWHERE, 1)
    with pytest.raises(RosterError):
        roster.put(declared("b", "10.0.0.1"), "api", NOWHERE, 1)
    assert [member.endpoint.name for member in again(tmp_path)] == ["a"]


def test_a_change_that_cannot_be_persisted_does_not_happen(roster, monkeypatch):
    """A full disk: the caller is told, and nothing differs from the file."""
    roster.put(declared("a", "10.0.0.1"), "api", NOWHERE, 1)

    def full(*_):
        raise OSError(28, "no space left")

    monkeypatch.setattr("firewall.agent.statefile.write", full)
    with pytest.raises(OSError, match="no space"):
        roster.put(declared("b", "10.0.0.2"), "api", NOWHERE, 1)
    with pytest.raises(OSError, match="no space"):
        roster.remove("a", "api")
    assert [member.endpoint.name for member in roster] == ["a"]


def test_a_damaged_file_is_refused(roster, tmp_path):
    """Never read as fewer endpoints."""
    roster.put(declared("a", "10.0.0.1"), "api", NOWHERE, 1)
    path = tmp_path / "endpoints"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(StateError, match="cut short"):
        again(tmp_path)


def test_cluster_and_namespace_labels_are_added(roster):
    """What Cilium adds to every pod: policies of other namespaces and clusters match on it."""
    labels = roster.labels_of(
        declared("a", "10.0.0.1", namespace="red", labels="[app=web]"),
        LabelSet.parse(["k8s:team=x"]),
    )
    assert labels.strings() == (
        "k8s:app=web",
        "k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=red",
        "k8s:io.cilium.k8s.namespace.labels.team=x",
        "k8s:io.cilium.k8s.policy.cluster=default",
        "k8s:io.kubernetes.pod.namespace=red",
    )


def test_an_endpoint_in_init_gets_no_labels(roster):
    """Its labels are not known yet; only reserved:init may count."""
    member = declared("a", "10.0.0.1", labels='["reserved:init"]')
    assert roster.labels_of(member, None).strings() == ("reserved:init",)


def test_an_endpoint_without_labels_is_in_init(roster):
    """Its namespace alone says nothing about it: Cilium's init until labels come."""
    member = declared("a", "10.0.0.1", namespace="red")
    labels = roster.labels_of(member, LabelSet.parse(["k8s:team=x"]))
    assert labels.strings() == ("reserved:init",)
