"""Snapshots of a few rows, whatever they mean: what hypothesis draws for files and views."""

from hypothesis import strategies as st

from firewall.policy.snapshot import (
    DirectionRow,
    EndpointRow,
    EntryRow,
    HttpRuleRow,
    IdentityRow,
    IpcacheRow,
    L7Row,
    NamedPortRow,
    OriginRow,
    PolicyRow,
    Settings,
    SightRow,
    Snapshot,
)

ADDRESSES = (*(bytes([10, 0, 0, last]) for last in range(1, 5)), bytes([192, 0, 2, 1]))
L7 = tuple(L7Row("http", http=(HttpRuleRow(method=method),)) for method in ("GET", "PUT", "HEAD"))
ORIGINS = tuple(OriginRow("CNP", "x", name, "spec") for name in "abcd")

numbers = st.integers(1, 5)
names = st.sampled_from([(), (NamedPortRow("web", 6, 80),), (NamedPortRow("web", 6, 81),)])
selectors = st.sets(st.integers(1, 4), max_size=3).map(sorted).map(tuple)


def rows(keys, make):
    """A table by key, in the order of its keys."""
    return st.sets(keys, max_size=4).flatmap(
        lambda found: st.tuples(*(make(key) for key in sorted(found)))
    )


def identity(number):
    labels = st.sampled_from([("k8s:a=1",), ("k8s:a=2", "k8s:b=1")])
    return st.builds(IdentityRow, st.just(number), labels, selectors, names)


def endpoint(number):
    return st.builds(
        EndpointRow,
        st.just(number),
        st.just(f"pod{number}"),
        st.just("x"),
        numbers,
        st.lists(st.sampled_from(ADDRESSES), max_size=2, unique=True).map(tuple),
        st.just(""),
        st.integers(0, 9),
        names,
        st.booleans(),
    )


def prefix(key):
    return st.builds(IpcacheRow, st.just(key[1]), st.just(key[2]), numbers, selectors)


def sight(key):
    return st.builds(SightRow, st.just(key[0]), st.just(key[1]), selectors)


seen = st.tuples(numbers, st.sampled_from(ADDRESSES))

prefixes = st.sampled_from(
    [(4, bytes(4), 0), (4, bytes([10, 0, 0, 0]), 24), *((4, one, 32) for one in ADDRESSES)]
)

entries = st.builds(
    EntryRow,
    st.sampled_from([1, 2]),
    st.just(200),
    st.just(0.0),
    st.integers(0, 4),
    st.sampled_from([0, 6]),
    st.sampled_from([0, 80]),
    st.sampled_from([80, 65535]),
    st.sampled_from(["", "web"]),
    st.integers(-1, 1),
    st.integers(0, 1),
)
directions = st.builds(
    DirectionRow,
    st.booleans(),
    st.booleans(),
    st.lists(entries, max_size=3).map(tuple),
    st.lists(st.integers(0, 1), max_size=1).map(tuple),
)


def policy(number):
    return st.builds(PolicyRow, st.just(number), directions, directions)


@st.composite
def snapshots(draw):
    """Any snapshot whose tables are in order."""
    return Snapshot(
        revision=draw(numbers),
        policy_revision=draw(numbers),
        generation=draw(numbers),
        settings=Settings(
            allow_localhost=draw(st.sampled_from(["always", "policy"])),
            policy_audit_mode=draw(st.booleans()),
            local_addresses=draw(st.sampled_from([(), ADDRESSES[:1], ADDRESSES[-1:]])),
        ),
        endpoints=draw(rows(numbers, endpoint)),
        identities=draw(rows(numbers, identity)),
        ipcache=draw(rows(prefixes, prefix)),
        sights=draw(rows(seen, sight)),
        policies=draw(rows(numbers, policy)),
        l7=tuple(draw(st.lists(st.sampled_from(L7), min_size=2, max_size=4))),
        origins=tuple(draw(st.lists(st.sampled_from(ORIGINS), min_size=2, max_size=4))),
    )


TABLES = (
    "settings", "endpoints", "identities", "ipcache", "sights", "policies", "l7", "origins",
)  # fmt: skip


@st.composite
def successors(draw, old):
    """A snapshot that keeps some of another one's tables and changes the rest."""
    other = draw(snapshots())
    kept = {name: getattr(old, name) for name in draw(st.sets(st.sampled_from(TABLES)))}
    fields = {name: getattr(other, name) for name in Snapshot.__struct_fields__}
    return Snapshot(**fields | kept | {"revision": old.revision + 1})


def answers(view):
    """Everything a view says about the addresses that snapshots hold."""
    return [
        view.decide(source, destination, protocol, port)
        for source in ADDRESSES
        for destination in ADDRESSES
        for protocol, port in ((6, 80), (6, 81), (17, 80))
    ]
