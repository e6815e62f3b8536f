"""Kubernetes' meaning of its policies: every table of ../shared/corpus/k8s.

A case names pods, policies and, per protocol and port, who may reach whom; some go through steps
(policies and labels change), which here means incremental resolution.
"""

from pathlib import Path

import pytest
import yaml
from policy.stage import Stage

from firewall.policy.readers import CAPABILITIES, ReaderSettings, read
from firewall.policy.verdict import Verdict

CORPUS = Path(__file__).resolve().parents[2] / "../shared/corpus/k8s"
_SETTINGS = ReaderSettings(enforceable=frozenset(CAPABILITIES))
_SIGNS = {Verdict.ACCEPT: ".", Verdict.DROP: "X"}


def cases():
    files = sorted(CORPUS.rglob("*.yaml"))
    if not files:
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"{CORPUS} is not there"))]
    return [pytest.param(file, id=str(file.relative_to(CORPUS))) for file in files]


class Cluster:
    """One case's pods, in the notation of its tables: `ns/name` and `ext:name`."""

    def __init__(self, case):
        self.stage = Stage()
        self.pods = {f"{pod['ns']}/{pod['name']}": dict(pod) for pod in case["pods"]}
        for name, pod in self.pods.items():
            ports = [
                (port["name"], {"TCP": 6, "UDP": 17, "SCTP": 132}[port["protocol"]], port["port"])
                for port in pod["ports"]
                if "name" in port
            ]
            self.stage.endpoint(name, pod["ip"], labels_of(pod), ports=ports, namespace=pod["ns"])
        for one in case.get("externals", ()):
            name = f"ext:{one['name']}"
            if one.get("node"):
                labels = [f"node:{key}={value}" for key, value in one.get("labels", {}).items()]
                labels.append("reserved:remote-node")
                self.stage.endpoint(name, one["ip"], labels, managed=False)
            else:
                self.stage.addresses[name] = self.stage.address(one["ip"])
        self.order = list(self.stage.addresses)
        self.put(case["policies"])

    def put(self, documents):
        texts = []
        for at, document in enumerate(documents):
            # kube-network-policies 08-16 write endPort 65537, which no API server takes, and give
            # two policies one name; its table means all ports and both policies.
            text = yaml.safe_dump(document).replace("endPort: 65537", "endPort: 65535")
            texts.append((f"{at}.yaml", text))
        objects = []
        for file, text in texts:
            result = read(text, file, settings=_SETTINGS)
            assert not result.errors, list(map(str, result.errors))
            objects += result.objects
        assert len({one.key for one in objects}) == len(objects)
        self.stage.apply(*objects)

    def perform(self, action):
        [(verb, value)] = action.items()
        match verb:
            case "createPolicy" | "updatePolicy":
                self.put([value])
            case "deleteAllPolicies":
                self.stage.delete(*(one.key for one in self.stage.repository.objects))
            case "setPodLabels":
                name = f"{value['ns']}/{value['name']}"
                self.pods[name]["labels"] = value["labels"]
                self.stage.relabel(name, labels_of(self.pods[name]))
            case "setNamespaceLabels":
                for name, pod in self.pods.items():
                    if pod["ns"] == value["name"]:
                        pod["nslabels"] = value["labels"]
                        self.stage.relabel(name, labels_of(pod))
            case _:
                raise AssertionError(verb)


def labels_of(pod):
    texts = [f"k8s:{key}={value}" for key, value in pod["labels"].items()]
    for key, value in pod["nslabels"].items():
        texts.append(f"k8s:io.cilium.k8s.namespace.labels.{key}={value}")
    # Kubernetes itself gives every namespace this label.
    texts.append(f"k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name={pod['ns']}")
    texts.append(f"k8s:io.kubernetes.pod.namespace={pod['ns']}")
    texts.append("k8s:io.cilium.k8s.policy.cluster=default")
    return sorted(set(texts))


def wrong_lines(cluster, tables, *, inverted=False):
    view = cluster.stage.view
    assert not cluster.stage.resolver.errors
    for table in tables:
        for source, expected in table["allowed"].items():
            if inverted:
                expected = expected.translate(str.maketrans(".X", "X."))  # noqa: PLW2901
            found = ""
            for destination, sign in zip(cluster.order, expected, strict=True):
                decision = cluster.stage.decide(
                    source, destination, table["protocol"], table["port"], view
                )
                found += "-" if sign == "-" else _SIGNS[decision.verdict]
            if found != expected:
                yield f"{table['protocol']}/{table['port']} {source}: {found}, not {expected}"


@pytest.mark.parametrize("file", cases())
def test_a_kubernetes_table_holds(file):
    case = yaml.safe_load(file.read_text())
    cluster = Cluster(case)
    wrong = []
    # One source means `ingress: []` as "allow all"; by the API it allows nothing.
    inverted = "known_disagreement" in case
    wrong += wrong_lines(cluster, case.get("expect", ()), inverted=inverted)
    for step in case.get("steps", ()):
        for action in step.get("actions") or ():
            cluster.perform(action)
        wrong += [f"{step.get('note')}: {line}" for line in wrong_lines(cluster, step["expect"])]
    assert not wrong, "\n".join(wrong)
