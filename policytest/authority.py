"""A certificate authority for labs and tests, and secrets in the shape of Kubernetes."""

import datetime as dt
import ipaddress  # noqa: TID251 -- the builder of certificates wants its objects
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from conntrack.address import parse_address

DAYS = (-1, 30)
"""From when until when a certificate is valid, counted from now."""


class Authority:
    """Signs what it is asked to; keys are P-256, which costs no time."""

    def __init__(self, name: str = "test authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _common_name(name)
        self._certificate = self._sign(
            self._name,
            self._key.public_key(),
            x509.BasicConstraints(ca=True, path_length=None),
            x509.KeyUsage(*(True,) + (False,) * 4 + (True, True, False, False)),
        )

    @property
    def certificate(self) -> bytes:
        """In PEM."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def _sign(
        self,
        subject: x509.Name,
        public_key: ec.EllipticCurvePublicKey,
        *extensions: x509.ExtensionType,
        days: tuple[int, int] = DAYS,
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + dt.timedelta(days=days[0]))
            .not_valid_after(now + dt.timedelta(days=days[1]))
        )
        # Both identifiers, because Python 3.13 verifies as RFC 5280 says (VERIFY_X509_STRICT).
        key_id = x509.SubjectKeyIdentifier.from_public_key(public_key)
        issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(key_id, critical=False)
        builder = builder.add_extension(issuer_id, critical=False)
        for extension in extensions:
            builder = builder.add_extension(extension, critical=True)
        return builder.sign(self._key, hashes.SHA256())

    def issue(self, *names: str, days: tuple[int, int] = DAYS) -> tuple[bytes, bytes]:
        """Return a certificate for host names and addresses, and its key, in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        general = x509.SubjectAlternativeName(map(_general_name, names))
        certificate = self._sign(_common_name("test"), key.public_key(), general, days=days)
        return (
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )

    def secret(
        self, folder: Path, *names: str, ca: bool = False, days: tuple[int, int] = DAYS
    ) -> Path:
        """Write `folder/{tls.crt,tls.key}` for these names (none: neither), `ca`: ca.crt too."""
        folder.mkdir(parents=True, exist_ok=True)
        if names:
            certificate, key = self.issue(*names, days=days)
            (folder / "tls.crt").write_bytes(certificate)
            (folder / "tls.key").write_bytes(key)
        if ca:
            (folder / "ca.crt").write_bytes(self.certificate)
        return folder


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        parse_address(name)
    except ValueError:
        return x509.DNSName(name)
    return x509.IPAddress(ipaddress.ip_address(name))
