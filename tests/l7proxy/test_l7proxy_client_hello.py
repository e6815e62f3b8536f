"""Any bytes give a decision, cutting changes nothing, and no hello has two readings."""

import ssl
from contextlib import suppress

import hellos
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from l7proxy.client_hello import ClientHello, HelloReader, HelloRefused, NotTls

LIMIT = 16 * 1024
ALLOWED = hellos.server_name(b"allowed.example")


def read(data, *cuts, limit=LIMIT):
    """What the reader says: a hello, None, or the text of the refusal; fed piece by piece."""
    reader = HelloReader(limit)
    ends = [*sorted(cut for cut in cuts if cut < len(data)), len(data)]
    start, found = 0, None
    try:
        for end in ends:
            found = reader.feed(data[start:end])
            if found is not None:
                return found
            start = end
    except HelloRefused as refused:
        return f"{type(refused).__name__}: {refused}"
    return found


def refused(data, **limits):
    found = read(data, **limits)
    return found if isinstance(found, str) else ""


@pytest.mark.parametrize("highest", [None, ssl.TLSVersion.TLSv1_2], ids=["1.3", "1.2"])
@pytest.mark.parametrize("name", ["a.example", "xn--bcher-kva.example", "localhost", "_a.b-c.d"])
def test_what_openssl_sends_is_read(name, highest):
    hello = hellos.real(name, highest=highest)
    assert read(hello) == ClientHello(name, (b"h2", b"http/1.1"), False, len(hello))


def test_upper_case_is_the_same_name():
    assert read(hellos.real("Www.A.Example")).server_name == "www.a.example"


@pytest.mark.parametrize("name", [None, "192.0.2.1", "2001:db8::1"])
def test_clients_that_name_nobody_have_no_name(name):
    """OpenSSL sends no server_name for an address."""
    assert read(hellos.real(name)).server_name == ""


def test_what_scapy_builds_is_read():
    extensions = pytest.importorskip("scapy.layers.tls.extensions")
    handshake = pytest.importorskip("scapy.layers.tls.handshake")
    record = pytest.importorskip("scapy.layers.tls.record")
    name = extensions.ServerName(servername=b"scapy.example")
    hello = handshake.TLSClientHello(
        ciphers=[0x1301], ext=[extensions.TLS_Ext_ServerName(servernames=[name])]
    )
    data = bytes(record.TLS(version=0x0301, msg=[hello]))
    assert read(data).server_name == "scapy.example"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 64, 500])
def test_records_of_any_size_carry_the_same_hello(size):
    whole = hellos.real("cut.example")
    data = hellos.records(whole[5:], size)
    assert read(data) == read(whole)._replace(size_bytes=len(data))
    assert read(data, *range(len(data))).server_name == "cut.example"


@given(st.data())
def test_cutting_anywhere_changes_nothing(data):
    hello = data.draw(st.sampled_from(SAMPLES))
    if data.draw(st.booleans()):
        hello = hellos.records(hello[5:], data.draw(st.integers(1, 300)))
    position = data.draw(st.integers(0, len(hello) - 1))
    if data.draw(st.booleans()):
        hello = hello[:position] + data.draw(st.binary(max_size=4)) + hello[position + 1 :]
    cuts = data.draw(st.lists(st.integers(0, len(hello)), max_size=8))
    assert read(hello, *cuts) == read(hello)


SAMPLES = (
    hellos.real("a.example"),
    hellos.real(None, highest=ssl.TLSVersion.TLSv1_2),
    hellos.made(ALLOWED),
    hellos.made(),
)


@given(st.binary(max_size=600))
def test_any_bytes_give_a_decision(data):
    for given_bytes in (data, b"\x16\x03\x01" + data, hellos.records(b"\x01" + data)):
        assert isinstance(read(given_bytes), ClientHello | str | None)


@given(st.binary(max_size=300))
def test_any_body_gives_a_decision(body):
    """A message that is whole is never waited for."""
    found = read(hellos.records(b"\x01" + hellos.vector(3, body)))
    assert isinstance(found, ClientHello | str)


@given(st.integers(0, 400))
def test_a_part_of_a_hello_is_waited_for(size):
    hello = hellos.real("a.example")
    assert read(hello[: min(size, len(hello) - 1)]) is None


def test_what_follows_is_kept_and_not_read():
    reader = HelloReader(LIMIT)
    hello = hellos.made(ALLOWED)
    assert reader.feed(hello + b"\x14\x03\x03rest").size_bytes == len(hello)
    assert reader.data == hello + b"\x14\x03\x03rest"


def test_a_hello_without_extensions_names_nobody():
    assert read(hellos.made()) == ClientHello("", (), False, len(hellos.made()))


@pytest.mark.parametrize("kind", [0xFE0D, 0xFFCE])
def test_an_encrypted_hello_is_seen(kind):
    assert read(hellos.made(ALLOWED, hellos.extension(kind, b"secret"))).encrypted


NAME_CASES = {
    "empty": b"",
    "ip4": b"192.0.2.1",
    "ip4-number": b"3221225985",
    "ip4-hex": b"0xC0000201",
    "ip6": b"2001:db8::1",
    "trailing-dot": b"allowed.example.",
    "leading-dot": b".allowed.example",
    "empty-label": b"allowed..example",
    "dot": b".",
    "nul": b"allowed.example\x00.evil.example",
    "space": b"allowed example",
    "slash": b"allowed.example/",
    "port": b"allowed.example:443",
    "newline": b"allowed.example\n",
    "non-ascii": "b\u00fccher.example".encode(),
    "star": b"*.example",
    "label-64": b"a" * 64 + b".example",
    "name-254": b".".join([b"a" * 49] * 5) + b".example",
    "name-300": b"a." * 150 + b"a",
    "hyphen": b"-a.example",
}


@pytest.mark.parametrize("name", NAME_CASES.values(), ids=NAME_CASES)
def test_a_name_that_is_no_host_name_is_refused(name):
    found = read(hellos.made(hellos.server_name(name)))
    assert isinstance(found, str)
    assert "name" in found or "empty" in found


@pytest.mark.parametrize("name", [b"a" * 63 + b".example", b".".join([b"a" * 61] * 4) + b".abcde"])
def test_the_longest_names_are_read(name):
    assert read(hellos.made(hellos.server_name(name))).server_name == name.decode()


INVALID = {
    "two names": hellos.made(hellos.server_name(b"allowed.example", b"evil.example")),
    "the same name twice": hellos.made(hellos.server_name(b"a.example", b"a.example")),
    "two server_name extensions": hellos.made(ALLOWED, hellos.server_name(b"evil.example")),
    "two of another extension": hellos.made(hellos.extension(99, b""), hellos.extension(99, b"")),
    "name of another type": hellos.made(hellos.server_name(b"allowed.example", kind=1)),
    "no name in the list": hellos.made(hellos.extension(0, b"\x00\x00")),
    "empty server_name": hellos.made(hellos.extension(0, b"")),
    "bytes behind the list": hellos.made(
        hellos.extension(0, hellos.vector(2, b"\x00\x00\x01a") + b"x")
    ),
    "list too long": hellos.made(hellos.extension(0, b"\x00\x09\x00\x00\x01a")),
    "name too long": hellos.made(hellos.extension(0, hellos.vector(2, b"\x00\x00\x09a"))),
    "extension too long": hellos.made(b"\x00\x00\x00\x50\x00"),
    "bytes behind the extensions": hellos.made(ALLOWED, tail=b"x"),
    "one byte for extensions": hellos.made(tail=b"x"),
    "session id of 33 bytes": hellos.made(ALLOWED, session=bytes(33)),
    "odd cipher suites": hellos.made(ALLOWED, suites=b"\x13\x01\x00"),
    "no cipher suites": hellos.made(ALLOWED, suites=b""),
    "body's version 2": hellos.made(ALLOWED, version=0x0203),
    "record's version 2": hellos.records(hellos.message(ALLOWED), version=0x0203),
    "record without bytes": b"\x16\x03\x01\x00\x00" + hellos.made(ALLOWED),
    "record of 16385 bytes": b"\x16\x03\x01\x40\x01",
    "ServerHello": hellos.records(b"\x02" + hellos.message(ALLOWED)[1:]),
    "alert inside": hellos.records(hellos.message(ALLOWED)[:20]) + b"\x15\x03\x01\x00\x02\x01\x00",
    "second message in the record": hellos.records(hellos.message(ALLOWED) * 2),
    "ALPN without names": hellos.made(hellos.extension(16, b"\x00\x00")),
    "ALPN with an empty name": hellos.made(hellos.extension(16, b"\x00\x02\x00\x00")),
    "length of the message beyond the limit": hellos.records(b"\x01\x01\x00\x00" + bytes(100)),
}


@pytest.mark.parametrize("data", INVALID.values(), ids=INVALID)
def test_a_hello_with_no_single_reading_is_refused(data):
    assert refused(data).startswith("HelloRefused: ")


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10",  # SSLv2's hello
        b"\x15\x03\x01\x00\x02\x01\x00",
        b"\x17\x03\x03\x00\x01\x00",
        b"\x00",
    ],
)
def test_other_protocols_are_told_apart_by_the_first_byte(data):
    assert refused(data).startswith("NotTls: ")
    with pytest.raises(NotTls):
        HelloReader(LIMIT).feed(data[:1])


def test_the_size_is_bounded_with_the_records():
    padded = hellos.message(ALLOWED, hellos.extension(21, bytes(3000)))
    data = hellos.records(padded, 1)
    assert read(data, limit=len(data)).server_name == "allowed.example"
    assert "too long" in refused(data, limit=len(data) - 1)
    assert "too long" in refused(data[:-1], limit=len(data) - 1)


@pytest.mark.parametrize("position", range(4))
def test_a_record_may_end_inside_the_message_header_and_inside_the_name(position):
    message = hellos.message(ALLOWED)
    inside = message.index(b"allowed") + 3 if position == 3 else position + 1
    data = hellos.records(message[:inside]) + hellos.records(message[inside:])
    assert read(data).server_name == "allowed.example"


def name_for_openssl(data):
    """The server name that OpenSSL's server reads: None = it never came to ask for one."""
    seen = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda _side, name, _context: seen.append(name or "")
    reading, writing = ssl.MemoryBIO(), ssl.MemoryBIO()
    reading.write(data)
    side = context.wrap_bio(reading, writing, server_side=True)
    with suppress(ssl.SSLError):
        side.do_handshake()
    return seen[0] if seen else None


@pytest.mark.parametrize("name", ["a.example", "B.example", None])
def test_openssl_as_a_witness_reads_the_name(name):
    assert name_for_openssl(hellos.real(name)) == (name or "")


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_openssl_never_reads_another_name_than_the_one_that_was_judged(data):
    """Whatever is done to a hello: who lets it pass has read what a server will read."""
    hello = bytearray(data.draw(st.sampled_from(SAMPLES)))
    spots = st.one_of(st.integers(0, len(hello) - 1), st.sampled_from(near_the_name(hello)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = min(data.draw(spots), len(hello) - 1)
        change = data.draw(st.sampled_from(["set", "insert", "delete", "double"]))
        if change == "set":
            hello[at] = data.draw(st.integers(0, 255))
        elif change == "insert":
            hello[at:at] = data.draw(st.binary(min_size=1, max_size=3))
        elif change == "delete":
            del hello[at]
        else:
            hello[at:at] = hello[at : at + data.draw(st.integers(1, 40))]
    found = read(bytes(hello))
    if not isinstance(found, ClientHello):
        return
    seen = name_for_openssl(bytes(hello))
    if seen is not None:
        event("both read it")
        assert seen.lower() == found.server_name


def near_the_name(hello):
    """Where the lengths and the name of the first sample stand, if it has them."""
    at = bytes(hello).find(b".example")
    return list(range(max(0, at - 12), at + 9)) if at > 0 else [0]
