"""Counters of all proxy workers under Envoy's own names, as text, JSON and Prometheus. Pure.

Envoy names a statistic by dotted words, and its Prometheus form takes some of them out into labels
(docs, operations/admin and configuration/*/stats). Ours are flat (`metrics`); this is the border.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from l7proxy.metrics import BUCKETS_MS, Row

PREFIX, CLUSTER = "bartizan", "original_dst"
"""The one connection manager, and the one cluster: where the client wanted to go."""

_TOTALS = frozenset(
    {
        "http_downstream_cx_total", "http_downstream_cx_http2_total", "http_downstream_rq_total",
        "http_downstream_rq_http1_total", "http_downstream_rq_http2_total", "upstream_cx_total",
        "upstream_rq_total",
    }
)  # fmt: skip
"""Those that end so in Envoy too; ours all do."""

_UNSAFE = re.compile(r"[^a-zA-Z0-9_]")
_CODE_CLASS = re.compile(r"_rq_([1-5])xx$")


class Stat(NamedTuple):
    """One statistic: Envoy's dotted name, a value, and whether it only grows."""

    name: str
    value: float
    counts: bool


class Times(NamedTuple):
    """One histogram: dotted name, cumulative counts by BUCKETS_MS and of all, sum in ms."""

    name: str
    buckets: list[int]
    sum_ms: float


def gather(answers: Iterable[Iterable[Row]]) -> tuple[list[Stat], list[Times]]:
    """Add up what the workers said; sorted by name."""
    sums: dict[tuple[str, bool], float] = {}
    times: dict[str, Times] = {}
    for row in (row for rows in answers for row in rows):
        name = str(row["name"])
        buckets = row.get("buckets")
        if isinstance(buckets, list):
            dotted = _dotted(name, {})
            before = times.get(dotted, Times(dotted, [0] * len(buckets), 0.0))
            added = [int(a) + int(b) for a, b in zip(before.buckets, buckets, strict=True)]
            times[dotted] = Times(dotted, added, before.sum_ms + float(str(row["sum"])))
            continue
        labels = row.get("labels")
        key = _dotted(name, labels if isinstance(labels, dict) else {}), name.endswith("_total")
        sums[key] = sums.get(key, 0.0) + float(str(row["value"]))
    stats = [Stat(name, value, counts) for (name, counts), value in sums.items()]
    return sorted(stats), sorted(times.values())


def _dotted(name: str, labels: Mapping[str, object]) -> str:
    """Return Envoy's name: a label of ours is a word of it."""
    short = name if name in _TOTALS else name.removesuffix("_total")
    word = "".join(f".{_UNSAFE.sub('_', str(value))}" for value in labels.values())
    if short.endswith("_rq_xx"):
        short, word = short.removesuffix("xx") + word[1:], ""
    if short == "cilium_access_denied":  # of Cilium's filter in Envoy
        return "cilium.access_denied"
    if short == "policy_l7":
        where = f"http.{PREFIX}.cilium" if labels["proxy_type"] == "envoy" else "dns"
        return f"{where}.l7policy.{labels['rule']}"
    if short.startswith("http_"):
        return f"http.{PREFIX}.{short.removeprefix('http_')}{word}"
    if short.startswith("upstream_"):
        return f"cluster.{CLUSTER}.{short}{word}"
    return f"{short}{word}"


def chosen(
    stats: list[Stat], times: list[Times], pattern: str, *, used_only: bool
) -> tuple[list[Stat], list[Times]]:
    """Return those whose name contains what `pattern` matches; `used_only`: and that are not 0.

    Raises:
        re.error: it is no regular expression.
    """
    wanted = re.compile(pattern)
    return (
        [s for s in stats if wanted.search(s.name) and (s.value or not used_only)],
        [t for t in times if wanted.search(t.name) and (t.buckets[-1] or not used_only)],
    )


def as_text(stats: list[Stat], times: list[Times]) -> str:
    """Return `name: value` lines, as GET /stats of Envoy."""
    lines = [f"{stat.name}: {stat.value:.15g}" for stat in stats]
    lines += [
        f"{one.name}: P50({_quantile(one, 0.5)}) P90({_quantile(one, 0.9)}) "
        f"P99({_quantile(one, 0.99)}) ms" if one.buckets[-1] else f"{one.name}: No recorded values"
        for one in times
    ]  # fmt: skip
    return "".join(f"{line}\n" for line in lines)


def _quantile(times: Times, part: float) -> str:
    """The bound of the bucket in which it lies."""
    wanted = part * times.buckets[-1]
    for bound, count in zip(BUCKETS_MS, times.buckets, strict=False):
        if count >= wanted:
            return f"{bound:g}"
    return "inf"


def as_json(stats: list[Stat], times: list[Times]) -> str:
    """Return what GET /stats?format=json of Envoy says."""
    rows: list[dict[str, object]] = [
        {"name": stat.name, "value": int(stat.value) if stat.value.is_integer() else stat.value}
        for stat in stats
    ]
    rows += [{"name": one.name, "count": one.buckets[-1], "sum_ms": one.sum_ms} for one in times]
    return json.dumps({"stats": rows}) + "\n"


def as_prometheus(stats: list[Stat], times: list[Times]) -> str:
    """Return the text format, version 0.0.4, with names and labels as Envoy's."""
    samples: dict[str, tuple[str, list[str]]] = {}
    for stat in stats:
        name, labels = _exposed(stat.name)
        kind = "counter" if stat.counts else "gauge"
        samples.setdefault(name, (kind, []))[1].append(f"{name}{_braces(labels)} {stat.value:.17g}")
    for one in times:
        name, labels = _exposed(one.name)
        bounds = [*(f"{bound:g}" for bound in BUCKETS_MS), "+Inf"]
        lines = [
            f"{name}_bucket{_braces({**labels, 'le': bound})} {count}"
            for bound, count in zip(bounds, one.buckets, strict=True)
        ]
        lines.append(f"{name}_sum{_braces(labels)} {one.sum_ms:.17g}")
        lines.append(f"{name}_count{_braces(labels)} {one.buckets[-1]}")
        samples[name] = "histogram", lines
    return "".join(
        f"# TYPE {name} {kind}\n" + "".join(f"{line}\n" for line in lines)
        for name, (kind, lines) in samples.items()
    )


def _exposed(dotted: str) -> tuple[str, dict[str, str]]:
    labels: dict[str, str] = {}
    family, _, rest = dotted.partition(".")
    if family in {"http", "cluster"} and rest:
        key = "envoy_http_conn_manager_prefix" if family == "http" else "envoy_cluster_name"
        labels[key], _, rest = rest.partition(".")
        dotted = f"{family}.{rest}"
    if found := _CODE_CLASS.search(dotted):
        labels["envoy_response_code_class"] = found[1]
        dotted = dotted[: found.start()] + "_rq_xx"
    for word in ("http.response_details.", "tls_connection_details."):
        if dotted.startswith(word):
            labels["detail"] = dotted.removeprefix(word)
            dotted = word[:-1]
    return "envoy_" + _UNSAFE.sub("_", dotted), labels


def _braces(labels: Mapping[str, str]) -> str:
    inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{{{inner}}}" if inner else ""
