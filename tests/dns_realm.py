"""Who may ask whom for which names, for tests of the DNS proxy's core."""

from conntrack.address import parse_address
from firewall.identities.labels import LabelSet
from firewall.policy.readers import read
from firewall.policy.realm import Actor, make_realm
from firewall.policy.snapshot import Settings

CLIENT, OTHER, SERVER = map(parse_address, ("10.0.0.1", "10.0.0.2", "203.0.113.53"))
UDP, TCP = 17, 6

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: names}
spec:
  endpointSelector: {matchLabels: {app: a}}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules:
        dns: [{matchName: api.example}, {matchPattern: "*.cdn.example"}]
"""


def view(text=POLICY, client="10.0.0.1", **settings):
    labels = {client: "a", "10.0.0.2": "b"}
    actors = [
        Actor(
            name=app,
            namespace="default",
            labels=LabelSet.parse(
                [
                    f"k8s:app={app}",
                    "k8s:io.kubernetes.pod.namespace=default",
                    "k8s:io.cilium.k8s.policy.cluster=default",
                ]
            ),
            addresses=(parse_address(address),),
        )
        for address, app in labels.items()
    ]
    result = read(text, "p.yaml")
    assert not result.errors
    return make_realm(actors, result.objects, settings=Settings(**settings)).view
