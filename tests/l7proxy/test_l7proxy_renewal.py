"""Secrets that are replaced while rules use them."""

import pytest

from firewall.policy.snapshot import L7Row, Snapshot, TlsContextRow
from l7proxy.certificates import CertificateError, Certificates
from l7proxy.renewal import LOOK_S, Renewal
from l7proxy.secrets import SecretFiles
from policytest.authority import Authority

ROW = TlsContextRow("ns", "web")


def test_a_change_counts_when_two_looks_have_seen_the_same_of_it():
    states = iter([(), ("half",), ("whole",), ("whole",), ()])
    renewal = Renewal(lambda: next(states))
    due = []
    for turn in range(5):
        due.append(renewal.due(100 + turn * LOOK_S))
        assert not renewal.due(100 + turn * LOOK_S + LOOK_S / 2), "too early to look"
    assert due == [False, False, False, True, False]


def test_a_header_secret_is_news_when_it_comes_changes_and_goes(tmp_path):
    secrets = SecretFiles(tmp_path)
    path = tmp_path / "ns" / "code"
    assert secrets("ns", "code") is None
    assert secrets("ns", "../code") is None
    assert secrets.news() == ()
    path.parent.mkdir()
    for text in ("thx", "1138"):
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)
        assert secrets.news()
        secrets.forget()
        assert secrets("ns", "code") == text.encode()
        assert secrets.news() == ()
    path.unlink()
    assert secrets.news()


def test_a_certificate_is_news_behind_a_link_too(tmp_path):
    """Kubernetes swaps the link `..data` of a mounted secret."""
    authority = Authority()
    folder = tmp_path / "ns" / "web"
    folder.mkdir(parents=True)
    for version in ("1", "2"):
        authority.secret(tmp_path / version, "a.example", ca=False)
    (folder / "..data").symlink_to(tmp_path / "1")
    for name in ("tls.crt", "tls.key"):
        (folder / name).symlink_to(f"..data/{name}")
    certificates = Certificates(tmp_path)
    snapshot = Snapshot(l7=(L7Row("http", terminating_tls=ROW),))
    assert certificates.install(snapshot) == []
    first = certificates.towards_clients(ROW, http=True)
    assert certificates.news() == ()
    (folder / "..new").symlink_to(tmp_path / "2")
    (folder / "..new").replace(folder / "..data")
    assert certificates.news()
    assert certificates.install(snapshot) == []
    assert certificates.towards_clients(ROW, http=True) is not first
    assert certificates.news() == ()


def test_a_pair_that_does_not_match_is_read_again_when_its_files_change_only(tmp_path):
    folder = tmp_path / "ns" / "web"
    Authority().secret(folder, "a.example", ca=False)
    key = (folder / "tls.key").read_bytes()
    Authority().secret(folder, "a.example", ca=False)
    matching = (folder / "tls.key").read_bytes()
    (folder / "tls.key").write_bytes(key)
    certificates = Certificates(tmp_path)
    snapshot = Snapshot(l7=(L7Row("http", terminating_tls=ROW),))
    (problem,) = certificates.install(snapshot)
    assert problem.startswith("secret ns/web: ")
    with pytest.raises(CertificateError):
        certificates.towards_clients(ROW, http=True)
    assert certificates.news() == ()
    (folder / "tls.key").with_suffix(".new").write_bytes(matching)
    (folder / "tls.key").with_suffix(".new").replace(folder / "tls.key")
    assert certificates.news()
    assert certificates.install(snapshot) == []
