"""Identities that exist without being allocated.

Source: Cilium pkg/identity/numericidentity.go. The numbers are part of the model: flow records,
policies' entities and operators' habits know them.
"""

from enum import IntEnum

from firewall.identities.labels import RESERVED, Label, LabelSet


class Reserved(IntEnum):
    """Cilium's reserved identities."""

    UNKNOWN = 0
    HOST = 1
    WORLD = 2
    UNMANAGED = 3
    HEALTH = 4
    INIT = 5
    REMOTE_NODE = 6
    KUBE_APISERVER = 7
    INGRESS = 8
    WORLD_IPV4 = 9
    WORLD_IPV6 = 10

    @property
    def label(self) -> str:
        """The key of the label that gave it its name: "remote-node"."""
        return self.name.lower().replace("_", "-")


def reserved_label(name: str) -> Label:
    """Return `reserved:<name>`."""
    return Label(RESERVED, name)


RESERVED_LABELS: dict[Reserved, LabelSet] = {
    number: LabelSet([reserved_label(number.label)]) for number in Reserved
} | {
    # The API server of a remote node is that node as well.
    Reserved.KUBE_APISERVER: LabelSet(
        [reserved_label("kube-apiserver"), reserved_label("remote-node")]
    ),
}
"""The label set of each number."""

NUMBERS: dict[str, Reserved] = {number.label: number for number in Reserved}
"""The number of each name: "world-ipv4" to `WORLD_IPV4`."""

RESERVED_MAX = 255
"""The last number that is never allocated: 0-99 reserved, 100-127 well-known, 128-255 fixed."""

FIXED_MIN = 128
"""The first number that an operator may give to a label set by hand (Cilium's user reserved)."""

CLUSTER_MIN = 256
"""The first number of the range that all nodes share (Cilium's Global Identity Range)."""

CLUSTER_MAX = 65535
"""The last number of the range that all nodes share."""

LOCAL_MIN = 1 << 24
"""The first number of this node's own range, for CIDR and FQDN label sets."""

LOCAL_MAX = (2 << 24) - 1
"""The last number of this node's own range."""

NODE_MIN = 2 << 24
"""The first number for other nodes by their labels (Cilium's remote-node scope)."""

NODE_MAX = (3 << 24) - 1
"""The last number for other nodes."""


def reserved_number(labels: LabelSet) -> Reserved | None:
    """Return the reserved identity that has exactly these labels, None if there is none."""
    return _BY_LABELS.get(labels)


_BY_LABELS = {labels: number for number, labels in RESERVED_LABELS.items()}


def world_for(address: bytes, *, dual_stack: bool = False) -> Reserved:
    """Return the identity of an address that nothing else is known about.

    Args:
        address: packed, 4 or 16 bytes.
        dual_stack: Cilium tells the families apart where a node has both.
    """
    if not dual_stack:
        return Reserved.WORLD
    return Reserved.WORLD_IPV4 if len(address) == 4 else Reserved.WORLD_IPV6


def is_local(number: int) -> bool:
    """Say whether a number belongs to this node alone."""
    return LOCAL_MIN <= number <= LOCAL_MAX


def is_world(number: int) -> bool:
    """Say whether a number is one of the three that mean an unknown address outside."""
    return number in (Reserved.WORLD, Reserved.WORLD_IPV4, Reserved.WORLD_IPV6)
