"""The policy book: texts over restarts, files that come, change, break and go."""

from pathlib import Path

import pytest

from firewall.agent.policies import InvalidPolicyError, PolicyBook, PolicyText
from firewall.agent.statefile import StateError
from firewall.policy.repository import Repository


def policy(name, port="80"):
    return f"""\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: {name}, namespace: default}}
spec:
  endpointSelector: {{matchLabels: {{app: {name}}}}}
  ingress:
  - toPorts: [{{ports: [{{port: "{port}", protocol: TCP}}]}}]
"""


def apply(book, text, file):
    return book.apply([PolicyText(file, text)])


NAMESPACE = "apiVersion: v1\nkind: Namespace\nmetadata: {name: red, labels: {team: x}}\n"


@pytest.fixture
def book(tmp_path):
    return PolicyBook(tmp_path, Repository())


def again(tmp_path, revision=1):
    fresh = PolicyBook(tmp_path, Repository(revision=revision))
    fresh.restore()
    return fresh


def names(book):
    return [one.key.name for one in book.repository.objects]


def test_a_text_with_one_mistake_changes_nothing(book, tmp_path):
    """All or nothing, with the place of the mistake."""
    with pytest.raises(InvalidPolicyError) as caught:
        apply(book, policy("a") + "---\n" + policy("b", "99999"), "two.yaml")
    assert any(str(problem).startswith("two.yaml:15:") for problem in caught.value.problems)
    assert names(book) == []
    assert names(again(tmp_path)) == []


def test_one_invalid_file_keeps_every_other_out(book, tmp_path):
    """`policy apply -f a.yaml -f broken.yaml` never leaves half of it in force."""
    with pytest.raises(InvalidPolicyError, match="1 error, nothing was applied"):
        book.apply([PolicyText("a.yaml", policy("a")), PolicyText("b.yaml", policy("b", "99999"))])
    assert names(book) == names(again(tmp_path)) == []
    assert book.repository.revision == 1


def test_several_files_are_one_revision_and_keep_their_names(book, tmp_path):
    """One change, each object with its own file."""
    book.apply([PolicyText("a.yaml", policy("a")), PolicyText("b.yaml", policy("b"))])
    assert book.repository.revision == 2
    back = again(tmp_path, revision=2)
    assert [one.file for one in back.repository.objects] == ["a.yaml", "b.yaml"]


def test_an_object_of_two_files_is_refused(book):
    """Which of them counts would depend on their order."""
    with pytest.raises(InvalidPolicyError) as caught:
        book.apply([PolicyText("a.yaml", policy("a")), PolicyText("b.yaml", policy("a", "81"))])
    assert [str(problem) for problem in caught.value.problems] == [
        f"{name}: CiliumNetworkPolicy/default/a is given more than once: in a.yaml and b.yaml"
        for name in ("a.yaml", "b.yaml")
    ]
    assert names(book) == []


def test_objects_come_back_with_their_lines(book, tmp_path):
    """A restart must not change what flow records say about the place of a rule."""
    apply(book, "# a comment\n" + policy("a") + "---\n" + policy("b"), "two.yaml")
    apply(book, policy("a", "81"), "one.yaml")
    back = again(tmp_path, revision=book.repository.revision)
    assert names(back) == names(book) == ["a", "b"]
    for old, new in zip(book.repository.objects, back.repository.objects, strict=True):
        assert old == new
        assert [e.origin for e in old.entries] == [e.origin for e in new.entries]
    assert back.repository.revision == book.repository.revision == 3


def test_a_deleted_object_stays_deleted(book, tmp_path):
    """Also if the text that held it still holds others."""
    apply(book, policy("a") + "---\n" + policy("b"), "two.yaml")
    change = book.delete([("CiliumNetworkPolicy", "default", "a"), ("X", "", "nothing")])
    assert [key[2] for key, _ in change.listed()] == ["a"]
    assert names(again(tmp_path)) == ["b"]


def test_a_file_is_followed(book, tmp_path):
    """Objects come, change and go with it."""
    path = Path("/etc/p/x.yaml")
    assert book.follow(path, policy("a") + "---\n" + policy("b")).changed
    assert not book.follow(path, policy("a") + "---\n" + policy("b")).changed
    change = book.follow(path, policy("b", "81") + "---\n" + policy("c"))
    kinds = {key[2]: kind.value for key, kind in change.listed()}
    assert kinds == {"a": "deleted", "b": "configured", "c": "created"}
    assert book.followed() == (path,)
    assert names(again(tmp_path)) == ["b", "c"]
    book.unfollow(path)
    assert names(book) == names(again(tmp_path)) == []


def test_a_broken_file_keeps_its_last_valid_objects_over_a_restart(book, tmp_path):
    """And says what is wrong until it is mended."""
    path = Path("/etc/p/x.yaml")
    book.follow(path, policy("a"))
    assert book.follow(path, policy("a", "99999")) is None
    assert names(book) == ["a"]
    assert "99999" in str(book.refused[str(path)][0])
    back = again(tmp_path)
    assert names(back) == ["a"]
    back.follow(path, policy("a"))
    assert back.refused == {}


def test_an_object_of_a_file_that_the_api_replaced_does_not_go_with_the_file(book):
    """The last one who wrote it owns it."""
    path = Path("/etc/p/x.yaml")
    book.follow(path, policy("a"))
    apply(book, policy("a", "81"), "api.yaml")
    book.unfollow(path)
    assert names(book) == ["a"]


def test_namespaces_and_other_objects_are_kept_too(book, tmp_path):
    """What policies name must be there after a restart."""
    change = apply(book, NAMESPACE + "---\n" + policy("a"), "ns.yaml")
    assert ("Namespace", "", "red") in dict(change.listed())
    back = again(tmp_path)
    assert back.namespaces()["red"].labels.strings()
    gone = back.delete([("Namespace", "", "red")])
    assert gone.changed
    assert back.namespaces() == {}
    assert again(tmp_path).namespaces() == {}


def test_a_change_that_cannot_be_persisted_does_not_happen(book, monkeypatch):
    """A full disk: what is in force is what the file says."""
    apply(book, policy("a"), "a.yaml")

    def full(*_):
        raise OSError(28, "no space left")

    monkeypatch.setattr("firewall.agent.statefile.write", full)
    for attempt in (
        lambda: apply(book, policy("b"), "b.yaml"),
        lambda: book.delete([("CiliumNetworkPolicy", "default", "a")]),
        lambda: book.follow(Path("/x.yaml"), policy("c")),
    ):
        with pytest.raises(OSError, match="no space"):
            attempt()
    assert names(book) == ["a"]


def test_a_damaged_file_is_refused(book, tmp_path):
    """Fewer policies than applied would be an open door."""
    apply(book, policy("a"), "a.yaml")
    path = tmp_path / "policies"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StateError, match="endpoints are then open"):
        again(tmp_path)
