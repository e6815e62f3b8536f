"""What is well and what is not, on one page and as metrics.

`errors` gathers every present trouble, one line each, with the next step where there is one: it is
what `bartizan status` ends with, and what makes it exit with 1.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from firewall.agent import views
from firewall.agent.collector import Collector
from firewall.agent.engine import Engine
from firewall.agent.redirects import redirects
from firewall.agent.worker import VERSION, Worker, WorkerState, ask_each
from firewall.datapath.kernel import KernelError, QueueCounters, read_queues
from firewall.datapath.kernel_table import TableCounters, read_table

ASK_TIMEOUT_S = 2.0
"""How long a worker may take to tell its metrics before they are left out."""

Labels = tuple[tuple[str, str], ...]


class Status:
    """Describes an engine and its collector.

    Attributes:
        problems: troubles of the daemon itself, by topic.
    """

    def __init__(self, engine: Engine, collector: Collector) -> None:
        self._engine = engine
        self._collector = collector
        self._began = time.monotonic()
        self.problems: dict[str, str] = {}

    async def document(self) -> dict[str, Any]:
        """Return everything, JSON-able."""
        engine = self._engine
        queues, trouble = await asyncio.to_thread(_queues)
        table = await asyncio.to_thread(read_table)
        metrics = await self._ask_workers()
        return {
            "agent": {
                "pid": os.getpid(),
                "version": VERSION,
                "uptime_s": round(time.monotonic() - self._began, 3),
                "node_name": engine.config.node,
                "cluster_name": engine.config.cluster_name,
                "fail_mode": "closed",
            },
            "revision": engine.publisher.revision,
            "policy_revision": engine.book.repository.revision,
            "generation": engine.publisher.snapshot.generation,
            "enforcement": engine.config.policy.enforcement,
            "audit": engine.config.policy.audit,
            "bypass": {
                "enabled": engine.bypass.enabled,
                "generation": engine.bypass.generation,
                "error": engine.bypass.problem,
            },
            "workers": [views.worker(worker, metrics.get(worker, ())) for worker in engine.workers],
            "proxy": self._proxied(metrics),
            "endpoints": views.endpoint_counts(engine),
            "identities": views.identity_counts(engine),
            "policies": len(engine.book.repository.objects),
            "queues": [views.queue(counters) for counters in queues],
            "kernel_conntrack": table._asdict() if table is not None else None,
            "flows": self._collector.counts(),
            "packet_readers": self._collector.monitor.reader_count,
            "kvstore": self._kvstore(),
            "errors": [
                *self.errors(),
                *_proxy_errors(metrics.values()),
                *([trouble] if trouble else []),
                *([_full(table)] if table is not None and table.is_full else []),
            ],
        }

    def _kvstore(self) -> dict[str, Any]:
        """Return where identities are agreed on, and with how many others."""
        engine = self._engine
        neighbours = engine.addresses.neighbours
        error = engine.problems.get("kvstore", "") or neighbours.problem
        nodes_count, addresses_count = neighbours.counts()
        return {
            "kind": "sqlite",
            "path": str(engine.config.kvstore_path),
            "shared": neighbours.shared,
            "nodes": nodes_count,
            "addresses": addresses_count,
            "ok": not error,
            "error": error,
        }

    def _proxied(self, metrics: Mapping[Worker, list[dict[str, object]]]) -> dict[str, Any]:
        """Return how many redirects there are, and what became of the requests in all."""
        counts = dict.fromkeys(("received", "forwarded", "denied", "parse_errors"), 0)
        for rows in metrics.values():
            for row in rows:
                if row["name"] == "policy_l7_total":
                    counts[str(_mapping(row["labels"])["rule"])] += int(str(row["value"]))
        snapshot = self._engine.publisher.snapshot
        return {
            "redirects": len(redirects(snapshot, ())),
            "port": snapshot.settings.http_proxy_port,
            "requests": counts,
        }

    def errors(self) -> list[str]:
        """Return every present trouble."""
        engine = self._engine
        topics = [*sorted(self.problems.items()), *sorted(engine.problems.items())]
        errors = [f"{topic}: {line}" for topic, text in topics for line in text.splitlines()]
        if engine.addresses.neighbours.problem:
            errors.append(f"kvstore: {engine.addresses.neighbours.problem}")
        if engine.bypass.problem:
            errors.append(f"bypass: {engine.bypass.problem}")
        for worker in engine.workers:
            if worker.state not in (WorkerState.RUNNING, WorkerState.LEAVING):
                dropped = (
                    "its packets are dropped"
                    if worker.spec.kind == "datapath"
                    else "requests that need it wait for another one"
                )
                errors.append(
                    f"worker {worker.spec.name}: {worker.state.name.lower()}; {dropped}"
                    + (f" ({worker.error})" if worker.error else "")
                )
            elif worker.error:
                errors.append(f"worker {worker.spec.name}: {worker.error}")
        errors += [f"policy: {problem}" for file in sorted(engine.book.refused)
                   for problem in engine.book.refused[file]]  # fmt: skip
        errors += [f"policy: {error}" for error in engine.resolver.errors]
        return errors

    def summary(self) -> str:
        """Return one line for the service manager."""
        counts = views.endpoint_counts(self._engine)
        return (
            f"{counts['ready']}/{counts['total']} endpoints ready, "
            f"{len(self._engine.book.repository.objects)} policies, "
            f"revision {self._engine.book.repository.revision}, "
            f"{self._collector.counts()['lost']} flows lost, {len(self.errors())} errors"
        )

    async def metrics(self) -> str:
        """Return all metrics in Prometheus' text form."""
        engine = self._engine
        exposition = Exposition()
        add = exposition.add
        for state, count in views.endpoint_counts(engine)["by_state"].items():
            add("cilium_endpoint_state", count, endpoint_state=state)
        identities = views.identity_counts(engine)
        for kind, name in (("reserved", "reserved"), ("cluster", "cluster_local"),
                           ("local", "node_local")):  # fmt: skip
            add("cilium_identity", identities[kind], type=name)
        add("cilium_policy", len(engine.book.repository.objects))
        add("cilium_policy_max_revision", engine.book.repository.revision)
        cache = engine.names.cache
        for number, (names, addresses) in cache.sizes().items():
            add("cilium_fqdn_active_names", names, endpoint=str(number))
            add("cilium_fqdn_active_ips", addresses, endpoint=str(number))
        add("cilium_fqdn_alive_zombie_connections", cache.zombie_count)
        add("bartizan_fqdn_forgotten_total", cache.forgotten_count)
        add("cilium_fqdn_selectors", len(engine.resolver.fqdns()))
        add("bartizan_fqdn_refused_ips", len(engine.names.refused))
        add("bartizan_snapshot_revision", engine.publisher.revision)
        add("bartizan_generation", engine.publisher.snapshot.generation)
        for worker in engine.workers:
            if worker.state is WorkerState.LEAVING:
                continue  # its successor has its name
            labels = {"kind": worker.spec.kind, "worker": str(worker.spec.number)}
            add("bartizan_worker_up", int(worker.state is WorkerState.RUNNING), **labels)
            add("bartizan_worker_restarts_total", worker.restarts_count, **labels)
            add("bartizan_worker_snapshot_revision", worker.revision, **labels)
        first = engine.bypass.rules.first_queue
        for queue in (await asyncio.to_thread(_queues))[0]:
            labels = {"queue": str(queue.queue), "worker": f"datapath-{queue.queue - first}"}
            if not 0 <= queue.queue - first < engine.bypass.rules.queue_count:
                labels["worker"] = ""  # another program's
            add("bartizan_nfqueue_depth", queue.depth, **labels)
            add("bartizan_nfqueue_packets_total", queue.packet_count, **labels)
            add("bartizan_nfqueue_kernel_dropped_total", queue.kernel_dropped, **labels)
            add("bartizan_nfqueue_user_dropped_total", queue.user_dropped, **labels)
        table = await asyncio.to_thread(read_table)
        if table is not None:
            add("bartizan_kernel_conntrack_entries", table.entries)
            add("bartizan_kernel_conntrack_limit", table.limit)
            add("bartizan_kernel_conntrack_dropped_total", table.dropped)
            add("bartizan_kernel_conntrack_early_dropped_total", table.early_dropped)
            add("bartizan_kernel_conntrack_clashed_total", table.clashed)
        kinds = Counter(row["parser"] for row in redirects(engine.publisher.snapshot, ()))
        for kind, count in sorted(kinds.items()):
            add("cilium_proxy_redirects", count, protocol=kind)
        add("bartizan_errors", len(self.errors()))
        for name, value, labels in await self._of_workers():
            add(name, value, **labels)
        return exposition.text() + self._collector.metrics()

    async def proxy(self) -> dict[str, Any]:
        """Return the redirects with their requests, and the workers of the proxy."""
        serving = [
            worker
            for worker in self._engine.workers
            if worker.spec.kind == "l7proxy"
            and worker.state in (WorkerState.RUNNING, WorkerState.LEAVING)
        ]
        counted, states = await asyncio.gather(
            ask_each(serving, "redirects", ASK_TIMEOUT_S),
            ask_each(serving, "status", ASK_TIMEOUT_S),
        )
        return {
            "redirects": redirects(self._engine.publisher.snapshot, counted.values()),
            "workers": [
                {**row, "state": worker.state.name.lower()}
                for worker, rows in states.items()
                for row in rows
            ],
        }

    async def _of_workers(self) -> list[tuple[str, float, dict[str, str]]]:
        """Return every worker's metrics, with its name as a label."""
        found: list[tuple[str, float, dict[str, str]]] = []
        for worker, rows in (await self._ask_workers()).items():
            for row in rows:
                labels = {str(k): str(v) for k, v in _mapping(row.get("labels")).items()}
                labels["worker"] = worker.spec.name
                found.append((f"cilium_{row['name']}", float(str(row["value"])), labels))
        return found

    async def _ask_workers(self) -> dict[Worker, list[dict[str, object]]]:
        """Ask every worker for its metrics; one that does not answer in time is left out."""
        running = [w for w in self._engine.workers if w.state is WorkerState.RUNNING]
        return await ask_each(running, "metrics", ASK_TIMEOUT_S)


class Exposition:
    """Metrics in Prometheus' text format, version 0.0.4: samples of one name stand together."""

    def __init__(self) -> None:
        self._samples: dict[str, dict[Labels, float]] = {}

    def add(self, name: str, value: float, **labels: str) -> None:
        """Add a sample; a name ending in `_total` is a counter, any other a gauge."""
        self._samples.setdefault(name, {})[tuple(sorted(labels.items()))] = value

    def text(self) -> str:
        """Return everything that was added."""
        lines: list[str] = []
        for name, samples in self._samples.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines.append(f"# TYPE {name} {kind}")
            lines += [f"{name}{_braces(labels)} {value:.17g}" for labels, value in samples.items()]
        return "".join(f"{line}\n" for line in lines)


def _full(table: TableCounters) -> str:
    """Say that the kernel's table of flows has no room."""
    return (
        f"kernel: {table.entries} of at most {table.limit} flows in its table; packets of new ones "
        "are dropped before a worker sees them (sysctl net.netfilter.nf_conntrack_max)"
    )


_PROXY_ERRORS = {
    "tls_secret_error": "connections that need it end",
    "access_log_error": "its lines are lost",
}
"""What the proxy's workers say is wrong, and what comes of it."""


def _proxy_errors(of_workers: Iterable[list[dict[str, object]]]) -> list[str]:
    """Return what is wrong with secrets of TLS and the access log, each once."""
    found = {
        f"{_mapping(row.get('labels'))['error']}: {_PROXY_ERRORS[str(row['name'])]}"
        for rows in of_workers
        for row in rows
        if row["name"] in _PROXY_ERRORS
    }
    return sorted(found)


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    pairs = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels)
    return f"{{{pairs}}}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _mapping(value: object) -> Mapping[object, object]:
    return value if isinstance(value, Mapping) else {}


def _queues() -> tuple[tuple[QueueCounters, ...], str]:
    """Return the queues of this network namespace, or why they cannot be read."""
    try:
        return read_queues(), ""
    except KernelError as error:
        return (), str(error)
