"""Resolution at scale: the first one, one change, the way of a change to a worker, and lookups.

In one process first, stage by stage: resolver, snapshot file (a disk's sync included), reader, view
and a decision, for a cluster of growing size; a change must cost what it changes, whatever exists
beside it. Then the real thing: a daemon with its workers, asked through its API until every worker
has acknowledged. There, identities beyond those of the endpoints are those of the rules' prefixes.
"""

import gc
import json
import random
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench.cluster import (
    SEED,
    Cluster,
    Document,
    Size,
    address_of,
    declarations,
    document,
    documents,
    text_of,
)
from bench.figure import Figure
from firewall.agent.snapshot_writer import SnapshotWriter
from firewall.control.snapshots import SnapshotReader
from firewall.policy.model import PolicyObject
from firewall.policy.readers import read
from firewall.policy.view import View
from lab import daemon
from lab.laboratory import Lab
from lab.topology import hosts

FACTORS = (1, 3, 10)
CHANGES = 15
LOOKUPS = 5_000
TCP = 6
PORTS = (80, 443, 5432, 6379, 8080, 9090, 9092)


class Spent(NamedTuple):
    """Seconds by the clock, and of the processor: without the disk and whoever else computes."""

    wall: float
    processor: float


class Times(NamedTuple):
    """How long things take; of the changes, medians. `view` in seconds."""

    first: Spent
    relabel: Spent
    add: Spent
    delete: Spent
    view: float
    record_bytes: float


def measure() -> list[Figure]:
    """Measure everything."""
    curve = {}
    figures = []
    for factor in FACTORS:
        with tempfile.TemporaryDirectory() as folder:
            node = Node(Size().times(factor), Path(folder))
            curve[factor] = node.times()
            if factor == 1:
                figures += node.lookups()
    one = curve[1]
    promised = [
        Figure(
            "first resolution, 1,000 policies, 5,000 identities", one.first.wall, "s", at_most=5
        ),
        _ms("one label change, resolved, written, read, viewed, decided", one.relabel.wall, 50),
        _ms("one policy added, as far", one.add.wall, 100),
        _ms("one policy deleted, as far", one.delete.wall, 100),
        _ms("of a change: the worker's new view", one.view, None),
        Figure("of a change: bytes to the workers", one.record_bytes, "B"),
    ]
    return promised + figures + _curve(curve) + _agent()


def _ms(what: str, seconds: float, at_most: float | None) -> Figure:
    return Figure(what, 1e3 * seconds, "ms", at_most=at_most)


def _curve(curve: dict[int, Times]) -> list[Figure]:
    """Compare the larger clusters with the first, by processor time.

    The first resolution grows with everything. A change may not: what is left of that growth is
    one comparison of references per row.
    """
    figures = []
    one = curve[FACTORS[0]]
    for factor in FACTORS[1:]:
        now = curve[factor]
        for what, larger, base, at_most in (
            ("first resolution", now.first, one.first, 1.5 * factor),
            ("one label change", now.relabel, one.relabel, None),
            ("one policy added", now.add, one.add, None),
            ("one policy deleted", now.delete, one.delete, None),
        ):
            figures.append(
                Figure(
                    f"{what}, processor time, {factor} x as many of everything",
                    1e3 * larger.processor,
                    "ms",
                    1e3 * base.processor,
                    "1 x",
                    at_most=at_most,
                )
            )
    return figures


class Node:
    """An agent's resolver and writer, and a worker's reader and view."""

    def __init__(self, size: Size, folder: Path) -> None:
        result = read(text_of(documents(size)), "all.yaml")
        assert not result.errors, result.errors[0]
        self.objects = result.objects
        self.dice = random.Random(SEED + 1)
        self.cluster = Cluster(size)
        self.path = folder / "snapshot"
        self.writer = SnapshotWriter(self.path)
        self.reader = SnapshotReader()
        self.view_s: list[float] = []
        self.first = spent(self._begin)
        gc.freeze()  # as the workers do
        self.publish()

    def _begin(self) -> None:
        cluster = self.cluster
        cluster.identify()
        cluster.resolver.apply(cluster.repository.apply(self.objects))
        cluster.snapshot()

    def publish(self) -> None:
        """Carry the present state to the worker, up to a decision."""
        self.writer.write(self.cluster.snapshot())
        last = getattr(self, "view", None)
        snapshot = self.reader.load(self.path)
        begun = time.perf_counter()
        self.view = View(snapshot, last)
        self.view_s.append(time.perf_counter() - begun)
        self.view.decide(*self._packet())

    def _packet(self) -> tuple[bytes, bytes, int, int]:
        managed = self.view.snapshot.endpoints
        own = self.dice.choice(managed).addresses[0]
        other = address_of(self.dice.randrange(self.cluster.size.identities))
        ends = (own, other) if self.dice.random() < 0.5 else (other, own)
        return *ends, TCP, self.dice.choice(PORTS)

    def times(self) -> Times:
        """Measure changes, one at a time."""
        add, delete = [], []
        self.view_s.clear()
        before = self.path.stat().st_size
        changed = sorted(self.cluster.endpoints)[:CHANGES]
        relabel = [spent(partial(self._relabel, at)) for at in changed]
        record_bytes = (self.path.stat().st_size - before) / CHANGES
        view = median(self.view_s)
        for number in range(CHANGES):
            fresh = read(text_of([_fresh(number, self.cluster.size)]), "one.yaml").objects[0]
            add.append(spent(partial(self._apply, fresh)))
            delete.append(spent(partial(self._delete, fresh)))
        delete += [spent(partial(self._delete, one)) for one in self.objects[::7][:CHANGES]]
        return Times(
            self.first, _median(relabel), _median(add), _median(delete), view, record_bytes
        )

    def _relabel(self, endpoint: int) -> None:
        self.cluster.relabel(endpoint)
        self.publish()

    def _apply(self, one: PolicyObject) -> None:
        self.cluster.resolver.apply(self.cluster.repository.apply([one]))
        self.publish()

    def _delete(self, one: PolicyObject) -> None:
        self.cluster.resolver.apply(self.cluster.repository.delete([one.key]))
        self.publish()

    def lookups(self) -> list[Figure]:
        """Measure decisions that are remembered, and those that are made."""
        known = list({self._packet() for _ in range(LOOKUPS)})
        _ask(self.view, known)  # maps are made on first use, once per change of their rules
        unknown = list({self._packet() for _ in range(LOOKUPS)}.difference(known))
        fresh = [View(self.view.snapshot, self.view) for _ in range(5)]
        made = min(spent(partial(_ask, view, unknown)).processor for view in fresh)
        cached = min(spent(partial(_ask, self.view, known)).processor for _ in range(5))
        return [
            Figure("policy lookup, cached", 1e6 * cached / len(known), "us", at_most=2),
            Figure("policy lookup, not cached", 1e6 * made / len(unknown), "us", at_most=15),
        ]


def _ask(view: View, packets: list[tuple[bytes, bytes, int, int]]) -> None:
    decide = view.decide
    for source, destination, protocol, port in packets:
        decide(source, destination, protocol, port)


def _fresh(number: int, size: Size) -> Document:
    """Return a policy that is not among the others, of each kind in turn."""
    return document(size.policies + number * size.namespaces, random.Random(number), size)


def spent(work: Callable[[], object]) -> Spent:
    """Return what it takes."""
    processor, begun = time.process_time(), time.perf_counter()
    work()
    return Spent(time.perf_counter() - begun, time.process_time() - processor)


def _median(found: list[Spent]) -> Spent:
    return Spent(median(one.wall for one in found), median(one.processor for one in found))


def timed(work: Callable[[], object]) -> float:
    """Return how long it takes, in seconds."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


# --- the daemon -----------------------------------------------------------------------------------


def _agent() -> list[Figure]:
    """Measure a daemon with the same number of policies, identities and endpoints."""
    size = Size(identities=500, cidrs=15)
    with Lab(hosts(a="app=a")) as lab:
        folder = lab.folder / "endpoints"
        folder.mkdir()
        (folder / "all.json").write_text(json.dumps(declarations(size)), encoding="utf-8")
        firewall = daemon.start(
            lab, {"workers": 1, "endpoint_directory": str(folder)}, endpoints=False
        )
        body = text_of(documents(size)).encode()
        begun = time.perf_counter()
        status, answer = firewall.request("PUT", "/v1/policy", body, {"wait": 60}, 60)
        first = time.perf_counter() - begun
        assert status == 200, answer
        moved = "moved"
        endpoint = {"addresses": ["10.200.0.1"], "labels": ["app=app1"], "namespace": "ns1"}
        firewall.put(f"/v1/endpoint/{moved}", endpoint, wait=10)
        relabel = [
            timed(partial(firewall.relabel, moved, version=f"other{at}")) for at in range(CHANGES)
        ]
        add, delete = [], []
        for number in range(CHANGES):
            one = _fresh(number, size)
            add.append(timed(partial(firewall.apply, json.dumps(one))))
            delete.append(timed(partial(_withdraw, firewall, one)))
        known = firewall.get("/v1/status")["identities"]["total"]
        assert firewall.process is not None
        resident = _resident_bytes(firewall.process.pid)
    return [
        Figure(f"daemon: read, resolve, enforce 1,000 policies, {known:,} identities", first, "s"),
        _ms("daemon: one label change, request to every worker's word", median(relabel), 50),
        _ms("daemon: one policy added", median(add), 100),
        _ms("daemon: one policy deleted", median(delete), 100),
        Figure("daemon: resident memory of the agent", resident / 1e6, "MB", at_most=300),
    ]


def _withdraw(firewall: daemon.Bartizan, one: Document) -> Any:
    return firewall.withdraw(one["kind"], one["metadata"]["name"], one["metadata"]["namespace"])


def _resident_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"^VmRSS:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
