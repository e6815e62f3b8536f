"""Edits in the author's text: as few characters as possible, and never another meaning."""

import subprocess

import pytest

from firewall.policy.edits import Append, EditError, Put, Take, applied, parse_path
from firewall.policy.model import ObjectKey
from firewall.policy.patch import patched, unified
from firewall.policy.readers import ReaderSettings, read

SETTINGS = ReaderSettings()
KEY = ObjectKey(kind="CiliumNetworkPolicy", namespace="default", name="p")
TEXT = """\
# first a comment
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata:
  name: p   # the name
spec:
  endpointSelector: {matchLabels: {app: b}}
  ingress:
  # the front
  - fromEndpoints:
    - matchLabels: {app: a}   # ours
    - matchLabels:
        app: c
    toPorts:
    - ports: [{port: "80", protocol: TCP}, {port: "81"}]

  # the world
  - fromCIDRSet:
    - cidr: 192.0.2.0/24
      except: [192.0.2.128/25]
  ingressDeny:
  - fromEntities: [world]   # nobody else
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: other}
spec: {endpointSelector: {}, egress: [{}]}
"""


def diff(text, *edits):
    """Lines taken out and put in."""
    after = patched(text, KEY, edits, SETTINGS)
    assert after is not None
    return [
        line for line in unified(text, after, "f").splitlines()[2:] if line.startswith(("+", "-"))
    ]


@pytest.mark.parametrize(
    ("edit", "lines"),
    [
        (
            Append(("spec", "ingress", 0, "fromEndpoints"), {"matchLabels": {"app": "d"}}),
            ["+    - matchLabels: {app: d}"],
        ),
        (
            Append(("spec", "ingress", 0, "toPorts", 0, "ports"), {"port": "9"}),
            [
                '-    - ports: [{port: "80", protocol: TCP}, {port: "81"}]',
                """+    - ports: [{port: "80", protocol: TCP}, {port: "81"}, {port: '9'}]""",
            ],
        ),
        (
            Append(("spec", "ingress", 1, "fromCIDRSet", 0, "except"), "192.0.2.9/32"),
            [
                "-      except: [192.0.2.128/25]",
                "+      except: [192.0.2.128/25, 192.0.2.9/32]",
            ],
        ),
        (
            Append(("spec", "egress"), {"toEntities": ["world"]}),
            ["+  egress:", "+  - toEntities: [world]"],
        ),
        (
            Take(("spec", "ingress", 0, "fromEndpoints", 1)),
            ["-    - matchLabels:", "-        app: c"],
        ),
        (
            Take(("spec", "ingressDeny")),
            ["-  ingressDeny:", "-  - fromEntities: [world]   # nobody else"],
        ),
        (
            Put(("spec", "ingressDeny", 0), {}),
            ["-  - fromEntities: [world]   # nobody else", "+  - {}   # nobody else"],
        ),
    ],
)
def test_an_edit_touches_only_its_own_lines(edit, lines):
    """Comments, blank lines and the other object stay."""
    assert diff(TEXT, edit) == lines


def test_several_edits_are_made_in_their_order():
    """An index of the second means the list as the first left it."""
    path = ("spec", "ingress")
    edits = (Take((*path, 0)), Append((*path, 0, "fromCIDRSet"), {"cidr": "198.51.100.0/24"}))
    lines = diff(TEXT, *edits)
    assert "+    - {cidr: 198.51.100.0/24}" in lines
    assert "-  - fromEndpoints:" in lines


def test_an_anchor_that_is_used_twice_is_not_edited_for_both():
    """The smallest edit would change two rules; a larger one is made instead."""
    text = TEXT.replace("matchLabels: {app: a}   # ours", "&peer {matchLabels: {app: a}}").replace(
        "- matchLabels:\n        app: c", "- *peer"
    )
    edit = Append(("spec", "ingress", 0, "fromEndpoints", 0, "matchExpressions"),
                  {"key": "tier", "operator": "Exists"})  # fmt: skip
    after = patched(text, KEY, (edit,), SETTINGS)
    before = read(text, "", settings=SETTINGS).objects[0].document
    assert read(after, "", settings=SETTINGS).objects[0].document == applied(before, (edit,))


def test_a_json_file_stays_json():
    """JSON is written in brackets throughout."""
    text = (
        '{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",\n'
        ' "metadata": {"name": "p"},\n'
        ' "spec": {"endpointSelector": {}, "ingress": [{"fromEntities": ["host"]}]}}\n'
    )
    lines = diff(text, Append(("spec", "ingress", 0, "fromEntities"), "world"))
    assert lines[1] == lines[0].replace("-", "+", 1).replace('["host"]', '["host", world]')


def test_an_object_is_taken_out_of_its_file():
    """The other one stays as it is."""
    after = patched(TEXT, KEY, None, SETTINGS)
    assert [one.key.name for one in read(after, "", settings=SETTINGS).objects] == ["other"]


def test_an_object_inside_a_list_is_found():
    """`kind: List`."""
    text = "apiVersion: v1\nkind: List\nitems:\n- " + "\n  ".join(
        TEXT.split("---", maxsplit=1)[0].splitlines()[1:]
    )
    after = patched(text, KEY, (Append(("spec", "egress"), {}),), SETTINGS)
    assert read(after, "", settings=SETTINGS).objects[0].document["spec"]["egress"] == [{}]


def test_an_unknown_object_cannot_be_patched():
    """None, so that the caller prints the whole object."""
    other = ObjectKey(kind="CiliumNetworkPolicy", namespace="y", name="p")
    assert patched(TEXT, other, (Take(("spec", "ingress")),), SETTINGS) is None


def test_the_patch_is_one_that_patch_takes(tmp_path):
    """Also where the file has no newline at its end."""
    text = TEXT.rstrip("\n")
    (tmp_path / "p.yaml").write_text(text)
    edit = Append(("spec", "ingress", 1, "fromCIDRSet"), {"cidr": "198.51.100.0/24"})
    after = patched(text, KEY, (edit,), SETTINGS)
    subprocess.run(
        ["patch", "-p1"], cwd=tmp_path, input=unified(text, after, "p.yaml"), text=True, check=True,
        capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "p.yaml").read_text() == after


def test_paths_of_origins_are_read():
    """Keys and indexes."""
    path = ("specs", 1, "ingressDeny", 0, "toPorts", 12)
    assert parse_path("specs[1].ingressDeny[0].toPorts[12]") == path


@pytest.mark.parametrize(
    "edit", [Take(("a", 5)), Take(("b",)), Append(("a", "x"), 1), Put(("c", "d"), 1)]
)
def test_an_edit_of_a_place_that_is_not_there_is_refused(edit):
    """Nothing is guessed."""
    with pytest.raises(EditError):
        applied({"a": [1]}, (edit,))
