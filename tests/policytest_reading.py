"""Words for tests of policy tests: write one in few lines, read it, play it."""

from pathlib import Path

import yaml

from policytest.play import play
from policytest.reader import read_case_text

HEAD = {"apiVersion": "bartizan.dev/v1", "kind": "PolicyTest"}

WEB = {
    "apiVersion": "cilium.io/v2",
    "kind": "CiliumNetworkPolicy",
    "metadata": {"name": "web", "namespace": "x"},
    "spec": {
        "endpointSelector": {"matchLabels": {"app": "b"}},
        "ingress": [
            {
                "fromEndpoints": [{"matchLabels": {"app": "a"}}],
                "toPorts": [{"ports": [{"port": "80", "protocol": "TCP"}]}],
            }
        ],
    },
}
"""Only a may reach b, only on 80/TCP."""


class _Dumper(yaml.CSafeDumper):
    def ignore_aliases(self, data):  # a list used twice is written twice
        return True


def text_of(document):
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False)


def written(**fields):
    """The text of a policy test with endpoints x/a and x/b, unless `fields` says others."""
    document = {
        **HEAD,
        "endpoints": [
            {"namespace": "x", "name": "a", "labels": {"app": "a"}},
            {"namespace": "x", "name": "b", "labels": {"app": "b"}},
        ],
        **fields,
    }
    return text_of(document)


def read(text, folder="."):
    return read_case_text(text, "t.yaml", Path(folder))


def case_of(text, folder="."):
    found = read(text, folder)
    assert not found.errors, list(map(str, found.errors))
    return found.case


def results(case):
    return list(play(case, lambda _step, _check: True))


def failures(case):
    """What is wrong with a case in the model, one line each."""
    return [
        f"{result.step}: {result.check.title}: {fault}"
        for result in results(case)
        for fault in (result.faults or (() if result.passed else ("the judges disagree",)))
    ]
