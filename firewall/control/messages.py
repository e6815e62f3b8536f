"""What the agent and its workers say to each other.

A worker listens on a SOCK_SEQPACKET unix socket, `<run_dir>/<kind>-<number>.sock`; the agent
connects, and connects again after either was restarted. One datagram is one message, MessagePack.
A worker that has no agent keeps deciding by its last snapshot and counts the events that it could
not deliver.
"""

import msgspec

from firewall.flows.event import Event

MAX_MESSAGE_BYTES = 128 * 1024
"""Upper bound of one datagram; below the default net.core.wmem_max of 212,992 bytes (socket(7))."""

# --- agent to worker --------------------------------------------------------------------------


class Announce(msgspec.Struct, frozen=True, tag="announce"):
    """A snapshot of this revision is at `path`: load it, enforce it, acknowledge it."""

    revision: int
    path: str


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """Answer with `Answer`s of the same `request`, after the events of what was decided before.

    `what`: "connections", "conntrack", "metrics", "status"; of the proxy also "redirects", "stats".
    "events": no rows.
    """

    request: int
    what: str


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """Take the flows between these ends out of the table; answer with `Answer`s of `request`.

    An end is (packed address, port), port 0 = any. `sources` opened the flow. None: anybody.
    """

    request: int
    sources: tuple[tuple[bytes, int], ...] | None = None
    destinations: tuple[tuple[bytes, int], ...] | None = None


class Watch(msgspec.Struct, frozen=True, tag="watch"):
    """Put the packets themselves into their events for the next `for_s` seconds; 0 ends it."""

    for_s: float


class Pause(msgspec.Struct, frozen=True, tag="pause"):
    """Leave packets in the queue for `for_s` seconds, or until another `Pause` says 0.

    Then take over anew what the kernel knows, since an earlier worker may have had them until now.
    """

    for_s: float


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Finish what is begun, accept nothing new, then exit."""

    deadline_s: float


class Instruct(msgspec.Struct, frozen=True, tag="instruct"):
    """Change the running process. `what`: "log_level" (to `value`) or "reset_counters"."""

    what: str
    value: str = ""


class Lend(msgspec.Struct, frozen=True, tag="lend"):
    """Answer with `Lent`, and go on using what was lent."""


class Settled(msgspec.Struct, frozen=True, tag="settled"):
    """Every worker enforces what `Learnt` of this token named; `enforced` False: too late to wait.

    Its answer need not be held any longer.
    """

    token: int
    enforced: bool


ToWorker = Announce | Ask | Forget | Watch | Pause | Drain | Lend | Settled | Instruct

# --- worker to agent --------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message on every connection: who is there and what it enforces already."""

    kind: str
    number: int
    pid: int
    version: str
    revision: int


class Acknowledged(msgspec.Struct, frozen=True, tag="acknowledged"):
    """The worker decides by this revision now; `error` set: it kept the one it had."""

    revision: int
    error: str = ""


class Events(msgspec.Struct, frozen=True, tag="events"):
    """Decisions, oldest first. `lost_count`: events dropped since the last batch."""

    events: tuple[Event, ...]
    lost_count: int = 0


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """A part of the answer to `Ask` or `Forget`; rows are JSON-able mappings; `last` ends it."""

    request: int
    rows: tuple[dict[str, object], ...]
    last: bool


class Lent(msgspec.Struct, frozen=True, tag="lent"):
    """The worker's listening sockets come with this datagram (SCM_RIGHTS, unix(7)), named here."""

    names: tuple[str, ...]


class Learnt(msgspec.Struct, frozen=True, tag="learnt"):
    """DNS answered an endpoint with these addresses for `name`; answer with `Settled`.

    `name` in lower case with a trailing dot, `addresses` packed, `ttl_s` as the answer had it.
    `token` 0: nobody waits.
    """

    token: int
    endpoint: int
    name: str
    addresses: tuple[bytes, ...]
    ttl_s: int


FromWorker = Hello | Acknowledged | Events | Answer | Lent | Learnt
