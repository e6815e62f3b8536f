"""Certificates of policies as people are told of them."""

from firewall.agent.secrets import inventory, read_file
from firewall.policy.snapshot import Snapshot
from policytest.authority import Authority


def test_a_chain_is_read_in_order_and_text_around_it_is_skipped(tmp_path):
    one, two = Authority("one"), Authority("two")
    path = tmp_path / "chain.pem"
    path.write_bytes(b"# one\n" + one.certificate + b"subject=two\n" + two.certificate)
    assert [found.subject.rfc4514_string() for found in read_file(path)] == ["CN=one", "CN=two"]


def test_what_holds_no_certificate_has_none(tmp_path):
    path = tmp_path / "damaged.pem"
    for data in (b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        path.write_bytes(data)
        assert read_file(path) == []
    assert read_file(tmp_path / "absent.pem") == []
    assert inventory(Snapshot(), tmp_path) == []
