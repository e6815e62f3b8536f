"""Agents on one store know each other's endpoints, and nothing that another may not say."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from conntrack.address import Prefix, parse_address
from firewall.agent.loading import read
from firewall.agent.neighbours import ADDRESSES, Neighbours
from firewall.flows.record import EndpointName
from firewall.identities.labels import LabelSet
from firewall.identities.registry import NODE_LEASE_S, IdentityRegistry
from firewall.identities.store import KvStoreError
from firewall.kvstore.sqlite import SqliteStore
from firewall.policy.snapshot import EndpointRow, NamedPortRow

WEB = LabelSet.parse(["k8s:app=web"])
ADDRESS = parse_address("10.1.0.2")
OTHER = parse_address("fd00::2")
HTTP = NamedPortRow("http", 6, 8080)


class Node:
    """One agent's part: its registry, and what it says and hears."""

    def __init__(self, store, path, name, state=None):
        text = f"node_name: {name}\nstate_dir: {path}/{state or name}\n"
        config = read(text + f"kvstore: {{path: {path}/kv}}\n", "test.yaml").config
        self.registry = IdentityRegistry(store, node=name)
        self.neighbours = Neighbours(store, self.registry, config)
        self.news = asyncio.Event()

    async def heard(self, expected):
        """Wait until exactly these addresses of others are known."""
        async with asyncio.timeout(60):
            while dict(self.neighbours.addresses()) != expected:
                await self.news.wait()
                self.news.clear()

    @asynccontextmanager
    async def running(self):
        await self.neighbours.join()
        work = asyncio.create_task(self.neighbours.run(self.news.set))
        try:
            yield self
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


@pytest.fixture
def fact(tmp_path):
    """Run a coroutine function with a store and a maker of nodes."""

    def run(check):
        async def main():
            store = await SqliteStore.open(tmp_path / "kv")
            try:
                await check(store, lambda *names: Node(store, tmp_path, *names))
            finally:
                await store.close()

        asyncio.run(main())

    return run


def row(identity, *addresses, name="web", ports=()):
    return EndpointRow(7, name, "default", identity, addresses, named_ports=ports)


async def written(store, address):
    """Wait until somebody has announced an address."""
    async for entries in store.watch(f"{ADDRESSES}/default/{address}"):
        if entries:
            return


def host(address):
    return Prefix(address, 8 * len(address))


def test_what_one_announces_the_others_know(fact):
    async def check(store, node):
        async with node("n1").running() as one, node("n2").running() as two:
            number = await one.registry.allocate(WEB)
            one.neighbours.announce([row(number, ADDRESS, OTHER, ports=(HTTP,))])
            await two.heard({host(ADDRESS): number, host(OTHER): number})
            assert two.registry.lookup(number) == WEB
            assert two.neighbours.name(OTHER) == EndpointName("web", "default")
            assert set(two.neighbours.ports()) == {(number, (HTTP,))}
            assert two.neighbours.counts() == (1, 2)
            assert dict(one.neighbours.addresses()) == {}
            one.neighbours.announce([row(number, ADDRESS)])
            await two.heard({host(ADDRESS): number})

    fact(check)


def test_who_comes_later_knows_what_was_said_before(fact):
    async def check(store, node):
        async with node("n1").running() as one:
            number = await one.registry.allocate(WEB)
            one.neighbours.announce([row(number, ADDRESS)])
            late = node("n2")
            while dict(late.neighbours.addresses()) == {}:
                await late.neighbours.join()
            assert dict(late.neighbours.addresses()) == {host(ADDRESS): number}

    fact(check)


def test_a_dead_agents_endpoints_count_until_its_lease_ends(fact):
    async def check(store, node):
        clock = store._wall_clock
        async with node("n2").running() as two:
            async with node("n1").running() as one:
                number = await one.registry.allocate(WEB)
                one.neighbours.announce([row(number, ADDRESS)])
                await two.heard({host(ADDRESS): number})
            store._wall_clock = lambda: clock() + NODE_LEASE_S / 2
            await two.neighbours._keep_lease()
            assert dict(two.neighbours.addresses()) == {host(ADDRESS): number}
            store._wall_clock = lambda: clock() + NODE_LEASE_S
            await two.heard({})

    fact(check)


def test_an_agent_that_starts_again_withdraws_what_it_has_no_more(fact):
    async def check(store, node):
        async with node("n2").running() as two:
            async with node("n1").running() as one:
                number = await one.registry.allocate(WEB)
                one.neighbours.announce([row(number, ADDRESS, OTHER)])
                await two.heard({host(ADDRESS): number, host(OTHER): number})
            async with node("n1").running() as again:
                again.neighbours.announce([row(number, ADDRESS)])
                await two.heard({host(ADDRESS): number})

    fact(check)


def test_an_agent_that_starts_again_binds_its_keys_anew(fact):
    """Or they would end with the lease of its earlier life."""

    async def check(store, node):
        clock = store._wall_clock
        async with node("n1").running() as one:
            one.neighbours.announce([row(5, ADDRESS)])
            await written(store, "10.1.0.2")
        store._wall_clock = lambda: clock() + NODE_LEASE_S / 2
        async with node("n1").running() as again:
            again.neighbours.announce([row(5, ADDRESS, OTHER)])
            await written(store, "fd00::2")
            store._wall_clock = lambda: clock() + NODE_LEASE_S * 1.2
            assert len(await store.list_prefix(ADDRESSES)) == 2

    fact(check)


def test_two_agents_cannot_have_one_name(fact):
    async def check(store, node):
        async with node("n1", "first").running():
            with pytest.raises(KvStoreError, match=r"node_name n1 is taken.*/first has it"):
                await node("n1", "second").neighbours.join()

    fact(check)


@pytest.mark.parametrize(
    "said",
    [
        {"ID": 1},
        {"ID": 2},
        {"ID": 1 << 24},
        {"ID": "300"},
        {"ID": None},
        {"IP": 7},
    ],
    ids=["host", "world", "of that node only", "text", "nothing", "no address"],
)
def test_what_no_agent_may_say_is_not_believed(fact, said):
    async def check(store, node):
        value = {"IP": "10.1.0.2", "ID": 300, "Metadata": "cilium-global:default:n9:7", **said}
        await store.put(f"{ADDRESSES}/default/10.1.0.2", json.dumps(value).encode())
        await store.put(f"{ADDRESSES}/default/elsewhere", json.dumps(value).encode())
        one = node("n1")
        one.registry._seen[300] = WEB
        await one.neighbours.join()
        assert dict(one.neighbours.addresses()) == {}

    fact(check)


def test_an_address_without_a_known_identity_is_left_alone(fact):
    """Its identity may be known a moment later; until then it is what it was."""

    async def check(store, node):
        value = {"IP": "10.1.0.2", "ID": 300, "Metadata": "cilium-global:default:n9:7"}
        await store.put(f"{ADDRESSES}/default/10.1.0.2", json.dumps(value).encode())
        async with node("n1").running() as one:
            assert dict(one.neighbours.addresses()) == {}
            await store.put("cilium/state/identities/v1/id/300", WEB.text.encode())
            await one.heard({host(ADDRESS): 300})

    fact(check)


def test_an_address_that_another_gave_up_is_ours_again(fact):
    async def check(store, node):
        async with node("n1").running() as one, node("n2").running() as two:
            one.neighbours.announce([row(5, ADDRESS)])
            await two.heard({host(ADDRESS): 5})
            two.neighbours.announce([row(5, ADDRESS)])
            await two.heard({})
            two.neighbours.announce([])
            await two.heard({host(ADDRESS): 5})

    fact(check)


def test_on_a_store_of_its_own_an_agent_says_nothing(tmp_path):
    async def main():
        store = await SqliteStore.open(tmp_path / "kv")
        config = read(f"state_dir: {tmp_path}\n", "test.yaml").config
        alone = Neighbours(store, IdentityRegistry(store, node="n1"), config)
        await alone.join()
        alone.announce([row(300, ADDRESS)])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(alone.run(lambda: None), 0)
        assert await store.list_prefix("") == []
        await store.close()

    asyncio.run(main())
