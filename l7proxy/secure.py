"""TLS as a layer between a socket's transport and the protocol that thinks it talks to it.

`SecureTransport` is the socket's protocol and offers the inner protocol the part of
`asyncio.Transport` that the proxy uses, so neither knows of the other. It stands on memory buffers,
not on `loop.start_tls`, for three reasons: the bytes of the hello were read before; a FIN without
close_notify must not look like an end (it is passed on as a loss, RFC 8446 6.1); and the loops
differ in what they do at the end of a stream.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

_READ_BYTES = 64 * 1024
"""Read at once from what was decrypted; a record has at most 16 KiB."""


class SecureTransport(asyncio.Protocol):
    """One TLS connection.

    Args:
        raw: the socket's transport; its protocol becomes this object.
        inner: who gets the decrypted bytes, and whether and how the connection ends.
        context: certificates and what is negotiated.
        server_side: False: we are the client, and `server_name` is whom we expect.
        ready: called once the handshake is done, with the protocol that ALPN chose or "". Nothing
            reaches `inner` before.
        failed: called instead, with the reason; the connection is reset by whoever is called.
    """

    __slots__ = (
        "_closing", "_ended", "_failed", "_incoming", "_inner", "_loop", "_outgoing", "_paused",
        "_raw", "_raw_ended", "_ready", "_secured", "_side",
    )  # fmt: skip

    def __init__(
        self,
        raw: asyncio.Transport,
        inner: asyncio.Protocol,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        ready: Callable[[str], None],
        failed: Callable[[str], None],
        server_name: str | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._raw = raw
        self._inner = inner
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._side = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_name
        )
        self._ready = ready
        self._failed = failed
        self._secured = False
        self._paused = False
        self._ended = False
        self._raw_ended = False
        self._closing = False
        raw.set_protocol(self)

    def start(self, data: bytes) -> None:
        """Begin the handshake; `data` came before this layer was there."""
        if data:
            self.data_received(data)
        else:
            self._pump()

    # --- the socket's side -----------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Decrypt, and pass on."""
        self._incoming.write(data)
        self._pump()

    def eof_received(self) -> bool:
        """Take a FIN: an end only behind close_notify. True: the inner side says when to close."""
        self._raw_ended = True
        self._pump()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass the loss on."""
        self._raw_ended = self._closing = True
        if self._secured:
            self._inner.connection_lost(exc)
        else:
            self._fail("the connection was lost during the handshake")
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """Pass on that the peer reads too slowly."""
        if self._secured:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Pass on that the peer has caught up."""
        if self._secured:
            self._inner.resume_writing()

    def _pump(self) -> None:
        """Go on with the handshake, or decrypt what there is as long as the inner side reads."""
        if not self._secured and not self._shake_hands():
            return
        while not (self._paused or self._ended or self._closing):
            try:
                data = self._side.read(_READ_BYTES)
            except ssl.SSLWantReadError:
                self._flush()  # answers of the protocol itself
                break
            except ssl.SSLZeroReturnError:
                data = b""
            except ssl.SSLError as error:
                log.debug("TLS ended: %s", error)
                self._flush()  # the alert that says why
                self._raw.abort()
                return
            if not data:
                self._flush()
                self._ended = True
                self._inner.eof_received()
                return
            self._inner.data_received(data)
        if self._raw_ended and not (self._paused or self._ended or self._closing):
            self._raw.abort()  # cut: what came must not look complete

    def _shake_hands(self) -> bool:
        """Go on with the handshake; True once it is done."""
        if self._closing:
            return False
        try:
            self._side.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            if self._raw_ended:
                self._fail("the peer ended the connection during the handshake")
            return False
        except ssl.SSLError as error:
            self._flush()
            self._fail(reason(error))
            return False
        except ValueError as error:  # of what the ssl module itself finds wrong
            self._fail(str(error))
            return False
        self._secured = True
        self._flush()
        self._ready(self._side.selected_alpn_protocol() or "")
        return True

    def _fail(self, text: str) -> None:
        if not self._secured and not self._ended:
            self._ended = True
            self._failed(text)

    def _flush(self) -> None:
        if self._outgoing.pending and not self._raw.is_closing():
            self._raw.write(self._outgoing.read())

    # --- what the inner protocol calls -----------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Encrypt and send."""
        if self._closing or self._raw.is_closing():
            return
        view = memoryview(data)
        try:
            while view:
                view = view[self._side.write(view) :]
        except ssl.SSLError as error:
            log.debug("TLS ended: %s", error)
            self._raw.abort()
            return
        self._flush()

    def write_eof(self) -> None:
        """Send close_notify and FIN; go on reading."""
        self._notify()
        if not self._raw.is_closing():
            self._raw.write_eof()

    def close(self) -> None:
        """Send what was written, and close_notify; then close."""
        self._notify()
        self._closing = True
        self._raw.close()

    def _notify(self) -> None:
        if self._secured and not self._closing:
            # It has said so before, or would wait for the peer's, which we do not.
            with contextlib.suppress(ssl.SSLError):
                self._side.unwrap()
            self._flush()

    def abort(self) -> None:
        """Close at once."""
        self._closing = True
        self._raw.abort()

    def is_closing(self) -> bool:
        """Whether it was closed."""
        return self._closing or self._raw.is_closing()

    def pause_reading(self) -> None:
        """Pass nothing on for now."""
        self._paused = True
        if not self._raw.is_closing():
            self._raw.pause_reading()

    def resume_reading(self) -> None:
        """Pass on again, beginning with what was decrypted meanwhile."""
        if not self._paused:
            return
        self._paused = False
        if not self._raw.is_closing():
            self._raw.resume_reading()
        self._loop.call_soon(self._resumed)

    def _resumed(self) -> None:
        if not self._closing:
            self._pump()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """As the socket's transport."""
        self._raw.set_write_buffer_limits(high, low)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As the socket's transport."""
        return self._raw.get_extra_info(name, default)


def reason(error: ssl.SSLError) -> str:
    """Return why TLS failed, in OpenSSL's words and without its source files."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"CERTIFICATE_VERIFY_FAILED: {error.verify_message}"
    return error.reason or str(error)
