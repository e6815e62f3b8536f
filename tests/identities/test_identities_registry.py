"""Numbers for label sets: one per set, on every node, for as long as anybody may mean it.

The store here is the real one (SQLite) in a temporary directory; several registries on one file are
several nodes.
"""

import asyncio
from contextlib import asynccontextmanager

import pytest

from firewall.identities.labels import LabelSet
from firewall.identities.registry import (
    LOCK_LEASE_S,
    NODE_LEASE_S,
    PREFIX,
    IdentityError,
    IdentityRegistry,
    KvStoreError,
    LocalNumbers,
    is_local_set,
)
from firewall.kvstore.sqlite import SqliteStore

WEB = LabelSet.parse(["k8s:app=web"])
DB = LabelSet.parse(["k8s:app=db"])


@asynccontextmanager
async def opened(path):
    store = await SqliteStore.open(path / "identities.db")
    try:
        yield store
    finally:
        await store.close()


def node(store, name="n1", **options):
    return IdentityRegistry(store, node=name, grace_s=10.0, **options)


def fact(check):
    """Run an async test on a store of its own."""

    def test(tmp_path):
        async def main():
            async with opened(tmp_path) as store:
                await check(store)

        asyncio.run(main())

    test.__doc__ = check.__doc__
    return test


@fact
async def test_an_equal_set_gets_an_equal_number_on_every_node(store):
    """Design section 5."""
    one, two = node(store, "n1"), node(store, "n2")
    number = await one.allocate(WEB)
    assert 256 <= number <= 65535
    assert await two.allocate(LabelSet.parse(["k8s:app=web"])) == number
    assert await two.allocate(DB) != number


@fact
async def test_the_keys_are_ciliums(store):
    """Research d.3: master without lease, slave per node."""
    number = await node(store, "n1").allocate(WEB)
    assert await store.get(f"{PREFIX}/id/{number}") == b"k8s:app=web;"
    assert await store.get(f"{PREFIX}/value/k8s:app=web;/n1") == str(number).encode()
    assert not await store.list_prefix(f"{PREFIX}/locks/")


@fact
async def test_reserved_sets_need_no_store(store):
    registry = node(store)
    await store.compare_and_delete("nothing", b"")
    assert await registry.allocate(LabelSet.parse(["reserved:host"])) == 1
    assert await registry.allocate(LabelSet()) == 5
    assert not await store.list_prefix("")
    assert not await registry.release(1)


@fact
async def test_cidr_and_fqdn_sets_are_numbered_locally(store):
    registry = node(store)
    cidr = LabelSet.parse(["cidr:10.0.0.0/8", "reserved:world"])
    assert await registry.allocate(cidr) == 1 << 24
    assert await registry.allocate(LabelSet.parse(["fqdn:example.com"])) == (1 << 24) + 1
    assert await registry.allocate(cidr) == 1 << 24
    assert registry.refcount(1 << 24) == 2
    assert registry.lookup(1 << 24) == cidr
    assert not await store.list_prefix("")


@fact
async def test_a_fixed_identity_is_the_operators_number(store):
    """fixed-identity-mapping: 128-255, label io.cilium.fixed-identity; known as reserved:name."""
    registry = node(store, fixed={"gateway": 130})
    labels = LabelSet.parse(["k8s:io.cilium.fixed-identity=gateway", "k8s:app=x"])
    assert await registry.allocate(labels) == 130
    assert registry.lookup(130) == LabelSet.parse(["reserved:gateway"])
    assert await registry.allocate(
        LabelSet.parse(["k8s:io.cilium.fixed-identity=other"])
    ) not in range(256)


def test_a_fixed_number_outside_its_range_is_refused():
    with pytest.raises(IdentityError, match="gateway=300 is outside 128-255"):
        IdentityRegistry(None, node="n", fixed={"gateway": 300})
    with pytest.raises(IdentityError, match="same number"):
        IdentityRegistry(None, node="n", fixed={"a": 130, "b": 130})


@fact
async def test_references_are_counted(store):
    registry = node(store)
    number = await registry.allocate(WEB)
    await registry.allocate(WEB)
    assert not await registry.release(number)
    assert await registry.release(number)
    with pytest.raises(IdentityError, match="more often"):
        await registry.release(number)


@fact
async def test_two_endpoints_that_ask_at_once_get_one_number(store):
    registry = node(store)
    numbers = await asyncio.gather(*(registry.allocate(WEB) for _ in range(8)))
    assert len(set(numbers)) == 1
    assert registry.refcount(numbers[0]) == 8


@fact
async def test_nodes_that_ask_at_once_get_one_number(store):
    registries = [node(store, f"n{i}") for i in range(6)]
    numbers = await asyncio.gather(*(registry.allocate(WEB) for registry in registries))
    assert len(set(numbers)) == 1


@fact
async def test_an_unused_number_keeps_its_labels_for_the_grace_period(store):
    """So that nobody reads an old flow record, or a late packet, as somebody else's."""
    registry = node(store)
    number = await registry.allocate(WEB)
    await registry.release(number)
    assert await registry.collect(100.0) == ()
    assert await registry.collect(109.9) == ()
    assert registry.lookup(number) == WEB
    assert await registry.collect(110.0) == (number,)
    assert registry.lookup(number) is None
    assert not await store.list_prefix("")


@fact
async def test_a_number_allocated_again_within_the_grace_period_is_the_same(store):
    registry = node(store)
    number = await registry.allocate(WEB)
    await registry.release(number)
    await registry.collect(100.0)
    assert await registry.allocate(WEB) == number
    assert await registry.collect(200.0) == ()


@fact
async def test_an_unused_number_is_not_given_to_another_set(store):
    """With a range of two numbers the third set has to wait for the grace period."""
    registry = node(store, low=300, high=301)
    number = await registry.allocate(WEB)
    await registry.allocate(DB)
    await registry.release(number)
    await registry.collect(0.0)
    other = LabelSet.parse(["k8s:app=other"])
    with pytest.raises(IdentityError, match="300-301 are in use"):
        await registry.allocate(other)
    await registry.collect(10.0)
    assert await registry.allocate(other) == number


@fact
async def test_a_number_that_another_node_uses_is_not_collected(store):
    one, two = node(store, "n1"), node(store, "n2")
    number = await one.allocate(WEB)
    await two.allocate(WEB)
    await one.release(number)
    await one.collect(0.0)
    assert await one.collect(50.0) == ()
    await two.release(number)
    await one.collect(60.0)
    assert await one.collect(70.0) == (number,)


@fact
async def test_a_node_that_never_saw_a_set_finds_the_number_of_its_earlier_users(store):
    """Between the last release and the end of the grace period only the master tells."""
    one = node(store, "n1")
    number = await one.allocate(WEB)
    await one.release(number)
    assert await node(store, "n2").allocate(WEB) == number


@fact
async def test_a_number_survives_a_restart_of_its_node(store):
    """The slave key of the earlier life is taken over with the new lease."""
    number = await node(store, "n1").allocate(WEB)
    again = node(store, "n1")
    assert await again.allocate(WEB) == number
    await again.release(number)
    assert not await store.list_prefix(f"{PREFIX}/value/k8s:app=web;/n1")


@fact
async def test_a_dead_nodes_numbers_end_with_its_lease(store):
    now = [1000.0]
    store._wall_clock = lambda: now[0]
    one, two = node(store, "n1"), node(store, "n2")
    number = await one.allocate(WEB)
    now[0] += NODE_LEASE_S + 1
    await two.collect(0.0)
    assert await two.collect(10.0) == (number,)


@fact
async def test_a_dead_holders_lock_ends_with_its_lease(store):
    now = [1000.0]
    store._wall_clock = lambda: now[0]
    lease = await store.grant_lease(LOCK_LEASE_S)
    await store.create(f"{PREFIX}/locks/k8s:app=web;", b"dead/1", lease=lease)
    waiting = asyncio.create_task(node(store).allocate(WEB))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    now[0] += LOCK_LEASE_S
    assert 256 <= await waiting <= 65535


@fact
async def test_a_node_that_slept_past_its_lease_writes_its_keys_again(store):
    now = [1000.0]
    store._wall_clock = lambda: now[0]
    registry = node(store)
    number = await registry.allocate(WEB)
    await store.compare_and_delete(f"{PREFIX}/id/{number}", b"k8s:app=web;")
    now[0] += NODE_LEASE_S + 1
    assert await registry.keep_alive() == ()
    assert await store.get(f"{PREFIX}/id/{number}") == b"k8s:app=web;"
    assert await store.get(f"{PREFIX}/value/k8s:app=web;/n1") == str(number).encode()


@fact
async def test_an_allocation_after_the_lease_ended_goes_on_with_a_new_one(store):
    now = [1000.0]
    store._wall_clock = lambda: now[0]
    registry = node(store)
    number = await registry.allocate(WEB)
    now[0] += NODE_LEASE_S + 1
    await registry.allocate(DB)
    assert await registry.keep_alive() == ()
    assert await store.get(f"{PREFIX}/value/k8s:app=web;/n1") == str(number).encode()


@fact
async def test_a_number_lost_to_another_set_is_reported(store):
    """Somebody deleted the master and another label set took the number meanwhile."""
    registry = node(store)
    number = await registry.allocate(WEB)
    await store.compare_and_delete(f"{PREFIX}/id/{number}", b"k8s:app=web;")
    await store.create(f"{PREFIX}/id/{number}", b"k8s:app=db;")
    assert await registry.rewrite() == (number,)
    assert await registry.allocate(WEB) != number


@fact
async def test_a_number_lost_before_the_store_went_down_is_reported_after(store):
    broken = Broken(store)
    registry = node(broken)
    number = await registry.allocate(WEB)
    await registry.allocate(DB)
    await store.compare_and_delete(f"{PREFIX}/id/{number}", b"k8s:app=web;")
    await store.create(f"{PREFIX}/id/{number}", b"k8s:app=cache;")
    lookups = broken.store.get

    async def get(key):
        broken.down = key == f"{PREFIX}/id/{number}"
        return await lookups(key)

    broken.get = get
    with pytest.raises(KvStoreError, match="down"):
        await registry.rewrite()
    broken.down = False
    del broken.get
    assert await registry.rewrite() == (number,)


@fact
async def test_a_node_that_follows_knows_the_numbers_of_the_others(store):
    one, two = node(store, "n1"), node(store, "n2")
    number = await one.allocate(WEB)
    following = two.follow()
    assert await anext(following) == {number}
    assert two.known()[number] == WEB
    await one.release(number)
    await one.collect(0.0)
    await one.collect(10.0)
    assert await anext(following) == {number}
    assert number not in two.known()
    await following.aclose()


@fact
async def test_a_node_that_follows_forgets_no_number_of_its_own(store):
    """Somebody deletes the master; the node writes it again when its lease has ended."""
    one = node(store, "n1")
    following = one.follow()
    assert await anext(following) == set()
    number = await one.allocate(WEB)
    assert await anext(following) == set()
    await store.compare_and_delete(f"{PREFIX}/id/{number}", WEB.text.encode())
    assert await anext(following) == set()
    assert one.lookup(number) == WEB
    await following.aclose()


@fact
async def test_what_is_no_identity_is_followed_by_nobody(store):
    """Another program's key, and one that cannot be read."""
    await store.put(f"{PREFIX}/id/name", b"k8s:app=web;")
    await store.put(f"{PREFIX}/id/300", b"\xff")
    following = node(store, "n1").follow()
    assert await anext(following) == set()
    await following.aclose()


class Broken:
    """A store that stopped answering: everything but what it wraps raises."""

    def __init__(self, store):
        self.store = store
        self.down = False

    def __getattr__(self, name):
        if self.down:
            raise KvStoreError("the store is down")
        return getattr(self.store, name)


@fact
async def test_with_the_store_down_known_sets_are_served_and_new_ones_refused(store):
    """Research d.3, "Store down"."""
    broken = Broken(store)
    registry = node(broken)
    number = await registry.allocate(WEB)
    broken.down = True
    assert await registry.allocate(WEB) == number
    with pytest.raises(KvStoreError, match="down"):
        await registry.allocate(DB)
    assert await registry.allocate(LabelSet.parse(["cidr:10.0.0.0/8"])) == 1 << 24


@fact
async def test_a_release_while_the_store_is_down_is_made_good_later(store):
    broken = Broken(store)
    registry = node(broken)
    number = await registry.allocate(WEB)
    broken.down = True
    assert await registry.release(number)
    broken.down = False
    assert await store.list_prefix(f"{PREFIX}/value/k8s:app=web;/n1")
    await registry.keep_alive()
    assert not await store.list_prefix(f"{PREFIX}/value/k8s:app=web;/n1")


@pytest.mark.parametrize(
    ("labels", "local"),
    [
        (["cidr:10.0.0.0/8", "reserved:world"], True),
        (["fqdn:*.example.com", "cidrgroup:a"], True),
        (["cidr:10.0.0.0/8", "k8s:app=web"], False),
        (["k8s:app=web"], False),
        ([], False),
    ],
)
def test_a_set_is_local_if_every_source_is(labels, local):
    """Cilium ScopeForLabels."""
    assert is_local_set(LabelSet.parse(labels)) is local


def test_a_restored_local_number_is_kept_if_it_is_free():
    """identity-restore-grace-period: local CIDR identities keep their numbers over a restart."""
    numbers = LocalNumbers(100, 102)
    assert numbers.allocate(WEB, preferred=101) == 101
    assert numbers.allocate(DB, preferred=101) == 100
    assert numbers.allocate(LabelSet.parse(["k8s:c"]), preferred=99) == 102


def test_local_numbers_wait_before_they_are_used_again():
    numbers = LocalNumbers(100, 100, grace_s=10.0)
    numbers.allocate(WEB)
    numbers.release(100)
    with pytest.raises(IdentityError, match="in use"):
        numbers.allocate(DB)
    assert numbers.collect(0.0) == ()
    assert numbers.collect(10.0) == (100,)
    assert numbers.allocate(DB) == 100
