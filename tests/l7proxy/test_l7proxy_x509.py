"""Certificates read by us say what `cryptography` reads from them, and any bytes have an end."""

import pytest
from authority import Authority
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from l7proxy.x509 import CertificateTextError, read_certificates


@pytest.mark.parametrize("days", [(-1, 30), (-30, -1), (-1, 365 * 40)])
def test_serial_dates_and_names_are_those_that_another_reader_finds(days):
    pem, _ = Authority().issue("a.example", "*.b.example", "192.0.2.1", "2001:db8::1", days=days)
    (ours,) = read_certificates(pem)
    theirs = x509.load_pem_x509_certificate(pem)
    assert ours.serial == f"{theirs.serial_number:x}"
    assert ours.valid_from == int(theirs.not_valid_before_utc.timestamp())
    assert ours.valid_until == int(theirs.not_valid_after_utc.timestamp())
    assert ours.names == (
        ("dns", "a.example"), ("dns", "*.b.example"), ("ip_address", "c0000201"),
        ("ip_address", "20010db8000000000000000000000001"),
    )  # fmt: skip


def test_a_chain_is_read_in_order_and_text_around_it_is_skipped():
    one, two = Authority("one"), Authority("two")
    data = b"# one\n" + one.certificate + b"subject=two\n" + two.certificate
    found = read_certificates(data)
    assert [row.serial for row in found] == [
        f"{x509.load_pem_x509_certificate(pem).serial_number:x}"
        for pem in (one.certificate, two.certificate)
    ]


@pytest.mark.parametrize(
    "data", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"]
)
def test_what_is_none_is_said(data):
    with pytest.raises(CertificateTextError):
        read_certificates(data)


PEM = Authority().issue("a.example")[0]


@given(st.data())
def test_damage_is_an_error_or_another_certificate(data):
    at = data.draw(st.integers(0, len(PEM) - 1))
    damaged = PEM[:at] + bytes([data.draw(st.integers(0, 255))]) + PEM[at + 1 :]
    try:
        read_certificates(damaged)
    except CertificateTextError:
        return
