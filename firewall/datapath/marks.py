"""Packet marks: everything that our rules, workers and proxy sockets tell each other by them.

Theory of operation. The kernel carries 32 mark bits per packet (`skb->mark`), per socket
(`SO_MARK`) and per kernel conntrack entry (connmark), and other programs use some of them as well.
So all of ours live under one mask of contiguous bits, which the operator may move; bits outside it
are never changed. Inside the mask the field is laid out, from its lowest bit, as

    | number: the remaining bits | kind: 3 bits |

A kind is one closed choice, hence a number and not flags: a packet cannot be marked two ways. The
number belongs to the kind: the generation (modulo its size) for OFFLOAD, a worker for PASS_ON, a
`Stage` for DEFERRED.

Default mask 0xff000000: kube-proxy uses 0x4000 and 0x8000, Cilium 0xf00, Tailscale 0xff0000.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

DEFAULT_MASK = 0xFF000000
"""The bits of a mark that are ours unless configured otherwise."""

KIND_BITS = 3
"""Width of the kind: room for 8, and all are used."""

MIN_BITS = KIND_BITS + 2
"""Narrowest mask: four generations, so that a flow cannot return to its own by two changes."""


class Kind(IntEnum):
    """What a mark means."""

    NONE = 0
    """Not marked by us."""
    TO_PROXY = 1
    """Set by a worker's verdict (with repeat): TPROXY hands the packet to the L7 proxy."""
    LOCAL = 2
    """Set by our rules: a socket of the proxy owns the packet, deliver it on this host."""
    FROM_PROXY = 3
    """Set on every socket of the proxy: what it sends was decided already."""
    OFFLOAD = 4
    """Set by a worker's verdict, saved to the connmark: accept this flow in the kernel."""
    PASS_ON = 5
    """Set by a worker's verdict (with repeat): worker `number` shall look at the packet too."""
    DEFERRED = 7
    """Set by a worker's verdict or our rules: decide where the destination has been translated."""
    SUSPECT = 6
    """Set by our rules on the way to a worker: the kernel's conntrack calls the packet INVALID."""


class Stage(IntEnum):
    """How far a packet has come whose destination may be translated; the number beside DEFERRED.

    Four, which is what the narrowest mask has room for.
    """

    BEFORE = 0
    """A worker would drop it by the destination that it had."""
    SETTLED = 1
    """A worker decides by its final destination, or has accepted it."""
    UNPROVEN = 2
    """Of a translated flow: only a worker can say whether its source is where it belongs."""
    PROVEN = 3
    """Of a translated flow: its source is an endpoint's on its own link, or nobody's."""


class MaskError(ValueError):
    """The configured mask cannot hold our marks; the text says why."""


class MaskedMark(NamedTuple):
    """A mark value and the bits in which it is compared; both 0..0xffffffff, host order."""

    value: int
    mask: int

    def __str__(self) -> str:
        """Render as iptables and `ip rule` read it: `0x1000000/0xff000000`."""
        return f"{self.value:#x}/{self.mask:#x}"


@dataclass(frozen=True, slots=True)
class Marks:
    """The marks under one mask.

    Raises:
        MaskError: the mask is not one run of at least `MIN_BITS` bits within 32.
    """

    mask: int = DEFAULT_MASK

    def __post_init__(self) -> None:
        if not 0 < self.mask <= 0xFFFFFFFF:
            raise MaskError(f"mark mask {self.mask:#x} is not within 32 bits")
        field = self.mask >> self._shift
        if field & (field + 1):
            raise MaskError(f"mark mask {self.mask:#x} has a gap: its bits must be contiguous")
        if field.bit_length() < MIN_BITS:
            raise MaskError(f"mark mask {self.mask:#x} is too narrow: {MIN_BITS} bits are needed")

    @property
    def _shift(self) -> int:
        """Position of the mask's lowest bit."""
        return (self.mask & -self.mask).bit_length() - 1

    @property
    def number_count(self) -> int:
        """How many numbers fit beside the kind: generations repeat after so many."""
        return ((self.mask >> self._shift) + 1) >> KIND_BITS

    def of(self, kind: Kind, number: int = 0) -> MaskedMark:
        """Return the mark of a kind, compared in every bit of ours.

        Args:
            kind: what it means.
            number: generation, worker or stage; taken modulo `number_count`.
        """
        field = (number % self.number_count) << KIND_BITS | kind
        return MaskedMark(field << self._shift, self.mask)

    def any_of(self, kind: Kind) -> MaskedMark:
        """Return the mark of a kind whatever its number, for matching only."""
        return MaskedMark(kind << self._shift, ((1 << KIND_BITS) - 1) << self._shift)

    def put(self, mark: int, kind: Kind, number: int = 0) -> int:
        """Return a packet's mark with our bits replaced and everybody else's kept."""
        return mark & ~self.mask & 0xFFFFFFFF | self.of(kind, number).value

    def kind(self, mark: int) -> Kind:
        """Return what a packet's mark means to us."""
        return Kind((mark & self.mask) >> self._shift & ((1 << KIND_BITS) - 1))

    def number(self, mark: int) -> int:
        """Return the generation, worker or stage that a packet's mark carries."""
        return (mark & self.mask) >> self._shift >> KIND_BITS
