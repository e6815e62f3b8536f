"""`metadata` of every object: its name, namespace and uid; the rest is the API server's.

Source: Kubernetes' apimachinery ObjectMeta.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from firewall.policy.readers.document import Value, shorten
from firewall.policy.readers.selectors import is_label_key, read_label_value

_FIELDS = (
    "name",
    "namespace",
    "uid",
    "labels",
    "annotations",
    "generateName",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "ownerReferences",
    "finalizers",
    "managedFields",
    "selfLink",
    "clusterName",
)
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LOOSE_NAME = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.:]*")
_NAMESPACE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_MAX_NAME_CHARACTERS = 253  # RFC 1123 section 2.1, Kubernetes object names
_MAX_NAMESPACE_CHARACTERS = 63  # it must fit a label's value


class Metadata(NamedTuple):
    """What the readers need of an object's metadata. `namespace` "" = cluster-wide."""

    name: str
    namespace: str
    uid: str = ""
    labels: tuple[tuple[str, str], ...] = ()


def read_metadata(root: Value, *, default_namespace: str, namespaced: bool) -> Metadata | None:
    """Read `metadata` of an object.

    Args:
        root: the object.
        default_namespace: for namespaced objects that name none.
        namespaced: whether the kind lives in namespaces.
    """
    value = root.child("metadata")
    if value is None:
        root.error("needs metadata with a name")
        return None
    fields = value.fields(_FIELDS)
    if not value.is_mapping:
        return None
    if "name" not in fields:
        value.error("needs a name")
        return None
    name = fields["name"].text()
    if name is None:
        return None
    if len(name) > _MAX_NAME_CHARACTERS or not _LOOSE_NAME.fullmatch(name):
        fields["name"].error(
            f'"{shorten(name)}" is no object name: at most {_MAX_NAME_CHARACTERS} lower-case '
            'letters, digits, "-" and "."'
        )
        return None
    if not _NAME.fullmatch(name):
        fields["name"].warning(f'"{name}" is no name that Kubernetes takes: write it lower-case')
    namespace = ""
    if "namespace" in fields:
        written = fields["namespace"].text() or ""
        if not namespaced:
            fields["namespace"].warning("is ignored: the kind is cluster-wide")
        elif written and (
            len(written) > _MAX_NAMESPACE_CHARACTERS or not _NAMESPACE.fullmatch(written)
        ):
            fields["namespace"].error(f'"{shorten(written)}" is no namespace name')
            return None
        else:
            namespace = written
    if namespaced:
        namespace = namespace or default_namespace
    uid = (fields["uid"].text() or "") if "uid" in fields else ""
    labels = tuple(_labels(fields["labels"])) if "labels" in fields else ()
    return Metadata(name, namespace, uid, labels)


def _labels(value: Value) -> Iterator[tuple[str, str]]:
    """Yield the labels that Kubernetes would take; others are problems.

    They become part of identities, whose text a semicolon would tear.
    """
    for key, item in value.pairs().items():
        if not is_label_key(key):
            item.error(f'"{shorten(key)}" is no Kubernetes label key')
            continue
        text = "" if item.is_null else read_label_value(item)
        if text is not None:
            yield key, text


def origin_labels(derived_from: str, metadata: Metadata) -> tuple[str, ...]:
    """Return the labels by which every rule of an object can be found again.

    Source: Cilium pkg/k8s/apis/cilium.io/utils/utils.go GetPolicyLabels.
    """
    prefix = "k8s:io.cilium.k8s.policy"
    labels = [f"{prefix}.derived-from={derived_from}", f"{prefix}.name={metadata.name}"]
    if metadata.namespace:
        labels.append(f"{prefix}.namespace={metadata.namespace}")
    if metadata.uid:
        labels.append(f"{prefix}.uid={metadata.uid}")
    return tuple(labels)
