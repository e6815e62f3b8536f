"""The life of an endpoint, as a table of every state against every other.

An endpoint appears (or is found again after a restart), gets an identity, waits for its policy to
be published, and is `ready` once every worker has acknowledged it. A change of labels or policy
sends it back; removal ends it. The table says for each pair who may make the move: anybody,
only the builder (the part of the agent that publishes snapshots and hears the acknowledgements), or
nobody.

States and moves are Cilium's (pkg/endpoint/endpoint.go, setState and BuilderSetStateLocked).
There is no `invalid`: what cannot be an endpoint is refused when it is declared. Two cells differ,
and say so: an endpoint that waits for an identity never shows `ready` in between, and labels that
change while it waits for its turn send it back at once.
"""

from enum import IntEnum
from typing import NamedTuple


class EndpointState(IntEnum):
    """Where an endpoint is in its life."""

    RESTORING = 1
    WAITING_FOR_IDENTITY = 2
    WAITING_TO_REGENERATE = 3
    REGENERATING = 4
    READY = 5
    DISCONNECTING = 6
    DISCONNECTED = 7

    @property
    def word(self) -> str:
        """The state as Cilium prints it: "waiting-for-identity"."""
        return self.name.lower().replace("_", "-")


NOT_READY = "not-ready"
"""What is shown instead of the state while the last publication has failed."""

MEANINGS: dict[EndpointState, str] = {
    EndpointState.RESTORING: "was here before the agent started; its policy is being put back",
    EndpointState.WAITING_FOR_IDENTITY: "its labels are known, the number for them is not yet",
    EndpointState.WAITING_TO_REGENERATE: "has a number; its policy waits to be published",
    EndpointState.REGENERATING: "its policy is published; the workers have not all answered",
    EndpointState.READY: "every worker enforces its current policy",
    EndpointState.DISCONNECTING: "is being removed",
    EndpointState.DISCONNECTED: "is removed",
}
"""What each state means for the operator."""


class Mover(IntEnum):
    """Who may make a move."""

    NOBODY = 0
    ANYBODY = 1
    BUILDER = 2


class Move(NamedTuple):
    """One cell of the table."""

    mover: Mover
    reason: str


class TransitionError(RuntimeError):
    """A move that the table refuses; the message gives both states and the reason."""

    def __init__(self, name: str, before: EndpointState | None, after: EndpointState) -> None:
        self.before = before
        self.after = after
        was = "new" if before is None else before.word
        move = (FIRST if before is None else MOVES[before])[after]
        super().__init__(f"endpoint {name}: {was} -> {after.word} refused: {move.reason}")


def _no(reason: str) -> Move:
    return Move(Mover.NOBODY, reason)


def _may(reason: str) -> Move:
    return Move(Mover.ANYBODY, reason)


def _builder(reason: str) -> Move:
    return Move(Mover.BUILDER, reason)


_NO_IDENTITY = "a policy belongs to an identity, and it has none yet"
_UNPUBLISHED = "nothing of its policy has been published yet"
_ENDED = "a removed endpoint stays removed; the same name is a new endpoint"
_LEAVING = "it is being removed; nothing else can happen to it"
_NOT_AGAIN = "it is in this state already"

FIRST: dict[EndpointState, Move] = {
    EndpointState.RESTORING: _may("found in the saved state after a restart of the agent"),
    EndpointState.WAITING_FOR_IDENTITY: _may("declared, or discovered"),
    EndpointState.WAITING_TO_REGENERATE: _no(_NO_IDENTITY),
    EndpointState.REGENERATING: _no(_NO_IDENTITY),
    EndpointState.READY: _no(_NO_IDENTITY),
    EndpointState.DISCONNECTING: _no("there is nothing to remove yet"),
    EndpointState.DISCONNECTED: _no("there is nothing to remove yet"),
}
"""The states in which a life can begin."""

MOVES: dict[EndpointState, dict[EndpointState, Move]] = {
    EndpointState.RESTORING: {
        EndpointState.RESTORING: _may("the agent restarted again before it had finished"),
        EndpointState.WAITING_FOR_IDENTITY: _no("restoring asks for the identity itself"),
        EndpointState.WAITING_TO_REGENERATE: _no("restoring leads to regenerating directly"),
        EndpointState.REGENERATING: _builder("identity and policy are known again"),
        EndpointState.READY: _no(_UNPUBLISHED),
        EndpointState.DISCONNECTING: _may("removed, or its link was gone after the restart"),
        EndpointState.DISCONNECTED: _no("its identity must be released first"),
    },
    EndpointState.WAITING_FOR_IDENTITY: {
        EndpointState.RESTORING: _no("what never had an identity has nothing to restore"),
        EndpointState.WAITING_FOR_IDENTITY: _no("it waits already; the newest labels count"),
        EndpointState.WAITING_TO_REGENERATE: _may(
            "identity allocated (Cilium passes through ready here, which would promise too much)"
        ),
        EndpointState.REGENERATING: _no(_NO_IDENTITY),
        EndpointState.READY: _no("an identity alone is not enforcement: it must be published"),
        EndpointState.DISCONNECTING: _may("removed while it waited"),
        EndpointState.DISCONNECTED: _no("its identity must be released first"),
    },
    EndpointState.WAITING_TO_REGENERATE: {
        EndpointState.RESTORING: _may("the agent restarted"),
        EndpointState.WAITING_FOR_IDENTITY: _may(
            "its labels changed again (Cilium keeps the state and swaps the identity behind it)"
        ),
        EndpointState.WAITING_TO_REGENERATE: _no("one turn serves all causes before it"),
        EndpointState.REGENERATING: _builder("its turn has come"),
        EndpointState.READY: _no(_UNPUBLISHED),
        EndpointState.DISCONNECTING: _may("removed while it waited"),
        EndpointState.DISCONNECTED: _no("its identity must be released first"),
    },
    EndpointState.REGENERATING: {
        EndpointState.RESTORING: _may("the agent restarted"),
        EndpointState.WAITING_FOR_IDENTITY: _may("its labels changed meanwhile"),
        EndpointState.WAITING_TO_REGENERATE: _may("policy changed meanwhile, or a worker failed"),
        EndpointState.REGENERATING: _no(_NOT_AGAIN),
        EndpointState.READY: _builder("every worker has acknowledged the revision"),
        EndpointState.DISCONNECTING: _may("removed meanwhile"),
        EndpointState.DISCONNECTED: _no("its identity must be released first"),
    },
    EndpointState.READY: {
        EndpointState.RESTORING: _may("the agent restarted"),
        EndpointState.WAITING_FOR_IDENTITY: _may("its security-relevant labels changed"),
        EndpointState.WAITING_TO_REGENERATE: _may("a policy, an address or a setting changed"),
        EndpointState.REGENERATING: _no("it takes its turn: waiting-to-regenerate comes first"),
        EndpointState.READY: _no(_NOT_AGAIN),
        EndpointState.DISCONNECTING: _may("removed"),
        EndpointState.DISCONNECTED: _no("its identity must be released first"),
    },
    EndpointState.DISCONNECTING: {
        EndpointState.RESTORING: _no(_LEAVING),
        EndpointState.WAITING_FOR_IDENTITY: _no(_LEAVING),
        EndpointState.WAITING_TO_REGENERATE: _no(_LEAVING),
        EndpointState.REGENERATING: _no(_LEAVING),
        EndpointState.READY: _no(_LEAVING),
        EndpointState.DISCONNECTING: _no(_NOT_AGAIN),
        EndpointState.DISCONNECTED: _may("its rules are gone and its identity is released"),
    },
    EndpointState.DISCONNECTED: {
        EndpointState.RESTORING: _no(_ENDED),
        EndpointState.WAITING_FOR_IDENTITY: _no(_ENDED),
        EndpointState.WAITING_TO_REGENERATE: _no(_ENDED),
        EndpointState.REGENERATING: _no(_ENDED),
        EndpointState.READY: _no(_ENDED),
        EndpointState.DISCONNECTING: _no(_ENDED),
        EndpointState.DISCONNECTED: _no(_NOT_AGAIN),
    },
}
"""Every other state -> every state: who may move it there, and why or why not."""


def move_for(before: EndpointState | None, after: EndpointState) -> Move:
    """Return the cell for a move; `before` None = the life begins."""
    return (FIRST if before is None else MOVES[before])[after]
