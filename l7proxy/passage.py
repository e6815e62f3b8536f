"""A connection whose bytes pass unread: TLS that only its server reads, or what no rule restricts.

The events and commands are those of `exchange.Exchange`; `start` comes first. Each side may end its
half alone. The passage ends when a snapshot no longer allows the form in which it began. Memory is
bounded: who sends faster than the other side reads is paused.
"""

from l7proxy import commands, refusals
from l7proxy.client_hello import HelloRefused
from l7proxy.core import event
from l7proxy.judgement import Judge, Judgement
from l7proxy.limits import Limits
from l7proxy.link import LinkState, connect_refusal
from l7proxy.phase import Phase
from l7proxy.pipe import Pipe
from l7proxy.refusals import Refusal
from l7proxy.second_hello import SecondHello


class Passage(Pipe):
    """One client connection and the one to its server.

    Args:
        judge: policy for this connection, which has taken its form.
        limits: what a connection may use.
        protocol: for records, "TLS" or "TCP".
        watch: looks at what passes at first; None: nothing needs to be looked at.
        now: monotonic seconds.
    """

    __slots__ = (
        "_begun_at", "_client_ended", "_judgement", "_protocol", "_received_bytes", "_sent_bytes",
        "_server_ended", "_watch",
    )  # fmt: skip

    def __init__(
        self, judge: Judge, limits: Limits, protocol: str, watch: SecondHello | None, now: float
    ) -> None:
        super().__init__(judge, limits, now)
        self._judgement = judge.opening()
        self._protocol = protocol
        self._watch = watch
        self._begun_at = now
        self._client_ended = False
        self._server_ended = False
        self._received_bytes = 0
        self._sent_bytes = 0

    @event
    def start(self, hello_bytes: int, data: bytes, now: float) -> None:
        """Connect to the server; send it the hello, the first bytes of `data`, and what follows."""
        self._tell(commands.RecordKind.REQUEST, None, now)
        self._commands.append(self._link.open())
        self._timer.await_connection(now)
        if hello_bytes:
            self._received_bytes += hello_bytes
            self._link.send(data[:hello_bytes], self._commands)
        if data[hello_bytes:]:
            self._take(data[hello_bytes:], now)

    # --- the client's side -----------------------------------------------------------------------

    @event
    def client_data(self, data: bytes, now: float) -> None:
        """Take bytes of the client."""
        self._take(data, now)

    def _take(self, data: bytes, now: float) -> None:
        self._received_bytes += len(data)
        watch = self._watch
        if watch is not None:
            try:
                data = watch.from_client(data)
            except HelloRefused as refused:
                refusal = refusals.CLIENT_HELLO
                self._reset(refusal._replace(detail=f"{refusal.detail}{{{refused}}}"), now)
                return
            if watch.over:
                self._watch = None
        if data:
            self._link.send(data, self._commands)
        self._wait(now)

    @event
    def client_ended(self, now: float) -> None:
        """Take the client's FIN, and pass it on behind what it has sent."""
        self._client_ended = True
        if self._server_ended:
            self._finish(now)
        elif self._link.state is LinkState.OPEN:
            self._commands.append(commands.ShutdownUpstream())

    @event
    def client_lost(self, now: float) -> None:
        """Take the loss of the client's connection."""
        self._tell(commands.RecordKind.RESPONSE, refusals.CLIENT_GONE, now)
        self._link.drop(self._commands, reset=True)
        self._phase = Phase.CLOSED
        self._timer.stop()

    # --- the server's side -----------------------------------------------------------------------

    @event
    def upstream_opened(self, now: float, _link: int = 0) -> None:
        """Take that the server accepted the connection."""
        self._commands.append(self._link.opened())
        if self._client_ended:
            self._commands.append(commands.ShutdownUpstream())
        self._wait(now)

    @event
    def upstream_failed(self, failure: commands.ConnectFailure, now: float, _link: int = 0) -> None:
        """Take that there is no connection to the server."""
        self._link.failed()
        self._reset(connect_refusal(failure), now)

    @event
    def upstream_data(self, data: bytes, now: float, _link: int = 0) -> None:
        """Take bytes of the server."""
        self._sent_bytes += len(data)
        watch = self._watch
        if watch is not None:
            watch.from_server(data)
            if watch.over:
                self._watch = None
                if held := watch.rest():
                    self._link.send(held, self._commands)
        self._commands.append(commands.SendClient(data))
        self._wait(now)

    @event
    def upstream_ended(self, now: float, _link: int = 0) -> None:
        """Take the server's FIN, and pass it on."""
        self._server_ended = True
        if self._client_ended:
            self._finish(now)
        else:
            self._commands.append(commands.ShutdownClient())

    @event
    def upstream_lost(self, now: float, _link: int = 0) -> None:
        """Take the loss of the server's connection, by RST or an error."""
        self._reset(refusals.UPSTREAM_TRUNCATED, now)

    # --- both ------------------------------------------------------------------------------------

    @event
    def tick(self, now: float) -> None:
        """Take that time has passed; does nothing before `deadline`."""
        if now >= self.deadline:
            self._reset(self._timer.timeout or refusals.STREAM_IDLE, now)

    @event
    def policy_changed(self, now: float) -> None:
        """Take that another snapshot is in force: what no longer may pass ends."""
        judgement = self._judge.connection()
        if not judgement.connected:
            self._judgement = judgement
            self._reset(refusals.DENIED_CONNECTION, now)

    def _wait(self, now: float) -> None:
        if self._phase is Phase.ANSWER and self._link.state is LinkState.OPEN:
            self._timer.await_bytes(now)

    def _held_bytes(self) -> int:
        return self._link.held_bytes

    def _break_off(self, refusal: Refusal) -> None:
        self._reset(refusal, self._begun_at)

    def _finish(self, now: float) -> None:
        """Close both sides, which have said all that they had to say."""
        self._tell(commands.RecordKind.RESPONSE, None, now)
        self._link.drop(self._commands, reset=False)
        self._close_client(reset=False)

    def _reset(self, refusal: Refusal, now: float) -> None:
        """End both sides at once."""
        self._tell(commands.RecordKind.RESPONSE, refusal, now)
        self._link.drop(self._commands, reset=True)
        self._close_client(reset=True)

    def _tell(self, kind: commands.RecordKind, refusal: Refusal | None, now: float) -> None:
        judgement: Judgement | None = self._judgement
        record = commands.Record(
            kind,
            judgement,
            "",
            self._judge.server_name,
            "",
            self._protocol,
            flag=refusal.flag if refusal else "",
            detail=refusal.detail if refusal else "",
            duration_s=now - self._begun_at,
            received_bytes=self._received_bytes,
            sent_bytes=self._sent_bytes,
        )
        self._log(record)
