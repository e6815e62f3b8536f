"""The kernel's sets of addresses and interfaces, as text: whose packets are queued.

hash:net,iface holds at most 64 interfaces of one network (ipset(8)); the endpoints' interfaces, all
under 0/0 and ::/0, are therefore spread over as many sets as needed, gathered in one list:set.
"""

from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Final, NamedTuple

from conntrack.address import format_address

SET_PREFIX = "bartizan-"
INTERFACES = f"{SET_PREFIX}interfaces"
INTERFACES_PER_SET = 64
"""Elements of one network that hash:net,iface accepts (ipset(8); seen on Linux 6.18)."""

_MAX_ELEMENTS = 1 << 20  # a bound against mistakes; ipset allocates as it fills
_LIST_SIZE = 1024  # sets in the list: 512 * 64 interfaces per family


class Family(IntEnum):
    """The two families, by the number that `ip -4` and `ip -6` take."""

    IPV4 = 4
    IPV6 = 6

    @property
    def address_bytes(self) -> int:
        """Length of a packed address."""
        return 4 if self is Family.IPV4 else 16

    @property
    def loopback(self) -> str:
        """The address that is the node's alone."""
        return "127.0.0.1" if self is Family.IPV4 else "::1"

    @property
    def ipset_name(self) -> str:
        """What ipset calls the family."""
        return "inet" if self is Family.IPV4 else "inet6"


class RulesetError(ValueError):
    """A setting or an endpoint cannot be expressed as rules; the text says why."""


class EndpointLink(NamedTuple):
    """Where an endpoint is.

    Attributes:
        addresses: packed.
        interface: the node's side of its link, "" = unknown.
        bridge: the bridge that the interface is a port of, "" = none.
    """

    addresses: tuple[bytes, ...]
    interface: str
    bridge: str = ""


def managed_set(family: Family) -> str:
    """Name the set of every address of every endpoint."""
    return f"{SET_PREFIX}managed-{family:d}"


def bound_set(family: Family) -> str:
    """Name the set of (address, interface) pairs, for endpoints whose interface is known."""
    return f"{SET_PREFIX}bound-{family:d}"


def homed_set(family: Family) -> str:
    """Name the set of the addresses whose place is known: elsewhere, they are spoofed."""
    return f"{SET_PREFIX}homed-{family:d}"


def routed_set(family: Family) -> str:
    """Name the set of the addresses in `bound_set`: behind an interface that is no bridge's."""
    return f"{SET_PREFIX}routed-{family:d}"


def _interface_set(family: Family, index: int) -> str:
    """Name one of the sets that the endpoints' interfaces are spread over."""
    return f"{SET_PREFIX}if-{family:d}-{index}"


def managed(links: Iterable[EndpointLink], family: Family) -> set[str]:
    """Return every address of a family that an endpoint has, as text.

    Raises:
        RulesetError: an address is not 4 or 16 bytes.
    """
    return {
        format_address(address)
        for link in links
        for address in link.addresses
        if _is_of(address, family)
    }


class SetState(NamedTuple):
    """The sets as they are: name -> its elements, as `ipset save` writes them."""

    elements: dict[str, set[str]]


NO_SETS: Final = SetState({})
"""None of ours."""


def read_sets(saved: str) -> SetState:
    """Read our sets out of what `ipset save` printed; other people's are left out."""
    elements: dict[str, set[str]] = {}
    for line in saved.splitlines():
        verb, _, rest = line.partition(" ")
        name, _, tail = rest.partition(" ")
        if not name.startswith(SET_PREFIX):
            continue
        if verb == "create":
            elements.setdefault(name, set())
        elif verb == "add":
            elements.setdefault(name, set()).add(tail.strip())
    return SetState(elements)


def create_sets_text(state: SetState) -> str:
    """Return the input of `ipset restore` that makes the sets our rules name, if missing."""
    lines = [
        f"create {name} {definition}"
        for name, definition in _definitions()
        if name not in state.elements
    ]
    return "".join(f"{line}\n" for line in lines)


def update_sets_text(state: SetState, links: Iterable[EndpointLink]) -> str:
    """Return the input of `ipset restore` that makes the sets hold exactly these endpoints.

    Additions come first: at no moment is an endpoint that stays left unguarded. Deletions go
    backwards: at no moment is an address forged in its own place.

    Raises:
        RulesetError: an address is not 4 or 16 bytes, or an interface name cannot be one.
    """
    wanted = _wanted(tuple(links), state)
    lines: list[str] = []
    for name, elements in wanted.items():
        if name not in state.elements:
            lines += _create_interface_set(name)
        lines += [
            f"add {name} {item}" for item in sorted(elements - state.elements.get(name, set()))
        ]
    for name, elements in reversed(wanted.items()):
        lines += [
            f"del {name} {item}" for item in sorted(state.elements.get(name, set()) - elements)
        ]
    return "".join(f"{line}\n" for line in lines)


def remove_sets_text(state: SetState) -> str:
    """Return the input of `ipset restore` that destroys our sets; the rules must be gone."""
    # The list refers to the other sets, so it goes first.
    names = sorted(state.elements, key=lambda name: (name != INTERFACES, name))
    return "".join(f"destroy {name}\n" for name in names)


def _definitions() -> Iterator[tuple[str, str]]:
    """Yield the sets that exist always, with how `ipset create` makes them."""
    for family in Family:
        tail = f"family {family.ipset_name} maxelem {_MAX_ELEMENTS}"
        yield managed_set(family), f"hash:ip {tail}"
        yield bound_set(family), f"hash:net,iface {tail}"
        yield homed_set(family), f"hash:ip {tail}"
        yield routed_set(family), f"hash:ip {tail}"
    yield INTERFACES, f"list:set size {_LIST_SIZE}"


def _create_interface_set(name: str) -> list[str]:
    """Return the lines that make one more set of interfaces and put it on the list."""
    if not name.startswith(f"{SET_PREFIX}if-"):
        return []
    family = Family.IPV4 if name.startswith(f"{SET_PREFIX}if-4-") else Family.IPV6
    return [
        f"create {name} hash:net,iface family {family.ipset_name}",
        f"add {INTERFACES} {name}",
    ]


def _wanted(links: tuple[EndpointLink, ...], state: SetState) -> dict[str, set[str]]:
    """Return the elements that each set of ours shall hold."""
    wanted: dict[str, set[str]] = {}
    interfaces = sorted(
        {_interface(link.bridge or link.interface) for link in links if link.interface}
    )
    for family in Family:
        bound: set[str] = set()
        homed: set[str] = set()
        routed: set[str] = set()
        for link in links:
            texts = [
                format_address(address) for address in link.addresses if _is_of(address, family)
            ]
            if link.interface:
                homed.update(texts)
            if link.interface and not link.bridge:
                bound.update(f"{text},{link.interface}" for text in texts)
                routed.update(texts)
        wanted[managed_set(family)] = managed(links, family)
        wanted[bound_set(family)] = bound
        wanted[homed_set(family)] = homed
        wanted[routed_set(family)] = routed
        everything = "0.0.0.0/0" if family is Family.IPV4 else "::/0"
        wanted |= _spread([f"{everything},{name}" for name in interfaces], family, state)
    return wanted


def _spread(items: list[str], family: Family, state: SetState) -> dict[str, set[str]]:
    """Assign interfaces to sets of limited size; those that have a place keep it."""
    prefix = f"{SET_PREFIX}if-{family:d}-"
    existing = [name for name in state.elements if name.startswith(prefix)]
    places = {name: state.elements[name] & set(items) for name in existing}
    homeless = sorted(set(items).difference(*places.values()))
    index = 0
    while homeless:
        name = _interface_set(family, index)
        place = places.setdefault(name, set())
        # What is deleted in the same run still takes room while the additions are made.
        free = max(0, INTERFACES_PER_SET - len(place | state.elements.get(name, set())))
        place.update(homeless[:free])
        del homeless[:free]
        index += 1
    return places


def _is_of(address: bytes, family: Family) -> bool:
    """Say whether an address belongs to the family; neither family is an error."""
    if len(address) not in (4, 16):
        raise RulesetError(f"address {address.hex()} is neither 4 nor 16 bytes long")
    return len(address) == family.address_bytes


def _interface(name: str) -> str:
    """Refuse what ipset would read as something else, or the kernel would not take as a name."""
    if len(name) > 15 or not name.isprintable() or any(char in " ,/:\"'" for char in name):
        raise RulesetError(f"{name!r} is not the name of an interface")
    return name
