"""The numbers that exist without being allocated."""

import pytest

from firewall.identities.labels import LabelSet
from firewall.identities.reserved import (
    NUMBERS,
    RESERVED_LABELS,
    Reserved,
    is_local,
    reserved_number,
    world_for,
)


@pytest.mark.parametrize(
    ("number", "name"),
    list(enumerate(
        ["unknown", "host", "world", "unmanaged", "health", "init", "remote-node",
         "kube-apiserver", "ingress", "world-ipv4", "world-ipv6"]
    )),
)  # fmt: skip
def test_numbers_and_names_are_ciliums(number, name):
    """pkg/identity/numericidentity.go."""
    assert NUMBERS[name] == number
    assert f"reserved:{name}" in RESERVED_LABELS[Reserved(number)].strings()


def test_the_api_server_is_a_remote_node_too():
    labels = RESERVED_LABELS[Reserved.KUBE_APISERVER]
    assert labels.strings() == ("reserved:kube-apiserver", "reserved:remote-node")


def test_a_label_set_is_reserved_only_if_it_is_exactly_one_of_them():
    assert reserved_number(LabelSet.parse(["reserved:host"])) is Reserved.HOST
    assert reserved_number(LabelSet.parse(["reserved:host", "k8s:a=b"])) is None
    assert reserved_number(LabelSet()) is None


def test_world_is_one_identity_until_the_families_are_told_apart():
    assert world_for(bytes(4)) == world_for(bytes(16)) == 2
    assert world_for(bytes(4), dual_stack=True) == 9
    assert world_for(bytes(16), dual_stack=True) == 10


def test_local_numbers_begin_at_16777216():
    assert not is_local(65535)
    assert is_local(1 << 24)
    assert not is_local(2 << 24)
