"""What identities ask of a store that nodes share.

Few operations, each of which SQLite and etcd have as one atomic step, so that another store is one
more module and not another algorithm. Keys are text, values are bytes; a key may be bound to a
lease, which ends unless it is kept alive.
"""

from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple, Protocol


class KvStoreError(OSError):
    """The store cannot be used now or at all; the message names it and says what to do."""


class KvEntry(NamedTuple):
    """A key with its value."""

    key: str
    value: bytes


class KvStore(Protocol):
    """What identities need of a store that nodes share. Every method raises KvStoreError."""

    async def get(self, key: str) -> bytes | None:
        """Return the value of a key, None if it is absent."""

    async def create(
        self,
        key: str,
        value: bytes,
        *,
        lease: int | None = None,
        guard: KvEntry | None = None,
    ) -> bool:
        """Set a key if it is absent, atomically; say whether that happened.

        Args:
            key: what to set.
            value: to what.
            lease: the key goes away when this lease ends.
            guard: nothing happens unless this key still has this value.
        """

    async def put(self, key: str, value: bytes, *, lease: int | None = None) -> None:
        """Set a key, whatever it was and whichever lease it had."""

    async def compare_and_delete(self, key: str, value: bytes) -> bool:
        """Delete a key if it has this value, atomically; say whether that happened."""

    async def list_prefix(self, prefix: str) -> list[KvEntry]:
        """Return the entries whose key begins with `prefix`, ordered by key."""

    async def grant_lease(self, ttl_s: float) -> int:
        """Start a lease and return its number, never 0."""

    async def keep_alive(self, lease: int) -> bool:
        """Begin the time of a lease anew; False if it has ended, and with it its keys."""

    async def revoke_lease(self, lease: int) -> None:
        """End a lease and delete its keys."""

    def watch(self, prefix: str) -> AsyncIterator[Mapping[str, bytes]]:
        """Yield all entries under `prefix`, and again whenever they have changed, until closed.

        The whole state each time, not events: whoever missed some, or begins anew, knows no less.
        """

    async def close(self) -> None:
        """Let go of the store; leases run on."""
