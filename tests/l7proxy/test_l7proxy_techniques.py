"""Ways to slip past a policy by HTTP that are known from research and CVEs, one line each.

Every case is played whole and byte by byte against the core; a strict and a lenient observer
(`http_observer`) read what the server was sent. Outcomes: "F" forwarded and answered, "403" denied
by policy, "400" refused for form and closed before a server is asked, "cut" refused after the head
went out, so that the server never gets a whole request.
"""

import pytest
from http_observer import Observer
from http_played import Played
from http_transcript import Script, snapshot

HOST = b"Host: s\r\n"
ADMIN = b"GET /admin HTTP/1.1\r\nHost: s\r\n\r\n"


def read(server, data):
    server.raw += data
    return server.complete()


def outcome_of(played):
    answers = [answer for answer in played.answers if answer != "100"]
    if answers and answers[-1] in ("400", "417", "426", "431", "505") and played.ended:
        complete = sum(server.answered_count for server in played.servers)
        answers[-1] = "400" if len(played.servers) == complete else "cut"
    return " ".join(answers)


def get(target):
    return b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n"


def message(fields, body=b""):
    return b"GET /public/a HTTP/1.1\r\n" + HOST + fields + b"\r\n" + body


CHUNKED = b"Transfer-Encoding: chunked\r\n"

# RFC 3986 5.2.4 and 6.2.2; Envoy path_utility; CVE-2026-73551; RFC 3629; IIS %u; RFC 9112 3.2
TARGETS = {
    b"/public/..;/admin": "400", b"/public/.;/a": "400", b"/public/%2e%2e;/admin": "400",
    b"/public/..%3b/admin": "400", b"/public/..%20/admin": "400", b"/public/..%09/admin": "400",
    b"/public/%u002e%u002e/admin": "400", b"/public/%c0%ae%c0%ae/admin": "400",
    b"/public/%e0%80%ae/x": "400", b"/public/%f0%80%80%ae/x": "400",
    b"/public/%f8%80%80%80%ae/x": "400", b"/public/%2f../admin": "400",
    b"/public/\\..\\admin": "400", b"/public/%25%32%65%25%32%65/admin": "400",
    b"/public/%2525252e/a": "400", b"/public/%": "400", b"/public/%2": "400",
    b"/public/%zz": "400", b"//admin": "403", b"/publi%63/../admin": "403",
    b"/public/.%2e/admin": "403", b"/public/%2e./admin": "403", b"/./public/a": "F",
    b"/../../public/a": "F", b"/public/a?x=/../../admin": "F", b"/public/a#": "400",
    b"/public/a?x#y": "400", b"/public/a;/../../admin": "403",
    b"/public/http://evil/../../../admin": "403", b"*": "400", b"s:80": "400", b"public/a": "400",
    b"http://s/public/a": "F", b"HTTP://S/public/a": "F", b"http://s:80/public/a": "400",
    b"http://t/public/a": "400", b"http://u@s/public/a": "400", b"http:///public/a": "400",
    b"http://s": "F", b"http://s?x": "403", b"http://s/public/../admin": "403",
    b"http://s\\@t/public/a": "400", b"https://s/public/a": "400", b"ws://s/public/a": "400",
    b"http:/public/a": "400", b"//s/public/a": "403",
}  # fmt: skip

# RFC 9112 3.2, RFC 3986 3.2.2
HOSTS = {
    b"Host: s\r\nHost: s\r\n": "400", b"Host: s, t\r\n": "400", b"Host: \r\n": "400",
    b"Host:\ts\t\r\n": "F", b"HOST: s.\r\n": "F", b"Host: s:\r\n": "400",
    b"Host: s:65536\r\n": "400", b"Host: s:80:80\r\n": "400", b"Host: [::1]:80\r\n": "F",
    b"Host: ::1\r\n": "400", b"Host: [::1%25eth0]\r\n": "400", b"Host: [::1\r\n": "400",
    b"Host: u@s\r\n": "400", b"Host: s/public\r\n": "400", b"Host: s%00\r\n": "400",
    b"Host: b\xc3\xbccher\r\n": "400", b"Host: s\xa0\r\n": "400", b"Host: s\\t\r\n": "400",
    b"Host: [v1.x]\r\n": "400", b" Host: s\r\n": "400", b"Host: s\r\n t\r\n": "400",
    b"X: y\r\n": "400",
}  # fmt: skip

# RFC 9112 2.2, 2.3, 3
LINES = {
    b"GET /public/a HTTP/1.2": "400", b"GET /public/a HTTP/1.10": "400",
    b"GET /public/a HTTP/01.1": "400", b"GET /public/a http/1.1": "400",
    b"GET /public/a HTTP/1.1 ": "400", b"GET /public/a HTTP/1.1\r": "400",
    b"GET /public/a ICAP/1.1": "400", b"GET /public/a": "400", b"PRI * HTTP/2.0": "400",
    b"CONNECT s:80 HTTP/1.1": "403", b"CONNECT /public/a HTTP/1.1": "403",
    b"OPTIONS * HTTP/1.1": "403", b"get /public/a HTTP/1.1": "403",
    b"HEAD /public/a HTTP/1.1": "403", b"\xef\xbb\xbfGET /public/a HTTP/1.1": "400",
    b"\r\n\r\nGET /public/a HTTP/1.1": "400", b"X GET /public/a HTTP/1.1": "400",
}  # fmt: skip

# RFC 9112 6 and 7; http-garden; CL.0, TE.0, TERM.EXT, Funky chunks (2024-2025), 0.CL and Expect
# (2025); CVE-2025-22871, CVE-2025-43859, CVE-2025-55315
FRAMINGS = {
    "CL.0": (b"Content-Length: %d\r\n" % len(ADMIN), ADMIN, "F"),
    "zeroes before a length": (b"Content-Length: 003\r\n", b"abc" + ADMIN, "F 403"),
    "length list": (b"Content-Length: 3, 3\r\n", b"abc", "400"),
    "length twice": (b"Content-Length: 3\r\nContent-Length: 3\r\n", b"abc", "400"),
    "length in Arabic digits": (b"Content-Length: \xd9\xa3\r\n", b"abc", "400"),
    "length named by underscore": (b"Content_Length: 5\r\n", b"", "400"),
    "coding named by underscore": (b"Transfer_Encoding: chunked\r\n", b"0\r\n\r\n" + ADMIN, "400"),
    "length named by a dot": (b"Content.Length: 5\r\n", b"", "400"),
    "coding named by a bar": (b"transfer|encoding: chunked\r\n", b"0\r\n\r\n" + ADMIN, "400"),
    "both framings": (CHUNKED + b"Content-Length: 4\r\n", b"0\r\n\r\n" + ADMIN, "400"),
    "identity after chunked": (b"Transfer-Encoding: chunked, identity\r\n", ADMIN, "400"),
    "identity alone": (b"Transfer-Encoding: identity\r\n", ADMIN, "400"),
    "vertical tab": (b"Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n", "400"),
    "coding with parameter": (b"Transfer-Encoding: chunked;q=1\r\n", b"0\r\n\r\n", "400"),
    "coding in quotes": (b'Transfer-Encoding: "chunked"\r\n', b"0\r\n\r\n", "400"),
    "no coding": (b"Transfer-Encoding: \r\n", ADMIN, "400"),
    "comma after coding": (b"Transfer-Encoding: chunked,\r\n", b"0\r\n\r\n", "400"),
    "coding in any case": (b"Transfer-Encoding: chunKed\r\n", b"0\r\n\r\n" + ADMIN, "F 403"),
    "hidden behind CR": (b"X: y\rTransfer-Encoding: chunked\r\n", b"0\r\n\r\n", "400"),
    "hidden behind LF": (b"X: y\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n", "400"),
    "extension": (CHUNKED, b"3;a=b\r\nabc\r\n0\r\n\r\n" + ADMIN, "F 403"),
    "extension ended by LF": (CHUNKED, b"3;a\nabc\r\n0\r\n\r\n" + ADMIN, "cut"),
    "extension with CR": (CHUNKED, b"3;a\rb\r\nabc\r\n0\r\n\r\n" + ADMIN, "cut"),
    "extension quoted over lines": (CHUNKED, b'3;a="\r\nabc\r\n0\r\n\r\n', "cut"),
    "space after size": (CHUNKED, b"3 \r\nabc\r\n0\r\n\r\n", "cut"),
    "size in C": (CHUNKED, b"0x3\r\nabc\r\n0\r\n\r\n", "cut"),
    "size of zeroes": (CHUNKED, b"0000000000003\r\nabc\r\n0\r\n\r\n", "cut"),
    "chunk spills": (CHUNKED, b"3\r\nabcd\n0\r\n\r\n", "cut"),
    "chunk ended by LF": (CHUNKED, b"3\r\nabc\n0\r\n\r\n", "cut"),
    "trailer of framing": (CHUNKED, b"0\r\nContent-Length: 5\r\n\r\n" + ADMIN, "F 403"),
    "request as trailer": (CHUNKED, b"0\r\nGET /admin HTTP/1.1\r\n\r\n", "cut"),
    "last line ended by LF": (CHUNKED, b"0\r\n\n" + ADMIN, "cut"),
    "expect": (b"Expect: 100-Continue\r\nContent-Length: 3\r\n", b"abc" + ADMIN, "F 403"),
    "expect something else": (b"Expect: y 100-continue\r\n", ADMIN, "400"),
    "expect twice": (b"Expect: 100-continue\r\nExpect: 100-continue\r\n", b"", "400"),
    "Connection names Host": (b"Connection: host\r\n", b"", "400"),
    "Connection names framing": (b"Connection: close, Transfer-Encoding\r\n", b"", "400"),
    "upgrade to h2c": (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
        ADMIN,
        "F 403",
    ),
    "upgrade without a key": (b"Connection: upgrade\r\nUpgrade: websocket\r\n", ADMIN, "403"),
    "upgrade not named": (b"Upgrade: websocket\r\n", ADMIN, "F 403"),
}

CASES = (
    *((str(target), get(target), outcome) for target, outcome in TARGETS.items()),
    *(
        (str(fields), b"GET /public/a HTTP/1.1\r\n" + fields + b"\r\n", outcome)
        for fields, outcome in HOSTS.items()
    ),
    *((str(line), line + b"\r\n" + HOST + b"\r\n", outcome) for line, outcome in LINES.items()),
    *((name, message(*parts[:2]), parts[2]) for name, parts in FRAMINGS.items()),
)


@pytest.mark.parametrize(("data", "outcome"), [pytest.param(*c[1:], id=c[0]) for c in CASES])
def test_a_technique_gets_nothing_past_the_policy(data, outcome):
    for segments in ([data], [bytes([byte]) for byte in data]):
        played = Played(Script(snapshot()), segments, Observer, read)
        assert outcome_of(played) == outcome
        assert [fault for server in played.servers for fault in server.faults()] == []
