"""One workload behind one policy: its labels, addresses, identity and where it is in its life.

The class holds state and makes decisions; it does no I/O. Each method that changes something
returns what its owner (the agent) has to do next, so the order of things can be read here:

    labels change -> ALLOCATE -> identity_allocated() -> REGENERATE -> begin_regeneration()
                  -> snapshot published, every worker has acknowledged -> finish_regeneration()

The answer to an earlier question may come late: `identity_allocated` is told for which labels the
number was asked, and refuses an answer that labels have overtaken.
"""

from collections import deque
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from firewall.endpoints.lifecycle import (
    NOT_READY,
    EndpointState,
    Mover,
    TransitionError,
    move_for,
)
from firewall.identities.labels import NO_LABELS, LabelFilter, LabelSet
from firewall.identities.reserved import RESERVED_LABELS, Reserved
from firewall.policy.snapshot import EndpointRow, NamedPortRow

LOG_COUNT = 128
"""How many state changes an endpoint remembers (Cilium's endpoint log: 256 lines, 2 per change)."""

_LEAVING = (EndpointState.DISCONNECTING, EndpointState.DISCONNECTED)


class Step(IntEnum):
    """What the owner of an endpoint has to do next."""

    NOTHING = 0
    ALLOCATE = 1
    REGENERATE = 2


class StateChange(NamedTuple):
    """One line of the log; `time_ns` is wall clock, `before` None = the life began."""

    time_ns: int
    before: EndpointState | None
    after: EndpointState
    reason: str


class Answered(NamedTuple):
    """What to do after an identity came: the next step, and a number to release (None = none)."""

    step: Step
    release: int | None


class Endpoint:
    """A managed endpoint. Attributes are read by everybody and written by these methods only.

    Args:
        number: its id on this node, 1-65535.
        name: unique on the node.
        namespace: as in Kubernetes, "" = none.
        time_ns: wall clock of its appearance.
        label_filter: which labels count for the identity.
        restored: it was here before the agent started.
    """

    __slots__ = (
        "addresses", "audit", "failure", "id", "identity", "interface", "interface_index",
        "label_filter", "labels", "log", "name", "named_ports", "namespace", "netns",
        "policy_revision", "relevant", "state",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        name: str,
        namespace: str = "",
        *,
        time_ns: int,
        label_filter: LabelFilter | None = None,
        restored: bool = False,
    ) -> None:
        self.id = number
        self.name = name
        self.namespace = namespace
        self.label_filter = label_filter or LabelFilter()
        self.labels: LabelSet = NO_LABELS
        self.relevant: LabelSet = RESERVED_LABELS[Reserved.INIT]
        self.addresses: tuple[bytes, ...] = ()
        self.interface = ""
        self.interface_index = 0
        self.netns = ""
        self.named_ports: tuple[NamedPortRow, ...] = ()
        self.audit = False
        self.identity: int | None = None
        self.policy_revision = 0
        self.failure = ""
        self.log: deque[StateChange] = deque(maxlen=LOG_COUNT)
        self.state: EndpointState | None = None
        if restored:
            self._move(EndpointState.RESTORING, "found in the saved state", time_ns)
        else:
            self._move(EndpointState.WAITING_FOR_IDENTITY, "declared", time_ns)

    # --- state --------------------------------------------------------------------------------

    def _move(
        self, after: EndpointState, reason: str, time_ns: int, *, builder: bool = False
    ) -> None:
        mover = move_for(self.state, after).mover
        if mover is Mover.NOBODY or (mover is Mover.BUILDER and not builder):
            raise TransitionError(self.name, self.state, after)
        self.log.append(StateChange(time_ns, self.state, after, reason))
        self.state = after

    @property
    def shown_state(self) -> str:
        """The state as listings show it: "ready", "not-ready" after a failed publication, ..."""
        if self.failure and self.state is not EndpointState.DISCONNECTED:
            return NOT_READY
        assert self.state is not None
        return self.state.word

    @property
    def title(self) -> str:
        """`namespace/name`, or the name alone."""
        return f"{self.namespace}/{self.name}" if self.namespace else self.name

    # --- labels and identity ------------------------------------------------------------------

    def set_labels(self, labels: LabelSet, time_ns: int, reason: str = "labels changed") -> Step:
        """Replace all labels.

        Labels that are not security-relevant change nothing else. With no labels at all the
        endpoint is `reserved:init`.

        Returns:
            ALLOCATE if the endpoint needs another identity (or still waits for its first one).

        Raises:
            TransitionError: the endpoint is being removed, or was.
        """
        if self.state in _LEAVING:
            raise TransitionError(self.name, self.state, EndpointState.WAITING_FOR_IDENTITY)
        relevant, _ = self.label_filter.split(labels)
        relevant = relevant or RESERVED_LABELS[Reserved.INIT]
        same = relevant == self.relevant
        self.labels, self.relevant = labels, relevant
        if self.state in (EndpointState.WAITING_FOR_IDENTITY, EndpointState.RESTORING):
            return Step.ALLOCATE
        if same:
            return Step.NOTHING
        self._move(EndpointState.WAITING_FOR_IDENTITY, reason, time_ns)
        return Step.ALLOCATE

    def identity_allocated(self, number: int, labels: LabelSet, time_ns: int) -> Answered:
        """Take the number that was allocated for `labels`.

        Every allocation took a reference, so there is always one number too many: the one the
        endpoint had (which may be the same), or, if the labels have changed again meanwhile or the
        endpoint is leaving, the one that came too late.

        Args:
            number: from `IdentityRegistry.allocate`.
            labels: the label set it was asked for, `relevant` of that time.
            time_ns: wall clock.
        """
        if self.state not in (EndpointState.WAITING_FOR_IDENTITY, EndpointState.RESTORING):
            return Answered(Step.NOTHING, number)
        if labels != self.relevant:
            return Answered(Step.ALLOCATE, number)
        before, self.identity = self.identity, number
        if self.state is EndpointState.WAITING_FOR_IDENTITY:
            reason = f"identity {number}" if before is None else f"identity {before} -> {number}"
            self._move(EndpointState.WAITING_TO_REGENERATE, reason, time_ns)
        return Answered(Step.REGENERATE, before)

    def lose_identity(self, time_ns: int) -> Step:
        """Note that the number means another label set now; until the next one it is `init`.

        The lost number must not be released.

        Returns:
            ALLOCATE, or NOTHING if the endpoint is leaving.
        """
        if self.state in _LEAVING:
            return Step.NOTHING
        lost, self.identity = self.identity, None
        if self.state not in (EndpointState.WAITING_FOR_IDENTITY, EndpointState.RESTORING):
            self._move(EndpointState.WAITING_FOR_IDENTITY, f"identity {lost} was lost", time_ns)
        return Step.ALLOCATE

    # --- the builder --------------------------------------------------------------------------

    def need_regeneration(self, reason: str, time_ns: int) -> Step:
        """Note that what is enforced for the endpoint is out of date.

        Returns:
            REGENERATE, or what it waits for anyway.
        """
        match self.state:
            case EndpointState.READY | EndpointState.REGENERATING:
                self._move(EndpointState.WAITING_TO_REGENERATE, reason, time_ns)
                return Step.REGENERATE
            case EndpointState.WAITING_TO_REGENERATE:
                return Step.REGENERATE
            case EndpointState.RESTORING if self.identity is not None:
                return Step.REGENERATE
            case EndpointState.WAITING_FOR_IDENTITY | EndpointState.RESTORING:
                return Step.ALLOCATE
            case _:
                return Step.NOTHING

    def begin_regeneration(self, time_ns: int, reason: str = "publishing its policy") -> None:
        """Note that a snapshot with its identity and policy is being published.

        Raises:
            TransitionError: it does not wait for that, or (restoring) has no identity yet.
        """
        if self.identity is None:
            raise TransitionError(self.name, self.state, EndpointState.REGENERATING)
        self._move(EndpointState.REGENERATING, reason, time_ns, builder=True)

    def finish_regeneration(self, policy_revision: int, time_ns: int) -> bool:
        """Note that every worker enforces the snapshot that was being published.

        Returns:
            Whether the endpoint is ready; False if something has changed meanwhile.
        """
        if self.state is not EndpointState.REGENERATING:
            return False
        self.policy_revision = policy_revision
        self.failure = ""
        reason = f"every worker enforces policy revision {policy_revision}"
        self._move(EndpointState.READY, reason, time_ns, builder=True)
        return True

    def fail_regeneration(self, failure: str, time_ns: int) -> Step:
        """Note that publishing failed; what was enforced before stays in force.

        Returns:
            REGENERATE, to be tried again later.
        """
        if self.state is not EndpointState.REGENERATING:
            return Step.NOTHING
        self.failure = failure
        self._move(EndpointState.WAITING_TO_REGENERATE, failure, time_ns)
        return Step.REGENERATE

    # --- the end ------------------------------------------------------------------------------

    def disconnect(self, time_ns: int, reason: str = "removed") -> int | None:
        """Begin the removal; return the identity to release once no snapshot names the endpoint.

        Raises:
            TransitionError: it is being removed already.
        """
        self._move(EndpointState.DISCONNECTING, reason, time_ns)
        number, self.identity = self.identity, None
        return number

    def disconnected(self, time_ns: int) -> None:
        """End the removal.

        Raises:
            TransitionError: it was not being removed.
        """
        self._move(EndpointState.DISCONNECTED, "no worker knows it any more", time_ns)

    # --- the rest -----------------------------------------------------------------------------

    def configure(
        self,
        time_ns: int,
        *,
        addresses: Iterable[bytes] | None = None,
        interface: tuple[str, int] | None = None,
        netns: str | None = None,
        named_ports: Iterable[NamedPortRow] | None = None,
        audit: bool | None = None,
    ) -> Step:
        """Change what is given and not None; anything that a worker must know regenerates.

        Args:
            time_ns: wall clock.
            addresses: packed, IPv4 and IPv6 together.
            interface: (name, index) of the node's side of its link; index 0 = not known.
            netns: name or path of its network namespace, for people.
            named_ports: its container ports.
            audit: report what policy would drop, and let it pass.
        """
        before = self.row()
        if addresses is not None:
            self.addresses = tuple(addresses)
        if interface is not None:
            self.interface, self.interface_index = interface
        if netns is not None:
            self.netns = netns
        if named_ports is not None:
            self.named_ports = tuple(named_ports)
        if audit is not None:
            self.audit = audit
        if self.row() == before:
            return Step.NOTHING
        return self.need_regeneration("addresses, link or settings changed", time_ns)

    def row(self) -> EndpointRow:
        """Return the endpoint as a snapshot holds it; without an identity it is `init`."""
        return EndpointRow(
            id=self.id,
            name=self.name,
            namespace=self.namespace,
            identity=Reserved.INIT if self.identity is None else self.identity,
            addresses=self.addresses,
            interface=self.interface,
            interface_index=self.interface_index,
            named_ports=self.named_ports,
            audit=self.audit,
        )

    def __repr__(self) -> str:
        return f"<Endpoint {self.id} {self.title} {self.shown_state} identity={self.identity}>"
