"""The embedded key-value store: one SQLite file that the processes of one machine share.

Every change is one `BEGIN IMMEDIATE` transaction, so two processes never both create a key. The
calls run on one thread of their own: the event loop never waits for a disk. A lease is a row with a
wall-clock end; a key whose lease has ended is invisible at once and deleted by the next change.
(Wall clock, because a lease must also end while the machine is switched off.)

A new file is made complete under another name and then linked into place, which fails if somebody
else was quicker. So whatever stands under the name is either complete or damaged, and a damaged
file, or one of another version, is reported and left exactly as it is.
"""

import asyncio
import os
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from firewall.identities.store import KvEntry, KvStoreError

FORMAT = 1
"""Raised when the tables change; a file of another number is refused."""

APPLICATION_ID = 0x42545A4E
"""Marks the file as ours in SQLite's header ("BTZN")."""

BUSY_S = 5.0
"""How long a transaction waits for another process's before it fails."""

WATCH_INTERVAL_S = 0.2
"""How often a watch looks whether another process has changed something."""

_MAGIC = b"SQLite format 3\x00"

_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT};
CREATE TABLE leases (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_s REAL NOT NULL,
                     expires_at REAL NOT NULL) STRICT;
CREATE TABLE entries (key TEXT PRIMARY KEY, value BLOB NOT NULL, lease INTEGER) STRICT,
                     WITHOUT ROWID;
CREATE INDEX entries_by_lease ON entries (lease) WHERE lease IS NOT NULL;
"""

_ALIVE = "(lease IS NULL OR lease IN (SELECT id FROM leases WHERE expires_at > ?))"

R = TypeVar("R")


class SqliteStore:
    """Implements `firewall.identities.store.KvStore` on a file; make it with `open`."""

    def __init__(
        self, path: Path, connection: sqlite3.Connection, executor: ThreadPoolExecutor
    ) -> None:
        self._path = path
        self._connection = connection
        self._executor = executor
        self._wall_clock: Callable[[], float] = time.time
        self._changes_count = 0

    @classmethod
    async def open(cls, path: Path) -> "SqliteStore":
        """Open the store, creating the file (mode 0600) if there is none.

        Raises:
            KvStoreError: no store of this version, damaged, or not accessible; nothing is changed.
        """
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvstore")
        try:
            connection = await asyncio.get_running_loop().run_in_executor(executor, _open, path)
        except BaseException:
            executor.shutdown(wait=False)
            raise
        return cls(path, connection, executor)

    async def _read(self, work: Callable[[sqlite3.Connection], R]) -> R:
        return await self._run("BEGIN", work)

    async def _run(self, begin: str, work: Callable[[sqlite3.Connection], R]) -> R:
        def transaction() -> R:
            try:
                self._connection.execute(begin)
                try:
                    result = work(self._connection)
                except BaseException:
                    self._connection.execute("ROLLBACK")
                    raise
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                raise _explain(self._path, error) from error
            return result

        return await asyncio.get_running_loop().run_in_executor(self._executor, transaction)

    async def _change(self, work: Callable[[sqlite3.Connection], R]) -> R:
        self._changes_count += 1
        return await self._run("BEGIN IMMEDIATE", work)

    def _sweep(self, connection: sqlite3.Connection) -> None:
        ended = connection.execute(
            "DELETE FROM leases WHERE expires_at <= ? RETURNING id", (self._wall_clock(),)
        ).fetchall()
        connection.executemany("DELETE FROM entries WHERE lease = ?", ended)

    async def get(self, key: str) -> bytes | None:
        """Return the value of a key, None if it is absent."""

        def work(connection: sqlite3.Connection) -> bytes | None:
            row = connection.execute(
                f"SELECT value FROM entries WHERE key = ? AND {_ALIVE}",  # noqa: S608
                (key, self._wall_clock()),
            ).fetchone()
            return None if row is None else row[0]

        return await self._read(work)

    async def create(
        self, key: str, value: bytes, *, lease: int | None = None, guard: KvEntry | None = None
    ) -> bool:
        """Set a key if it is absent (and `guard` unchanged); say whether that happened.

        Raises:
            KvStoreError: the lease has ended, or the file cannot be used.
        """

        def work(connection: sqlite3.Connection) -> bool:
            self._sweep(connection)
            if (
                guard is not None
                and not connection.execute(
                    "SELECT 1 FROM entries WHERE key = ? AND value = ?", guard
                ).fetchone()
            ):
                return False
            self._demand(connection, lease)
            return bool(
                connection.execute(
                    "INSERT INTO entries VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                    (key, value, lease),
                ).rowcount
            )

        return await self._change(work)

    async def put(self, key: str, value: bytes, *, lease: int | None = None) -> None:
        """Set a key, whatever it was and whichever lease it had.

        Raises:
            KvStoreError: the lease has ended, or the file cannot be used.
        """

        def work(connection: sqlite3.Connection) -> None:
            self._sweep(connection)
            self._demand(connection, lease)
            connection.execute(
                "INSERT INTO entries VALUES (?, ?, ?) ON CONFLICT (key)"
                " DO UPDATE SET value = excluded.value, lease = excluded.lease",
                (key, value, lease),
            )

        await self._change(work)

    def _demand(self, connection: sqlite3.Connection, lease: int | None) -> None:
        if lease is not None:
            found = connection.execute("SELECT 1 FROM leases WHERE id = ?", (lease,))
            if not found.fetchone():
                raise KvStoreError(f"{self._path}: lease {lease} has ended")

    async def compare_and_delete(self, key: str, value: bytes) -> bool:
        """Delete a key if it has this value; say whether that happened."""

        def work(connection: sqlite3.Connection) -> bool:
            self._sweep(connection)
            return bool(
                connection.execute(
                    "DELETE FROM entries WHERE key = ? AND value = ?", (key, value)
                ).rowcount
            )

        return await self._change(work)

    async def list_prefix(self, prefix: str) -> list[KvEntry]:
        """Return the entries whose key begins with `prefix`, ordered by key."""

        def work(connection: sqlite3.Connection) -> list[KvEntry]:
            # A range, not LIKE: the primary key answers it, and no character is special.
            rows = connection.execute(
                f"SELECT key, value FROM entries WHERE key >= ? AND key < ? AND {_ALIVE}"  # noqa: S608
                " ORDER BY key",
                (prefix, prefix + "\U0010ffff", self._wall_clock()),
            )
            return [KvEntry(*row) for row in rows]

        return await self._read(work)

    async def grant_lease(self, ttl_s: float) -> int:
        """Start a lease and return its number."""

        def work(connection: sqlite3.Connection) -> int:
            row = connection.execute(
                "INSERT INTO leases (ttl_s, expires_at) VALUES (?, ?) RETURNING id",
                (ttl_s, self._wall_clock() + ttl_s),
            ).fetchone()
            return int(row[0])

        return await self._change(work)

    async def keep_alive(self, lease: int) -> bool:
        """Begin the time of a lease anew; False if it has ended, and with it its keys."""

        def work(connection: sqlite3.Connection) -> bool:
            now = self._wall_clock()
            return bool(
                connection.execute(
                    "UPDATE leases SET expires_at = ? + ttl_s WHERE id = ? AND expires_at > ?",
                    (now, lease, now),
                ).rowcount
            )

        return await self._change(work)

    async def revoke_lease(self, lease: int) -> None:
        """End a lease and delete its keys; nothing happens if it has ended already."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM leases WHERE id = ?", (lease,))
            connection.execute("DELETE FROM entries WHERE lease = ?", (lease,))

        await self._change(work)

    async def watch(self, prefix: str) -> AsyncIterator[Mapping[str, bytes]]:
        """Yield all entries under `prefix`, and again whenever they have changed, until closed.

        The file is asked every `WATCH_INTERVAL_S` whether anybody has changed anything, which
        costs the same however much it holds; only then the entries are read.
        """
        mark: tuple[int, ...] | None = None
        known: dict[str, bytes] | None = None
        while True:
            found = await self._mark()
            if found != mark:
                present = dict(await self.list_prefix(prefix))
                if present != known:
                    yield present
                mark, known = found, present
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def _mark(self) -> tuple[int, ...]:
        """Return what differs after any change: ours, another process's, a lease that ended."""

        def work(connection: sqlite3.Connection) -> tuple[int, ...]:
            (version,) = connection.execute("PRAGMA data_version").fetchone()
            (leases_count,) = connection.execute(
                "SELECT count(*) FROM leases WHERE expires_at > ?", (self._wall_clock(),)
            ).fetchone()
            return version, leases_count, self._changes_count

        return await self._read(work)

    async def close(self) -> None:
        """Close the file; leases run on."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._connection.close)
        self._executor.shutdown()


def _open(path: Path) -> sqlite3.Connection:
    try:
        if not path.exists():
            _create(path)
        _check(path)
        return _connect(path, "rw")
    except sqlite3.Error as error:
        raise _explain(path, error) from error
    except KvStoreError:
        raise
    except OSError as error:
        raise KvStoreError(
            f"{path}: {error.strerror}; check the path and its permissions"
        ) from error


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_S,
        isolation_level=None,
        check_same_thread=False,
    )
    if mode == "rw":
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            # NORMAL: a power failure may cost the last transactions, never the file's soundness.
            connection.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            connection.close()
            raise
    return connection


def _create(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    try:
        with closing(sqlite3.connect(name, isolation_level=None)) as connection:
            # Now, because later it needs the whole file, and whoever finds that taken is refused
            # at once, without the patience of `timeout`.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)
        with suppress(FileExistsError):
            os.link(name, path)
    finally:
        Path(name).unlink()


def _check(path: Path) -> None:
    """Refuse a file that is not a sound store of this version, reading only."""
    with path.open("rb") as file:
        head = file.read(len(_MAGIC))
    if head != _MAGIC:
        what = "is empty" if not head else "is no SQLite database"
        raise KvStoreError(f"{path} {what}; {_ADVICE}")
    with closing(_connect(path, "ro")) as connection:
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
        if application_id != APPLICATION_ID:
            raise KvStoreError(f"{path} is another program's database; name another file")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != FORMAT:
            raise KvStoreError(
                f"{path} has format {version}, this version reads {FORMAT}; "
                "run the version that wrote it, or move the file away: identities are then "
                "numbered anew"
            )
        (verdict, *_), *_ = connection.execute("PRAGMA quick_check(1)").fetchall()
        if verdict != "ok":
            raise KvStoreError(f"{path} is damaged ({verdict.strip()}); {_ADVICE}")


_ADVICE = (
    "it was left as it is: restore it from a backup, or move it away and start again: identities "
    "are then numbered anew"
)


def _explain(path: Path, error: sqlite3.Error) -> KvStoreError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return KvStoreError(f"{path}: another process has held it for {BUSY_S:g} s; try again")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return KvStoreError(f"{path} is damaged ({error}); {_ADVICE}")
    if code == sqlite3.SQLITE_FULL:
        return KvStoreError(f"{path}: no space left on the device; free some")
    return KvStoreError(f"{path}: {error}; check the path and its permissions")
