"""How a connection begins on a port whose rules speak of TLS: clear text, or a hello with a name.

Nothing is sent to the server before that is known and allowed. Events come as method calls and
return commands, as with `l7proxy.exchange`. The last command of a connection that may go on is
`Enter`; where TLS ends here, the greeting stays in charge until the handshake is done.

    HEAD ──hello, or other bytes──┬─allowed, unread or clear──► CLOSED (another has taken over)
                                  ├─allowed, TLS ends here────► ANSWER ──handshake──► CLOSED
                                  └─refused, too long, too late──► reset

On such a port anything that is not a complete valid hello is refused, unless no rule restricts the
two sides. Source: docs/l7.md, TLS; Envoy's tls_inspector.
"""

from msgspec.structs import replace

from firewall.policy.course import CLEAR, Course, Form
from l7proxy import commands, refusals
from l7proxy.client_hello import ClientHello, HelloReader, HelloRefused, NotTls
from l7proxy.core import Core, event
from l7proxy.judgement import Judge, Judgement
from l7proxy.limits import Limits
from l7proxy.ongoing import connection_record
from l7proxy.phase import Phase
from l7proxy.refusals import Refusal


class Greeting(Core):
    """The beginning of one client connection; `start` comes first.

    Args and events as for `exchange.Exchange`, without those of a server: there is none yet.
    """

    __slots__ = ("_judge", "_limits", "_protocol", "_reader")

    def __init__(self, judge: Judge, limits: Limits, now: float) -> None:
        super().__init__(Phase.HEAD, limits, now)
        self._judge = judge
        self._limits = limits
        self._protocol = "TCP"
        self._reader = HelloReader(limits.client_hello_bytes)

    @event
    def start(self, now: float) -> None:
        """Judge the connection before anything is read from it."""
        judgement = self._judge.connection()
        if not judgement.connected:
            self._refuse(refusals.DENIED_CONNECTION, judgement)
        elif self._judge.passes_unread:  # the server may be the one that speaks first
            course = self._judge.take(CLEAR)
            assert course is not None
            self._enter(course, None, now)

    # --- the client's side -----------------------------------------------------------------------

    @event
    def client_data(self, data: bytes, now: float) -> None:
        """Take bytes of the client."""
        if self._phase is not Phase.HEAD:
            return
        try:
            hello = self._reader.feed(data)
        except NotTls:
            self._count("tls_inspector_tls_not_found")
            self._take(CLEAR, None, refusals.CLEAR_TEXT, now)
        except HelloRefused as refused:
            self._count("tls_inspector_read_error")
            self._protocol = "TLS"
            self._take_unnamed(refused, now)
        else:
            if hello is not None:
                self._take_hello(hello, now)

    def _take_hello(self, hello: ClientHello, now: float) -> None:
        self._protocol = "TLS"
        self._count("tls_inspector_tls_found")
        found = "found" if hello.server_name else "not_found"
        self._count(f"tls_inspector_sni_{found}")
        if hello.encrypted and self._limits.encrypted_client_hello == "deny":
            self._take_unnamed(HelloRefused("an encrypted ClientHello inside"), now)
            return
        self._take(Form(True, hello.server_name), hello, refusals.SERVER_NAME, now)

    def _take_unnamed(self, refused: HelloRefused, now: float) -> None:
        """Let a hello that cannot be judged pass only where no rule restricts the two sides."""
        course = self._judge.take(Form(tls=True))
        if course == Course(http=False):
            self._enter(course, None, now)
            return
        refusal = refusals.CLIENT_HELLO
        self._refuse(refusal._replace(detail=f"{refusal.detail}{{{refused}}}"), None)

    def _take(self, form: Form, hello: ClientHello | None, refusal: Refusal, now: float) -> None:
        course = self._judge.take(form)
        if course is None:
            judgement = self._judge.opening()
            if not judgement.connected:
                refusal = refusals.DENIED_CONNECTION
            self._refuse(refusal, judgement)
        else:
            self._enter(course, hello, now)

    def _enter(self, course: Course, hello: ClientHello | None, now: float) -> None:
        data = bytes(self._reader.data)
        self._commands.append(commands.Enter(course, hello, data))
        self._reader.data.clear()
        if course.terminate is None:
            self._phase = Phase.CLOSED
            self._timer.stop()
        else:
            self._phase = Phase.ANSWER
            self._timer.await_handshake(now)

    @event
    def client_ended(self, now: float) -> None:  # noqa: ARG002 - an event
        """Take the client's FIN: a hello that has not come will not."""
        self._refuse(refusals.CLIENT_GONE, None)

    @event
    def client_lost(self, now: float) -> None:  # noqa: ARG002 - an event
        """Take the loss of the client's connection; one that never said anything is not told."""
        self._phase = Phase.CLOSED
        self._timer.stop()

    @event
    def client_blocked(self, blocked: bool, now: float) -> None:
        """Take that what was sent to the client piles up, or no longer does; it is bounded."""

    # --- TLS that ends here ----------------------------------------------------------------------

    @event
    def failed(self, refusal: Refusal, now: float) -> None:  # noqa: ARG002 - an event
        """Take that there will be no TLS with this client."""
        self._refuse(refusal, self._judge.opening())

    # --- both ------------------------------------------------------------------------------------

    @event
    def tick(self, now: float) -> None:
        """Take that time has passed; does nothing before `deadline`."""
        if now < self.deadline:
            return
        if self._phase is Phase.ANSWER:
            self._refuse(refusals.TLS_TIMEOUT, self._judge.opening())
        else:
            self._refuse(refusals.HELLO_TIMEOUT, None)

    @event
    def policy_changed(self, now: float) -> None:  # noqa: ARG002 - an event
        """Take that another snapshot is in force: a connection that lost its permission ends."""
        judgement = self._judge.connection()
        if not judgement.connected:
            self._refuse(refusals.DENIED_CONNECTION, judgement)

    @event
    def drain(self, now: float) -> None:
        """A client that has just connected is still served; what comes next says goodbye."""

    @event
    def finish(self, now: float) -> None:  # noqa: ARG002 - an event
        """Begin nothing more."""
        if self._phase is Phase.HEAD and not self._reader.data:
            self._close_client()

    def _refuse(self, refusal: Refusal, judgement: Judgement | None) -> None:
        """Reset the connection, and say why."""
        name = self._judge.server_name
        record = replace(
            connection_record(refusal, judgement),
            authority=name,
            protocol=self._protocol,
            tls=self._protocol == "TLS",
            server_name=name,
        )
        self._log(record)
        self._close_client(reset=True)

    def _break_off(self, refusal: Refusal) -> None:
        self._refuse(refusal, None)

    def _settle(self) -> None:
        """Nothing: what is read is bounded, and nothing is sent."""

    def _count(self, name: str) -> None:
        self._commands.append(commands.Count(name))
