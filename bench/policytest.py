"""`bartizan test`: checks per second, by the model and with real packets.

60 endpoints of 6 namespaces, 120 CiliumNetworkPolicies, a truth table of 3,600 cells per port. The
model's figure begins after loading and includes holding each answer against its expectation.
"""

import itertools
import time
from pathlib import Path

import yaml

from bench.figure import Figure
from policytest.answer import differences
from policytest.case import Case
from policytest.field import Field
from policytest.model import Model
from policytest.play import play
from policytest.reader import read_case_text

PROMISED_PER_S = 20_000
"""Issue 3, figures: checks a second in the model, after loading."""

_NAMESPACES, _PER_NAMESPACE = 6, 10
_PORTS = (80, 81, 443, 8080, 9090)


def _document(ports: tuple[int, ...]) -> str:
    names = [(f"n{n}", f"e{e}") for n in range(_NAMESPACES) for e in range(_PER_NAMESPACE)]
    endpoints = [
        {"namespace": namespace, "name": name, "labels": {"app": name, "tier": f"t{at % 3}"}}
        for at, (namespace, name) in enumerate(names)
    ]
    policies = [
        {
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumNetworkPolicy",
            "metadata": {"name": f"{name}-{kind}", "namespace": namespace},
            "spec": {
                "endpointSelector": {"matchLabels": {"app": name}},
                "ingress": [
                    {
                        "fromEndpoints": [{"matchLabels": {"tier": f"t{kind}"}}],
                        "toPorts": [{"ports": [{"port": str(port), "protocol": "TCP"}]}],
                    }
                    for port in _PORTS[kind::2]
                ],
            },
        }
        for (namespace, name), kind in itertools.product(names, range(2))
    ]
    rows = {f"{namespace}/{name}": "X" * len(names) for namespace, name in names}
    return yaml.dump(
        {
            "apiVersion": "bartizan.dev/v1",
            "kind": "PolicyTest",
            "endpoints": endpoints,
            "policies": policies,
            "matrix": [{"port": port, "rows": rows} for port in ports],
        },
        Dumper=yaml.CSafeDumper,
    )


def _case(ports: tuple[int, ...]) -> Case:
    found = read_case_text(_document(ports), "bench.yaml", Path())
    assert found.case is not None, found.errors
    return found.case


def _model_per_s() -> float:
    case = _case(_PORTS)
    model = Model(case)
    [step] = case.steps
    model.perform(step)
    began = time.perf_counter()
    for check, answer in zip(step.checks, model.answers(step.checks), strict=True):
        differences(check.expected, answer)
    return len(step.checks) / (time.perf_counter() - began)


def _packets() -> tuple[float, float]:
    """Return checks per second, and the seconds from nothing to the first verdict."""
    case = _case((80, 81))
    began = time.perf_counter()
    with Field([case]) as field:
        results = play(case, lambda _step, _check: True, field=field)
        next(results)
        whole_s = time.perf_counter() - began
        from policytest.packets import PacketJudge

        judge = PacketJudge(field, case)
        [step] = case.steps
        began = time.perf_counter()
        judge.answers(step.checks)
        return len(step.checks) / (time.perf_counter() - began), whole_s


def measure() -> list[Figure]:
    """Measure both modes."""
    packets_per_s, whole_s = _packets()
    return [
        Figure(
            what="policy test, checks answered by the model",
            value=_model_per_s(),
            unit="1/s",
            at_least=PROMISED_PER_S,
        ),
        Figure(what="policy test, checks answered by packets", value=packets_per_s, unit="1/s"),
        Figure(
            what="policy test, lab + daemon + 60 endpoints + 120 policies + 7,200 checks",
            value=whole_s,
            unit="s",
        ),
    ]
