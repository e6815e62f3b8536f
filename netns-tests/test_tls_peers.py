"""TLS with what people have at the ends: nginx as server, `openssl s_client` and curl."""

import pytest
from tls_world import NAME, PORT, TlsWorld, inside_row, names_row
from traffic import eventually

from firewall.policy.snapshot import HttpRuleRow

pytestmark = pytest.mark.needs("tproxy", "socket", "curl", "nginx")

PUBLIC = HttpRuleRow(method="GET", path="/public/.*")
REQUEST = f"GET /public/a HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n"
LOG = "%RESPONSE_CODE% %UPSTREAM_TRANSPORT_FAILURE_REASON%"

CONFIGURATION = """
user root; daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    log_format asked "$server_protocol $ssl_server_name $request_uri";
    access_log {folder}/asked.log asked;
    client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
    uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
    server {{
        listen {port} ssl http2;
        ssl_certificate {folder}/tls.crt; ssl_certificate_key {folder}/tls.key;
        location / {{ return 200 "nginx here\\n"; }}
    }}
}}
"""


class Peers(TlsWorld):
    """The world with nginx at the server's port."""

    def nginx(self, *names, days=(-1, 30)):
        folder = self.folder / "nginx"
        self.public.secret(folder, *names, days=days)
        conf = folder / "nginx.conf"
        conf.write_text(CONFIGURATION.format(folder=folder, port=PORT), encoding="ascii")
        self.server.start(["nginx", "-c", conf, "-e", folder / "error.log"])
        eventually((folder / "pid").exists, "nginx runs")
        eventually(
            lambda: self.server.run(["ss", "-Hltn", f"sport = :{PORT}"]).stdout, "nginx listens"
        )

    def asked(self) -> list[str]:
        """What nginx was asked: protocol, server name, target."""
        path = self.folder / "nginx" / "asked.log"
        return path.read_text(encoding="ascii").splitlines() if path.exists() else []

    def s_client(self, *options, say=REQUEST, name=NAME):
        """What `openssl s_client` saw and was answered."""
        server_name = ["-servername", name] if name else ["-noservername"]
        # It goes at the end of its input, or where commands such as R are heard, at Q.
        waits = ["-ign_eof"] if len(say) > 2 else []
        done = self.client.run(
            ["openssl", "s_client", "-connect", f"{self.server.address4}:{PORT}",
             "-CAfile", self.trusted, "-verify_hostname", NAME, *server_name, *options, *waits],
            20, stdin=say,
        )  # fmt: skip
        return done.stdout + done.stderr


@pytest.fixture
def peers(lab, tmp_path):
    def made(*rows):
        return Peers(lab, tmp_path, *rows, options=("--access-log-format", LOG))

    return made


def test_openssl_and_nginx_meet_through_the_proxy(peers):
    here = peers(inside_row(PUBLIC))
    with here.live:
        here.nginx(NAME)
        for options, alpn in (
            (("-alpn", "http/1.1"), "ALPN protocol: http/1.1"),
            (("-alpn", "h3,http/1.1"), "ALPN protocol: http/1.1"),
            (("-tls1_2",), "No ALPN negotiated"),
            (("-tls1_3",), "No ALPN negotiated"),
        ):
            said = here.s_client(*options)
            assert "Verify return code: 0 (ok)" in said, said
            assert alpn in said, said
            assert "nginx here" in said, said
        assert "ALPN protocol: h2" in here.s_client("-alpn", "h2,http/1.1", say="")
        denied = here.s_client(say=REQUEST.replace("/public/a", "/admin"))
        assert "403 Forbidden" in denied
        assert "421 Misdirected" in here.s_client(say=REQUEST.replace(NAME, "other.example"))
        wanted = [f"HTTP/1.1 {NAME} /public/a"] * 4
        eventually(lambda: here.asked() == wanted, "all four stand in nginx's log, and no other")


def test_each_client_gets_the_version_that_it_speaks_at_both_ends(peers):
    here = peers(inside_row(PUBLIC))
    with here.live:
        here.nginx(NAME)
        for version, spoken in (("--http1.1", "1.1"), ("--http2", "2")):
            code, out = here.curl(f"https://{NAME}/public/a", version)
            assert (code, out.split()) == (0, ["nginx", "here", "200", spoken])
        eventually(lambda: len(here.asked()) == 2, "both stand in nginx's log")
        assert [line.split()[0] for line in here.asked()] == ["HTTP/1.1", "HTTP/2.0"]


def test_what_is_not_offered_is_refused(peers):
    """Old versions, and another handshake inside the first."""
    here = peers(inside_row(PUBLIC))
    with here.live:
        here.nginx(NAME)
        old = here.s_client("-tls1_1", "-cipher", "ALL:@SECLEVEL=0")
        assert "nginx here" not in old
        assert "alert protocol version" in old, old
        renegotiated = here.s_client("-tls1_2", say="R\n")
        assert "RENEGOTIATING" in renegotiated
        assert "nginx here" not in renegotiated
        assert here.asked() == []


@pytest.mark.parametrize(
    ("names", "days", "trusted", "reason"),
    [
        ((NAME,), (-9, -2), True, "certificate has expired"),
        (("other.example",), (-1, 30), True, "Hostname mismatch"),
        ((NAME,), (-1, 30), False, "unable to get local issuer certificate"),
    ],
)
def test_a_server_that_fails_is_503_and_the_log_says_why(peers, names, days, trusted, reason):
    here = peers(inside_row(PUBLIC))
    if not trusted:
        here.public = type(here.public)("another")
    with here.live:
        here.nginx(*names, days=days)
        code, out = here.curl(f"https://{NAME}/public/a")
        assert (code, out.split()[-2]) == (0, "503")
        (line,) = eventually(here.lines, "its line in the log")
        assert line.startswith("503 ")
        assert reason in line
        assert here.asked() == []


def test_names_pass_to_nginx_with_its_own_certificate(peers):
    here = peers(names_row(NAME))
    with here.live:
        here.nginx(NAME)
        said = here.s_client("-alpn", "h2,http/1.1", say="")
        assert "Verify return code: 0 (ok)" in said
        assert "issuer=CN = public" in said, said
        assert "nginx here" in here.s_client()
        assert "nginx here" not in here.s_client(name="other.example")
        assert "nginx here" not in here.s_client(name="")
        names = lambda: [line.split()[1] for line in here.asked()]
        eventually(lambda: names() == [NAME], "the request stands in nginx's log")
