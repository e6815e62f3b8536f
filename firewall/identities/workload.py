"""All labels of a workload: its own, its namespace's and its cluster's.

Cilium's agent adds to a pod's labels those that policies refer to implicitly. Whoever makes
endpoints (the agent, a policy test, an offline question) adds them here, so that all mean the same.
Source: Cilium pkg/k8s/labels.go GetPodMetadata, pkg/k8s/apis/cilium.io/const.go.
"""

from collections.abc import Iterable

from firewall.identities.labels import (
    CLUSTER,
    K8S,
    NAMESPACE_LABELS,
    POD_NAMESPACE,
    RESERVED,
    Label,
    LabelSet,
)

METADATA_NAME = f"{NAMESPACE_LABELS}.kubernetes.io/metadata.name"
"""Kubernetes labels every namespace with its name; namespaceSelectors rely on it."""


def workload_labels(
    own: LabelSet, *, namespace: str, cluster: str, namespace_labels: Iterable[tuple[str, str]] = ()
) -> LabelSet:
    """Return all labels of an endpoint; what its own labels say counts.

    An endpoint that is `reserved:init` gets nothing added: what it is, is not known yet.

    Args:
        own: the labels it was declared with.
        namespace: the namespace it lives in.
        cluster: the name of its cluster.
        namespace_labels: (key, value) of the namespace's own labels.
    """
    if own.get(RESERVED, "init") is not None:
        return own
    added = {
        POD_NAMESPACE: namespace,
        CLUSTER: cluster,
        METADATA_NAME: namespace,
        **{f"{NAMESPACE_LABELS}.{key}": value for key, value in namespace_labels},
    }
    said = {label.name for label in own}
    labels = [Label(K8S, key, value) for key, value in added.items()]
    return own.with_labels(label for label in labels if label.name not in said)
