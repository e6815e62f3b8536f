"""The embedded store: atomic between processes, honest about damaged files."""

import asyncio
import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from firewall.identities.store import KvEntry, KvStoreError
from firewall.kvstore.sqlite import SqliteStore

ROOT = Path(__file__).resolve().parents[2]


def fact(check):
    def test(tmp_path):
        async def main():
            store = await SqliteStore.open(tmp_path / "kv.db")
            try:
                await check(store)
            finally:
                await store.close()

        asyncio.run(main())

    test.__doc__ = check.__doc__
    return test


def refusal(path):
    """Return the message with which opening fails, having checked that no byte changed."""
    before = hashlib.sha256(path.read_bytes()).digest()
    with pytest.raises(KvStoreError) as caught:
        asyncio.run(SqliteStore.open(path))
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert str(path) in str(caught.value)
    return str(caught.value)


async def filled(path, count=2000):
    store = await SqliteStore.open(path)
    for number in range(count):
        await store.create(f"k/{number}", b"value" * 8)
    await store.close()


@fact
async def test_a_key_is_created_once(store):
    assert await store.create("a", b"1")
    assert not await store.create("a", b"2")
    assert await store.get("a") == b"1"
    assert await store.get("b") is None


@fact
async def test_a_key_is_deleted_only_with_its_value(store):
    await store.create("a", b"1")
    assert not await store.compare_and_delete("a", b"2")
    assert await store.compare_and_delete("a", b"1")
    assert await store.get("a") is None


@fact
async def test_a_guard_that_changed_prevents_the_creation(store):
    """What a lock's holder writes after it lost the lock must not count."""
    await store.create("lock", b"me")
    assert await store.create("a", b"1", guard=KvEntry("lock", b"me"))
    assert not await store.create("b", b"1", guard=KvEntry("lock", b"other"))
    assert not await store.create("c", b"1", guard=KvEntry("none", b"me"))


@fact
async def test_a_prefix_lists_its_keys_and_no_others(store):
    """No character of a key is special, as it would be in LIKE."""
    for key in ("a/1", "a/2", "a/%", "a/_", "a", "b/1", "A/1", "a/\U0001f511"):
        await store.create(key, key.encode())
    assert [entry.key for entry in await store.list_prefix("a/")] == [
        "a/%", "a/1", "a/2", "a/_", "a/\U0001f511",
    ]  # fmt: skip
    assert [entry.key for entry in await store.list_prefix("a/_")] == ["a/_"]


@fact
async def test_a_key_ends_with_its_lease(store):
    now = [100.0]
    store._wall_clock = lambda: now[0]
    lease = await store.grant_lease(10.0)
    await store.create("a", b"1", lease=lease)
    now[0] = 109.0
    assert await store.keep_alive(lease)
    now[0] = 118.0
    assert await store.get("a") == b"1"
    now[0] = 119.0
    assert await store.get("a") is None
    assert await store.list_prefix("") == []
    assert not await store.keep_alive(lease)
    assert await store.create("a", b"2")


@fact
async def test_an_ended_lease_binds_nothing(store):
    now = [100.0]
    store._wall_clock = lambda: now[0]
    lease = await store.grant_lease(10.0)
    now[0] = 110.0
    with pytest.raises(KvStoreError, match="has ended"):
        await store.create("a", b"1", lease=lease)


@fact
async def test_a_revoked_lease_takes_its_keys_along(store):
    lease, other = await store.grant_lease(10.0), await store.grant_lease(10.0)
    await store.create("a", b"1", lease=lease)
    await store.create("b", b"1", lease=other)
    await store.revoke_lease(lease)
    await store.revoke_lease(lease)
    assert [entry.key for entry in await store.list_prefix("")] == ["b"]


@fact
async def test_a_watch_tells_what_is_there_and_what_changes(store):
    watch = store.watch("w/")
    assert await anext(watch) == {}
    await store.create("w/a", b"1")
    await store.create("x/a", b"1")
    assert await anext(watch) == {"w/a": b"1"}
    await store.put("x/a", b"2")
    await store.put("w/a", b"2")
    assert await anext(watch) == {"w/a": b"2"}
    await store.compare_and_delete("w/a", b"2")
    assert await anext(watch) == {}
    await watch.aclose()


@fact
async def test_a_watch_sees_what_ends_with_a_lease(store):
    """Nobody writes anything then."""
    now = [100.0]
    store._wall_clock = lambda: now[0]
    await store.create("w/a", b"1", lease=await store.grant_lease(10.0))
    watch = store.watch("w/")
    assert await anext(watch) == {"w/a": b"1"}
    now[0] = 110.0
    assert await anext(watch) == {}
    await watch.aclose()


def test_a_watch_sees_what_another_opening_of_the_file_changes(tmp_path):
    async def main():
        one = await SqliteStore.open(tmp_path / "kv.db")
        two = await SqliteStore.open(tmp_path / "kv.db")
        watch = two.watch("w/")
        assert await anext(watch) == {}
        await one.create("w/a", b"1")
        assert await anext(watch) == {"w/a": b"1"}
        await watch.aclose()
        await one.close()
        await two.close()

    asyncio.run(main())


@fact
async def test_a_key_that_is_put_gets_value_and_lease(store):
    now = [100.0]
    store._wall_clock = lambda: now[0]
    await store.create("a", b"1", lease=await store.grant_lease(10.0))
    await store.put("a", b"2", lease=await store.grant_lease(20.0))
    now[0] = 115.0
    assert await store.get("a") == b"2"
    now[0] = 120.0
    assert await store.get("a") is None
    with pytest.raises(KvStoreError, match="has ended"):
        await store.put("a", b"3", lease=1)


def test_what_was_written_is_there_after_opening_again(tmp_path):
    asyncio.run(filled(tmp_path / "kv.db", 3))

    async def read():
        store = await SqliteStore.open(tmp_path / "kv.db")
        entries = await store.list_prefix("k/")
        await store.close()
        return entries

    assert len(asyncio.run(read())) == 3
    assert (tmp_path / "kv.db").stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob(".*"))


def test_a_file_of_another_version_is_refused(tmp_path):
    path = tmp_path / "kv.db"
    asyncio.run(filled(path, 1))
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    assert "format 99, this version reads 1" in refusal(path)


def test_another_programs_database_is_refused(tmp_path):
    path = tmp_path / "kv.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    assert "another program's database" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"SQLite", b"identities: {}\n"])
def test_a_file_that_is_no_database_is_refused(tmp_path, content):
    path = tmp_path / "kv.db"
    path.write_bytes(content)
    assert "restore it from a backup" in refusal(path)


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.7, 0.99])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    """A full disk or an interrupted copy."""
    path = tmp_path / "kv.db"
    asyncio.run(filled(path, 400))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert "damaged" in refusal(path)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "kv.db"
    asyncio.run(filled(path, 400))
    data = bytearray(path.read_bytes())
    data[4096 * 2 : 4096 * 3] = b"\xff" * 4096
    path.write_bytes(data)
    assert "damaged" in refusal(path)


def test_a_path_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(KvStoreError, match="check the path"):
        asyncio.run(SqliteStore.open(tmp_path / "file" / "kv.db"))


def test_a_copy_without_its_log_still_opens(tmp_path):
    """Closing folds the write-ahead log into the file: a plain copy is a backup."""
    asyncio.run(filled(tmp_path / "kv.db", 5))
    shutil.copy(tmp_path / "kv.db", tmp_path / "copy.db")

    async def count():
        store = await SqliteStore.open(tmp_path / "copy.db")
        entries = await store.list_prefix("")
        await store.close()
        return len(entries)

    assert asyncio.run(count()) == 5


KILLED = """
import asyncio, os, sys
from pathlib import Path
from firewall.kvstore.sqlite import SqliteStore

async def main():
    store = await SqliteStore.open(Path(sys.argv[1]))
    await store.create("a", b"1")
    os._exit(9)

asyncio.run(main())
"""


def test_what_was_written_survives_a_process_that_was_killed(tmp_path):
    """The write-ahead log stays behind; the next one to open the file folds it in."""
    path = tmp_path / "kv.db"
    done = subprocess.run([sys.executable, "-c", KILLED, path], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 9
    assert (tmp_path / "kv.db-wal").stat().st_size > 0

    async def read():
        store = await SqliteStore.open(path)
        value = await store.get("a")
        await store.close()
        return value

    assert asyncio.run(read()) == b"1"


def test_a_damaged_file_with_a_log_beside_it_is_left_alone(tmp_path):
    """Opening for a look must not fold a log into a file that is refused."""
    path = tmp_path / "kv.db"
    subprocess.run([sys.executable, "-c", KILLED, path], cwd=ROOT, check=False, timeout=60)
    data = path.read_bytes()
    log = (tmp_path / "kv.db-wal").read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * 4096 + data[8192:])
    assert "damaged" in refusal(path)
    assert (tmp_path / "kv.db-wal").read_bytes() == log


RACER = """
import asyncio, json, sys, time
from pathlib import Path
from firewall.identities.labels import LabelSet
from firewall.identities.registry import IdentityRegistry
from firewall.kvstore.sqlite import SqliteStore

async def main(path, name, start):
    time.sleep(max(0.0, start - time.time()))
    store = await SqliteStore.open(Path(path))
    registry = IdentityRegistry(store, node=name, low=256, high=300)
    print(json.dumps({n: await registry.allocate(LabelSet.parse([f"k8s:app={n}"]))
                      for n in range(20)}))
    await store.close()

asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
"""


def test_processes_that_race_never_number_one_set_twice(tmp_path):
    """The creation of the file is raced too; the range is narrow so that numbers collide."""
    start = str(time.time() + 0.7)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, tmp_path / "kv.db", f"n{i}", start],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        for i in range(3)
    ]
    answers = [json.loads(racer.communicate(timeout=60)[0]) for racer in racers]
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0].values())) == 20
