"""LabelSelectors of all formats, and the namespace and cluster that Cilium adds to them.

Keys of Cilium's own selectors may carry a source; without one they mean every source. Keys of
Kubernetes' selectors never carry one and mean workload labels (source k8s), or, in a
namespaceSelector, the labels of the namespace, which endpoints carry under
`io.cilium.k8s.namespace.labels.`.

Source: Cilium pkg/k8s/apis/cilium.io/utils/utils.go, pkg/k8s/network_policy.go; label syntax from
Kubernetes' apimachinery (values up to 63 characters).
"""

import re
from collections.abc import Callable

from firewall.identities.labels import (
    ANY,
    CLUSTER,
    K8S,
    NAMESPACE_LABELS,
    POD_NAMESPACE,
    RESERVED,
    UNSPEC,
    LabelError,
)
from firewall.identities.reserved import NUMBERS
from firewall.identities.selector import (
    OPERATOR_WORDS,
    Key,
    Operator,
    Requirement,
    Selector,
    SelectorError,
    parse_key,
    require,
)
from firewall.policy.problem import did_you_mean
from firewall.policy.readers.document import Value, shorten
from firewall.policy.readers.settings import ReaderSettings

_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")  # the CRD's own pattern
_SELECTOR_FIELDS = ("matchLabels", "matchExpressions")
_EXPRESSION_FIELDS = ("key", "operator", "values")
_K8S_KEY = re.compile(
    r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)

_KEY = re.compile(r"[A-Za-z0-9_]([-A-Za-z0-9_./]{0,314}[A-Za-z0-9_])?")
"""Every key of Kubernetes (prefix 253, name 63), and those of others, which may begin with `_`."""

_WRITTEN_BY_PEOPLE = frozenset({ANY, K8S, UNSPEC, "container", "mesos", "node"})
"""Sources whose keys are names; those of others are prefixes, patterns and the like."""

KeyReader = Callable[[str], Key]
"""Makes a selector key of a written one; raises LabelError."""


def is_label_key(text: str) -> bool:
    """Say whether Kubernetes takes a text as a label's key."""
    return _K8S_KEY.fullmatch(text) is not None


def workload_key(text: str) -> Key:
    """Read a key of a Kubernetes podSelector: a workload label."""
    if not is_label_key(text):
        raise LabelError(f'"{shorten(text)}" is no Kubernetes label key')
    return Key(K8S, text)


def namespace_key(text: str) -> Key:
    """Read a key of a namespaceSelector: a label of the endpoint's namespace."""
    if not is_label_key(text):
        raise LabelError(f'"{shorten(text)}" is no Kubernetes label key')
    return Key(K8S, f"{NAMESPACE_LABELS}.{text}")


def read_selector(value: Value, key_of: KeyReader = parse_key) -> Selector:
    """Read one LabelSelector; problems are reported, what can be read is returned."""
    fields = value.fields(_SELECTOR_FIELDS)
    requirements: list[Requirement] = []
    if "matchLabels" in fields:
        for name, wanted in fields["matchLabels"].pairs().items():
            key = _key(name, wanted, key_of)
            text = read_label_value(wanted)
            if key is not None and text is not None:
                requirements.append(Requirement(key, Operator.IN, (text,)))
    if "matchExpressions" in fields:
        for item in fields["matchExpressions"].items():
            requirement = _expression(item, key_of)
            if requirement is not None:
                requirements.append(requirement)
    return Selector(tuple(requirements))


def _key(name: str, place: Value, key_of: KeyReader) -> Key | None:
    try:
        key = key_of(name)
    except LabelError as error:
        place.error(str(error))
        return None
    if key.source == RESERVED:
        if key.name not in NUMBERS:
            hint = did_you_mean(key.name, NUMBERS)
            place.warning(f'no identity has the label "{RESERVED}:{shorten(key.name)}"{hint}')
    elif key.source in _WRITTEN_BY_PEOPLE and not _KEY.fullmatch(key.name):
        place.error(
            f'"{shorten(key.name)}" is no label key: letters, digits, "-", "_", "." and "/"'
        )
        return None
    return key


def read_label_value(value: Value) -> str | None:
    """Read a label's value; null is the empty one. None after a report."""
    if value.is_null:
        value.warning('is empty and matches the empty value only; write ""')
        return ""
    text = value.text()
    if text is not None and not _VALUE.fullmatch(text):
        value.error(
            f'"{shorten(text)}" is no label value: at most 63 letters, digits, "-", "_" or ".", '
            "beginning and ending with a letter or digit"
        )
        return None
    return text


def _expression(item: Value, key_of: KeyReader) -> Requirement | None:
    fields = item.fields(_EXPRESSION_FIELDS)
    if not item.is_mapping:
        return None
    missing = [name for name in ("key", "operator") if name not in fields]
    if missing:
        item.error(f"needs {' and '.join(missing)}")
    written = fields["key"].text() if "key" in fields else None
    key = None if written is None else _key(written, fields["key"], key_of)
    word = fields["operator"].word(OPERATOR_WORDS) if "operator" in fields else None
    texts = [read_label_value(v) for v in fields["values"].items()] if "values" in fields else []
    if key is None or word is None or None in texts:
        return None
    try:
        return require(key, OPERATOR_WORDS[word], [text for text in texts if text is not None])
    except SelectorError as error:
        item.error(str(error))
        return None


def confine_subject(value: Value, selector: Selector, namespace: str) -> Selector:
    """Confine a namespaced policy's subject to its namespace, whatever the author wrote."""
    for requirement in selector.requirements:
        key = requirement.key
        if key.name == POD_NAMESPACE and key.source in (K8S, ANY):
            if requirement != (key, Operator.IN, (namespace,)):
                value.warning(
                    f'selects another namespace; a policy of namespace "{namespace}" selects '
                    "endpoints of that namespace only, the requirement is replaced"
                )
            break
    return selector.with_label(K8S, POD_NAMESPACE, namespace)


def confine_peer(
    selector: Selector, namespace: str, settings: ReaderSettings, *, subject_is_init: bool = False
) -> Selector:
    """Add what Cilium adds to a peer: the namespace, and the local cluster.

    Args:
        selector: as written.
        namespace: of the policy; "" for a cluster-wide policy, whose peers must only be in some
            namespace (so host and world are no peers of `{}`).
        settings: the cluster's name.
        subject_is_init: the subject selects reserved:init, whose policies know no namespaces.
    """
    if selector.has_source(RESERVED):
        return selector
    if not selector.has_key(POD_NAMESPACE):
        if not namespace:
            selector = selector if subject_is_init else in_some_namespace(selector)
        elif not selector.has_key_prefix(f"{NAMESPACE_LABELS}."):
            selector = selector.with_label(K8S, POD_NAMESPACE, namespace)
    return confine_to_cluster(selector, settings)


def in_some_namespace(selector: Selector) -> Selector:
    """Confine a selector to endpoints that have a namespace: no host, no world."""
    return selector.with_requirement(Requirement(Key(K8S, POD_NAMESPACE), Operator.EXISTS))


def confine_to_cluster(selector: Selector, settings: ReaderSettings) -> Selector:
    """Confine a peer to the local cluster unless it names clusters itself."""
    if not settings.default_local_cluster or selector.has_key(CLUSTER):
        return selector
    return selector.with_label(K8S, CLUSTER, settings.cluster_name)
