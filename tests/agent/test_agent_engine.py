"""The engine with a real store, a real publisher and no kernel: what it keeps when things fail."""

import asyncio
from contextlib import asynccontextmanager

from lone_engine import lone_engine

from firewall.agent import collector as collector_module
from firewall.agent import engine as engine_module
from firewall.agent.collector import NodeNames
from firewall.agent.declaration import read_declarations
from firewall.agent.loading import read
from firewall.datapath.kernel import KernelError
from firewall.endpoints.lifecycle import EndpointState
from firewall.identities.labels import LabelSet
from firewall.identities.registry import NODE_LEASE_S, PREFIX
from firewall.identities.reserved import Reserved
from firewall.kvstore.sqlite import SqliteStore

ENDPOINTS = """
- {name: web, ip: 10.1.0.2, labels: {app: web}}
- {name: db, ip: 10.1.0.3, labels: {app: db}}
"""


class Node:
    """An engine, what it is made of, and a kernel that can be told to refuse."""

    def __init__(self, store, path):
        config = read(f"state_dir: {path}\nrun_dir: {path}\n", "test.yaml").config
        self.store = store
        self.refuses = False
        self.managed = []
        self.engine = lone_engine(config, store, self._manage)
        self.publisher = self.engine.publisher

    def _manage(self, links):
        if self.refuses:
            raise KernelError("ipset", "not now")
        self.managed = list(links)

    def endpoint(self, name):
        return self.engine.roster.get(name).endpoint

    async def slaves(self, labels):
        entries = await self.store.list_prefix(f"{PREFIX}/value/{labels.text}/n1")
        return [int(entry.value) for entry in entries]


@asynccontextmanager
async def running(path, monkeypatch):
    """Yield a node with two endpoints, published."""
    monkeypatch.setattr(engine_module, "bridges", dict)
    store = await SqliteStore.open(path / "identities.db")
    node = Node(store, path)
    work = asyncio.create_task(node.engine.run())
    try:
        for declaration in read_declarations(ENDPOINTS, "endpoints.yaml"):
            await node.engine.put_endpoint(declaration, "config")
        assert await node.engine.enforced(30.0)
        yield node
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        await store.close()


def test_a_number_lost_to_another_label_set_is_replaced(tmp_path, monkeypatch):
    """Master gone, lease ended, number taken (research d.3): its packets must not be that set's."""

    async def main():
        async with running(tmp_path, monkeypatch) as node:
            web, store = node.endpoint("web"), node.store
            number, labels = web.identity, web.relevant
            kept = node.endpoint("db").identity
            await store.compare_and_delete(f"{PREFIX}/id/{number}", labels.text.encode())
            await store.create(f"{PREFIX}/id/{number}", b"k8s:app=thief;")
            clock = store._wall_clock
            store._wall_clock = lambda: clock() + NODE_LEASE_S + 1
            await node.engine.keep_identities()
            assert await node.engine.enforced(30.0)
            assert web.identity not in (number, None, int(Reserved.INIT))
            assert web.state is EndpointState.READY
            assert node.endpoint("db").identity == kept
            rows = {row.name: row.identity for row in node.publisher.snapshot.endpoints}
            assert rows == {"web": web.identity, "db": kept}
            assert await node.slaves(labels) == [web.identity]
            assert node.engine.registry.lookup(web.identity) == labels

    asyncio.run(main())


def test_a_failed_publication_does_not_forget_who_leaves(tmp_path, monkeypatch):
    """The identity of a deleted endpoint is given back by the publication that succeeds."""

    async def main():
        async with running(tmp_path, monkeypatch) as node:
            leaver = node.endpoint("web")
            number, labels = leaver.identity, leaver.relevant
            node.refuses = True
            await node.engine.delete_endpoint("web", "config")
            assert not await node.engine.enforced(0.1)
            assert "not now" in node.engine.problems["snapshot"]
            assert leaver.state is EndpointState.DISCONNECTING
            assert await node.slaves(labels) == [number]
            node.refuses = False
            assert await node.engine.enforced(30.0)
            assert leaver.state is EndpointState.DISCONNECTED
            assert await node.slaves(labels) == []
            assert [link.addresses for link in node.managed] == [node.endpoint("db").addresses]

    asyncio.run(main())


def test_text_of_labels_does_not_gather_without_bound(tmp_path, monkeypatch):
    """Names that come and go take ever new numbers, and every flow asks for the labels."""
    monkeypatch.setattr(collector_module, "LABELS_MAX_COUNT", 8)

    async def main():
        async with running(tmp_path, monkeypatch) as node:
            names, local = NodeNames(node.engine), node.engine.registry.local
            for count in range(100):
                label = f"fqdn:{count}.example"
                assert names.labels(local.allocate(LabelSet.parse([label]))) == (label,)
            assert len(names._labels) <= 8

    asyncio.run(main())
