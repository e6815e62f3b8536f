"""Objects by key, and a revision for every call that changes something."""

from firewall.identities.selector import EVERYTHING
from firewall.policy.model import Action, ObjectKey, Origin, PolicyEntry, PolicyObject
from firewall.policy.repository import ChangeKind, Repository
from firewall.policy.verdict import TrafficDirection


def key(name, namespace="ns"):
    return ObjectKey(kind="K", namespace=namespace, name=name)


def one(name, namespace="ns", action=Action.ALLOW, labels=(), document=None):
    entry = PolicyEntry(
        origin=Origin(kind="K", namespace=namespace, name=name, path="spec"),
        direction=TrafficDirection.INGRESS,
        action=action,
        subject=EVERYTHING,
        peers=None,
        ports=None,
    )
    return PolicyObject(
        key=key(name, namespace), labels=labels, entries=(entry,), document=document or {}
    )


def kinds(change):
    return [(str(found.key), found.kind) for found in change.objects]


def test_the_first_revision_is_1_and_every_change_adds_one():
    repository = Repository()
    assert repository.revision == 1
    assert repository.apply([one("a"), one("b")]).revision == 2
    assert repository.delete([key("a")]).revision == 3
    assert repository.apply([]).revision == 3


def test_an_equal_object_changes_nothing():
    repository = Repository()
    repository.apply([one("a")])
    change = repository.apply([one("a")])
    assert kinds(change) == [("K/ns/a", ChangeKind.UNCHANGED)]
    assert (change.revision, change.changed) == (2, ())


def test_an_object_replaces_the_one_with_its_key():
    repository = Repository()
    repository.apply([one("a")])
    change = repository.apply([one("a", action=Action.DENY), one("b")])
    assert kinds(change) == [
        ("K/ns/a", ChangeKind.CONFIGURED),
        ("K/ns/b", ChangeKind.CREATED),
    ]
    [replaced, _] = change.objects
    assert (replaced.before.entries[0].action, replaced.after.entries[0].action) == (
        Action.ALLOW,
        Action.DENY,
    )
    assert [found.key.name for found in repository.objects] == ["a", "b"]


def test_a_new_description_is_a_change_too():
    repository = Repository()
    repository.apply([one("a")])
    change = repository.apply([one("a", document={"spec": {"description": "x"}})])
    assert kinds(change) == [("K/ns/a", ChangeKind.CONFIGURED)]
    assert repository.get(key("a")).document


def test_of_two_objects_with_one_key_the_last_counts():
    repository = Repository()
    change = repository.apply([one("a"), one("a", action=Action.DENY)])
    assert kinds(change) == [("K/ns/a", ChangeKind.CREATED)]
    assert repository.get(key("a")).entries[0].action is Action.DENY


def test_deleting_what_is_not_there_changes_nothing():
    repository = Repository()
    change = repository.delete([key("a")], labels=["x=y"])
    assert (change.revision, change.objects) == (1, ())


def test_deletion_by_labels_wants_all_of_them():
    repository = Repository()
    repository.apply([one("a", labels=("x=1", "y=1")), one("b", labels=("x=1",))])
    assert [found.key.name for found in repository.select(labels=["x=1"])] == ["a", "b"]
    change = repository.delete(labels=["x=1", "y=1"])
    assert kinds(change) == [("K/ns/a", ChangeKind.DELETED)]
    assert repository.delete(labels=[]).objects == ()
    assert [found.key.name for found in repository.objects] == ["b"]


def test_objects_are_selected_by_name_parts():
    repository = Repository()
    repository.apply([one("a"), one("a", "other"), one("b")])
    names = [str(found.key) for found in repository.select(name="a", namespace="other")]
    assert names == ["K/other/a"]
    assert repository.select(kind="Nothing") == ()


def test_replacing_a_set_deletes_what_is_no_longer_in_it_in_one_revision():
    repository = Repository()
    repository.apply([one("a"), one("b"), one("c", "other")])
    change = repository.replace([one("b"), one("d")], within=lambda o: o.key.namespace == "ns")
    assert kinds(change) == [
        ("K/ns/a", ChangeKind.DELETED),
        ("K/ns/b", ChangeKind.UNCHANGED),
        ("K/ns/d", ChangeKind.CREATED),
    ]
    assert change.revision == 3
    assert [str(found.key) for found in repository.objects] == ["K/ns/b", "K/ns/d", "K/other/c"]


def test_a_revision_can_be_gone_on_from():
    assert Repository(revision=17).apply([one("a")]).revision == 18
