"""Rules are found again by their labels, those of Kubernetes included."""

import pytest

from firewall.policy.readers import read
from firewall.policy.repository import Repository

TEXT = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: rule1, namespace: x}
spec:
  endpointSelector: {}
  ingress: [{}]
  labels: [{key: team, value: red}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: rule2, namespace: x}
spec: {podSelector: {}}
"""


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["k8s:io.cilium.k8s.policy.name=rule1"], ["rule1"]),
        (["any:io.cilium.k8s.policy.name=rule1"], ["rule1"]),
        (["any:io.cilium.k8s.policy.namespace=x"], ["rule1", "rule2"]),
        (["k8s:io.cilium.k8s.policy.derived-from=NetworkPolicy"], ["rule2"]),
        (["any:team=red"], ["rule1"]),
        (["unspec:team=red"], ["rule1"]),
        (["k8s:team=red"], []),
        (["any:team=red", "k8s:io.cilium.k8s.policy.name=rule2"], []),
    ],
)
def test_an_object_is_selected_by_all_of_the_labels(labels, found):
    """Cilium pkg/k8s/apis/cilium.io/utils GetPolicyLabels; ParseSelectLabel for `any`."""
    repository = Repository()
    repository.apply(read(TEXT, "rules.yaml").objects)
    assert [one.key.name for one in repository.select(labels=labels)] == found
