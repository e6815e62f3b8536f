"""TLS rules through the whole firewall: applied, enforced, explained, and what is missing told."""

import json
import ssl

import pytest
from evidence import flow
from rules import policy, ports
from tls_world import NAME, PORT, TlsServer
from traffic import DEADLINE_S, eventually

from policytest.authority import Authority

pytestmark = pytest.mark.needs("tproxy", "socket", "connmark", "curl")


@pytest.fixture
def running(lab, bartizan, tmp_path):
    """a asks b, which serves two names; `secrets` is where bartizan looks for them."""
    made = lab(a="app=a", b="app=b")
    made.secrets, made.authority = tmp_path / "secrets", Authority()
    made.secrets.mkdir()
    folder = made.authority.secret(tmp_path / "server", NAME, "other.example")
    made.trusted = tmp_path / "trusted.pem"
    made.trusted.write_bytes(made.authority.certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    made.firewall = bartizan(made, {"proxy": {"secrets_dir": str(made.secrets)}})
    server = TlsServer(made.host("b").listen(PORT), context)
    yield made
    server.close()


def curl(made, url, *options):
    """Exit status and HTTP status of a request by a."""
    done = made.host("a").run(
        ["curl", "-sS", "--max-time", DEADLINE_S, "--cacert", made.trusted, *options,
         "-o", "/dev/null", "--connect-to", f"::{made.host('b').address4}:{PORT}",
         "-w", "%{http_code}", url]
    )  # fmt: skip
    return done.returncode, done.stdout


def rule(**more):
    """a's egress to b at 443."""
    entry = {"toEndpoints": [{"matchLabels": {"app": "b"}}], **ports(f"{PORT}/TCP")}
    entry["toPorts"][0] |= more
    return policy("app=a", egress=[entry])


def test_names_are_enforced_recorded_and_explained(running):
    firewall = running.firewall
    firewall.apply(rule(serverNames=["*.example"]))
    assert curl(running, f"https://{NAME}/") == (0, "200")
    firewall.apply(rule(serverNames=[NAME]))
    assert curl(running, "https://other.example/") == (35, "000")

    def refused():
        lines = firewall.cli("observe", "--protocol", "tls", "--verdict", "DROPPED", "-o", "json")
        return [json.loads(line)["flow"] for line in lines.stdout.splitlines()]

    (record,) = eventually(refused, "the record of the refused name")
    assert record["extensions"]["value"]["server_name"] == "other.example"
    why = firewall.cli("why", "--last-drop").stdout
    assert f"serverName wanted {NAME}, found other.example" in why
    assert "add - other.example under serverNames" in why
    traced = firewall.cli(
        "policy", "trace", "--from", "default/a", "--to", f"default/b:{PORT}/TCP", "--sni", NAME
    )
    assert traced.returncode == 0, traced.stdout
    assert "which lets every byte pass here" in traced.stdout


def test_a_secret_that_is_missing_is_an_error_of_the_status_until_it_is_there(running):
    firewall = running.firewall

    def inside(method):
        return rule(
            terminatingTLS={"secret": {"namespace": "web", "name": "inside"}},
            originatingTLS={"secret": {"namespace": "web", "name": "outside"}},
            rules={"http": [{"method": method}]},
        )

    warnings = firewall.apply(inside("GET"))["problems"]
    assert ["secret web/inside: " in warnings[0], "secret web/outside: " in warnings[1]] == [
        True
    ] * 2
    assert curl(running, f"https://{NAME}/") == (35, "000")
    status = firewall.cli("status")
    assert status.returncode == 1
    assert "secret web/inside: there is no folder" in status.stdout
    assert "secret web/outside: there is no folder" in status.stdout
    running.authority.secret(running.secrets / "web" / "inside", NAME)
    running.authority.secret(running.secrets / "web" / "outside", ca=True)
    assert firewall.apply(inside("GET|HEAD"))["problems"] == []
    assert curl(running, f"https://{NAME}/") == (0, "200")
    assert curl(running, f"https://{NAME}/", "-X", "PUT") == (0, "403")
    assert firewall.cli("status").returncode == 0
    socket = firewall.run_dir / "proxy-admin.sock"
    certs = running.node.run(["curl", "-s", "--unix-socket", socket, "http://localhost/certs"])
    chains = [row["cert_chain"] for row in json.loads(certs.stdout)["certificates"]]
    (shown,) = [one for chain in chains for one in chain]
    assert shown["subject_alt_names"] == [{"dns": NAME}]
    assert shown["days_until_expiration"] == "29"
    flow(firewall, matches=lambda record: "https://" in str(record.get("l7")), verdict="DROPPED")
