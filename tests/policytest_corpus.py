"""The Kubernetes corpus as policy tests: one file of ../shared/corpus/k8s to one PolicyTest."""

import copy
from pathlib import Path

import yaml

CORPUS = Path(__file__).resolve().parents[1] / "../shared/corpus/k8s"
_FLIPPED = str.maketrans(".X", "X.")


def files():
    return sorted(CORPUS.rglob("*.yaml"))


def converted(case):
    """The mapping of a PolicyTest for a case of the corpus."""
    namespaces = {}
    for pod in case["pods"]:
        namespaces[pod["ns"]] = {"labels": pod["nslabels"]}
    endpoints = [
        {
            "namespace": pod["ns"],
            "name": pod["name"],
            "labels": pod["labels"],
            "ip": pod["ip"],
            "ports": pod["ports"],
        }
        for pod in case["pods"]
    ]
    order = [f"{pod['ns']}/{pod['name']}" for pod in case["pods"]]
    hosts = []
    for one in case.get("externals", ()):
        host = {"name": one["name"], "ip": one["ip"]}
        if one.get("node") and _means_nodes(case):
            host["nodeLabels"] = one.get("labels", {})
        hosts.append(host)
        order.append(f"host:{one['name']}")
    # One source means `ingress: []` as "allow all"; by the API it allows nothing.
    flipped = "known_disagreement" in case
    test = {
        "apiVersion": "bartizan.dev/v1",
        "kind": "PolicyTest",
        "namespaces": namespaces,
        "endpoints": endpoints,
        "hosts": hosts,
        "policies": [_mended(document) for document in case["policies"]],
    }
    if "expect" in case:
        test["matrix"] = [_matrix(table, order, flipped) for table in case["expect"]]
    keys = [_key(document) for document in case["policies"]]
    steps = []
    for step in case.get("steps", ()):
        made = {"name": step.get("note") or "step"}
        for action in step.get("actions") or ():
            _act(made, action, case, keys)
        made["matrix"] = [_matrix(table, order, False) for table in step["expect"]]
        steps.append(made)
    if steps:
        test["steps"] = steps
    return test


def _means_nodes(case):
    """Whether some policy has node peers; to all others a node is an address outside."""
    return "'nodes':" in str(case["policies"])


def _mended(document):
    # kube-network-policies 08-16 write endPort 65537, which no API server takes; the table means
    # all ports.
    return yaml.load(
        yaml.dump(document, Dumper=yaml.CSafeDumper).replace("endPort: 65537", "endPort: 65535"),
        yaml.CSafeLoader,
    )


def _key(document):
    metadata = document["metadata"]
    parts = (document["kind"], metadata.get("namespace"), metadata["name"])
    return "/".join(part for part in parts if part)


def _act(made, action, case, keys):
    [(verb, value)] = action.items()
    match verb:
        case "createPolicy" | "updatePolicy":
            made.setdefault("apply", []).append(_mended(value))
            keys.append(_key(value))
        case "deleteAllPolicies":
            made["delete"] = sorted(set(keys))
            keys.clear()
        case "setPodLabels":
            name = f"{value['ns']}/{value['name']}"
            [pod] = [p for p in case["pods"] if f"{p['ns']}/{p['name']}" == name]
            made.setdefault("label", {})[name] = _difference(pod["labels"], value["labels"])
            pod["labels"] = value["labels"]
        case "setNamespaceLabels":
            pods = [p for p in case["pods"] if p["ns"] == value["name"]]
            changes = _difference(pods[0]["nslabels"], value["labels"])
            made.setdefault("namespaces", {})[value["name"]] = {"labels": changes}
            for pod in pods:
                pod["nslabels"] = value["labels"]
        case _:
            raise AssertionError(verb)


def _difference(old, new):
    return dict.fromkeys(old) | new


def _matrix(table, order, flipped):
    rows = {_title(name): row for name, row in table["allowed"].items()}
    if flipped:
        rows = {name: row.translate(_FLIPPED) for name, row in rows.items()}
    return {"port": f"{table['port']}/{table['protocol']}", "columns": order, "rows": rows}


def _title(name):
    return name.replace("ext:", "host:")


def load(path):
    return converted(copy.deepcopy(yaml.load(path.read_text(), yaml.CSafeLoader)))
