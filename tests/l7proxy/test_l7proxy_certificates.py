"""Secrets become TLS contexts, or a sentence about what is wrong."""

import ssl

import msgspec
import pytest

from firewall.policy.snapshot import L7Row, Snapshot, TlsContextRow
from l7proxy.certificates import CertificateError, Certificates
from policytest.authority import Authority

ROW = TlsContextRow("ns", "web")


@pytest.fixture
def folder(tmp_path):
    Authority().secret(tmp_path / "ns" / "web", "a.example", ca=True)
    return tmp_path


def snapshot(*contexts):
    return Snapshot(l7=tuple(L7Row("http", terminating_tls=row) for row in contexts))


def test_towards_clients_ca_crt_alone_asks_for_no_certificate(folder):
    """Issuers such as cert-manager put it into every secret."""
    context = Certificates(folder).towards_clients(ROW, http=True)
    assert context.verify_mode is ssl.CERT_NONE
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.num_tickets == 0


def test_towards_clients_a_named_authority_asks_for_one(folder):
    row = msgspec.structs.replace(ROW, trusted_ca="ca.crt")
    assert Certificates(folder).towards_clients(row, http=False).verify_mode is ssl.CERT_REQUIRED


def test_towards_servers_names_and_chains_are_always_checked(folder):
    (folder / "ns" / "empty").mkdir()
    for row in (ROW, TlsContextRow("ns", "empty")):
        context = Certificates(folder).towards_servers(row, ("h2",))
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname
        assert not context.hostname_checks_common_name
    with_ca = Certificates(folder).towards_servers(ROW, ())
    assert len(with_ca.get_ca_certs()) == 1  # and none of the system's


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (TlsContextRow("ns", "absent"), "there is no folder"),
        (TlsContextRow("..", "web"), "no name of a secret"),
        (TlsContextRow("ns", "../ns/web"), "no name of a secret"),
        (TlsContextRow("ns", "web", certificate="../web/tls.crt"), "no name of an item"),
        (TlsContextRow("ns", "web", certificate=".."), "no name of an item"),
        (TlsContextRow("ns", "web", private_key="other.key"), "there is no "),
        (TlsContextRow("ns", "web", trusted_ca="other.crt"), "there is no "),
    ],
)
def test_what_is_missing_or_leads_elsewhere_makes_no_context(folder, row, text):
    certificates = Certificates(folder)
    with pytest.raises(CertificateError, match=text):
        certificates.towards_clients(row, http=True)
    if row.certificate != "..":
        with pytest.raises(CertificateError, match=text):
            certificates.towards_servers(row, ())


@pytest.mark.parametrize("item", ["tls.crt", "tls.key"])
def test_a_broken_item_makes_no_context_and_a_mended_one_does(folder, item):
    certificates = Certificates(folder)
    path = folder / "ns" / "web" / item
    good = path.read_bytes()
    assert certificates.install(snapshot(ROW)) == []
    path.write_bytes(b"-----BEGIN NONSENSE-----")
    assert certificates.towards_clients(ROW, http=True)  # until the next snapshot
    (problem,) = certificates.install(snapshot(ROW))
    assert problem.startswith("secret ns/web: ")
    with pytest.raises(CertificateError):
        certificates.towards_clients(ROW, http=True)
    path.write_bytes(good)
    assert certificates.install(snapshot(ROW)) == []


def test_an_encrypted_key_is_refused_and_nobody_is_asked(folder):
    from cryptography.hazmat.primitives import serialization

    path = folder / "ns" / "web" / "tls.key"
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(CertificateError):
        Certificates(folder).towards_clients(ROW, http=True)


def test_a_context_is_made_again_only_if_a_file_is_another(folder):
    certificates = Certificates(folder)
    certificates.install(snapshot(ROW))
    first = certificates.towards_clients(ROW, http=True)
    certificates.install(snapshot(ROW))
    assert certificates.towards_clients(ROW, http=True) is first
    Authority().secret(folder / "ns" / "web", "b.example", "c.example")
    certificates.install(snapshot(ROW))
    assert certificates.towards_clients(ROW, http=True) is not first


def test_every_problem_of_a_snapshot_is_told_once(folder):
    absent = TlsContextRow("ns", "absent")
    assert len(Certificates(folder).install(snapshot(ROW, absent, absent))) == 1
    assert Certificates(None).install(snapshot(ROW)) == [
        "secret ns/web: no folder of secrets is configured"
    ]
