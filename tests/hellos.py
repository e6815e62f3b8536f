"""ClientHellos for tests: real ones from Python's ssl, and made ones of any shape."""

import ssl
import struct


def real(name=None, protocols=("h2", "http/1.1"), *, highest=None) -> bytes:
    """What OpenSSL sends first for this server name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if highest is not None:
        context.maximum_version = highest
    if protocols:
        context.set_alpn_protocols(list(protocols))
    reading, writing = ssl.MemoryBIO(), ssl.MemoryBIO()
    side = context.wrap_bio(reading, writing, server_hostname=name)
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return writing.read()
    raise AssertionError("a handshake without a server")


def vector(size: int, data: bytes) -> bytes:
    """`data` behind its length in `size` bytes."""
    return len(data).to_bytes(size, "big") + data


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack("!H", kind) + vector(2, data)


def server_name(*names: bytes, kind: int = 0) -> bytes:
    """The server_name extension with these names."""
    return extension(0, vector(2, b"".join(bytes([kind]) + vector(2, name) for name in names)))


def message(*extensions: bytes, version=0x0303, session=b"", suites=b"\x13\x01", tail=b"") -> bytes:
    """The ClientHello message with these extensions; none at all: it ends before them."""
    body = struct.pack("!H", version) + bytes(32) + vector(1, session) + vector(2, suites)
    body += vector(1, b"\x00")
    if extensions:
        body += vector(2, b"".join(extensions))
    return b"\x01" + vector(3, body + tail)


def records(data: bytes, size: int = 1 << 14, *, kind=22, version=0x0301) -> bytes:
    """`data` in handshake records of at most so many bytes."""
    return b"".join(
        struct.pack("!BHH", kind, version, len(part)) + part
        for part in (data[start : start + size] for start in range(0, len(data), size))
    )


def made(*extensions: bytes, **parts) -> bytes:
    """A whole hello in one record."""
    return records(message(*extensions, **parts))


def retry_request() -> bytes:
    """A HelloRetryRequest (RFC 8446 4.1.4)."""
    random = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
    body = b"\x03\x03" + random + vector(1, b"") + b"\x13\x01\x00" + vector(2, b"")
    return records(b"\x02" + vector(3, body), version=0x0303)
