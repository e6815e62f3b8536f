"""What policy says about a connection or a request: the border between exchange and policy.

The exchange asks a `Judge` and knows nothing else of policy; `l7proxy.policy` implements it on the
snapshot. Every answer names the revision it was given by and the rules behind it, so that a log
record explains itself.
"""

from typing import NamedTuple, Protocol

from firewall.policy.course import Course, Form
from firewall.policy.http_match import HeaderEdit
from firewall.policy.snapshot import OriginRow
from firewall.policy.verdict import TrafficDirection
from l7proxy import refusals
from l7proxy.refusals import Refusal
from l7proxy.request import Request


class Judgement(NamedTuple):
    """One answer of policy.

    `connected`: the client may talk to this destination at all; False ends the connection.
    `drop_reason` is a `DropReason` or 0. `direction`: the side that refused, or the last that
    allowed. `revision`: of the policies, as flow records name it. `uses_headers`: header rules took
    part. `misdirected`: the request is for another host than the TLS connection. `redacted`:
    names, lower case, of headers that rules compare with secrets. `detail` says more, or "".
    """

    allowed: bool
    connected: bool
    direction: TrafficDirection
    drop_reason: int
    revision: int
    source_identity: int = 0
    destination_identity: int = 0
    source_endpoint: int = 0
    destination_endpoint: int = 0
    edits: tuple[HeaderEdit, ...] = ()
    uses_headers: bool = False
    misdirected: bool = False
    allowed_by: tuple[OriginRow, ...] = ()
    denied_by: tuple[OriginRow, ...] = ()
    isolated_by: tuple[OriginRow, ...] = ()
    detail: str = ""
    redacted: frozenset[bytes] = frozenset()

    @property
    def refusal(self) -> Refusal:
        """How a request is refused that is not `allowed`."""
        return refusals.MISDIRECTED if self.misdirected else refusals.DENIED


class Judge(Protocol):
    """Policy for one client connection; asked anew for every request."""

    @property
    def looks(self) -> bool:
        """Whether it must be known how the connection begins before it can be served."""
        ...

    @property
    def passes_unread(self) -> bool:
        """Whether the connection may pass unread whatever it begins with."""
        ...

    @property
    def server_name(self) -> str:
        """What a server that TLS is spoken to must prove to be; "": it has the right address."""
        ...

    def take(self, form: Form) -> Course | None:
        """Judge the connection in the form in which it began; None: nothing allows it."""
        ...

    def opening(self) -> Judgement:
        """Say who allows or refuses the form taken."""
        ...

    def connection(self) -> Judgement:
        """Say whether the connection itself is allowed now."""
        ...

    def request(self, request: Request) -> Judgement:
        """Say whether this request is allowed now."""
        ...
