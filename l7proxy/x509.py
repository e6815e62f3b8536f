"""What a certificate says of itself: serial number, dates, names. Pure; nothing is verified here.

OpenSSL verifies when a context is made and a connection begins; this is for people who look
(`/certs` of the admin page, warnings about dates). Times are seconds of the Unix epoch, UTC.
Source: RFC 5280 4.1, 4.2.1.6; ITU-T X.690 (DER); RFC 7468 (PEM).
"""

import base64
import binascii
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\s*([A-Za-z0-9+/=\s]*?)-----END CERTIFICATE-----")

_SEQUENCE, _INTEGER, _OID, _OCTETS = 0x30, 0x02, 0x06, 0x04
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_VERSION, _EXTENSIONS = 0xA0, 0xA3
_ALTERNATIVE_NAMES = bytes.fromhex("551d11")
"""OID 2.5.29.17."""
_EMAIL, _DNS, _URI, _ADDRESS = 0x81, 0x82, 0x86, 0x87
"""Tags of GeneralName."""


class CertificateTextError(ValueError):
    """The bytes hold no certificate that can be read; the text says why."""


class Certificate(NamedTuple):
    """One certificate.

    Attributes:
        serial: in lower-case hexadecimal without leading zeros.
        valid_from: seconds of the Unix epoch.
        valid_until: the last such second.
        names: (kind, value) of the subject alternative names, kind one of "dns", "uri",
            "ip_address", "email"; addresses as packed bytes in hexadecimal.
    """

    serial: str
    valid_from: int
    valid_until: int
    names: tuple[tuple[str, str], ...]


def read_certificates(data: bytes) -> list[Certificate]:
    """Return the certificates of a PEM file in order.

    Raises:
        CertificateTextError: there is none, or one is damaged.
    """
    blocks = _PEM.findall(data)
    if not blocks:
        raise CertificateTextError("no certificate in PEM")
    found = []
    for block in blocks:
        try:
            found.append(_certificate(base64.b64decode(b"".join(block.split()), validate=True)))
        except (binascii.Error, IndexError, ValueError) as error:
            raise CertificateTextError(f"damaged certificate: {error}") from None
    return found


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and content of each element of a DER structure."""
    at = 0
    while at < len(data):
        tag, size, at = data[at], data[at + 1], at + 2
        if size & 0x80:
            width = size & 0x7F
            size, at = int.from_bytes(data[at : at + width], "big"), at + width
        if at + size > len(data):
            raise ValueError("an element is cut short")
        yield tag, data[at : at + size]
        at += size


def _inner(data: bytes, tag: int) -> list[tuple[int, bytes]]:
    """Return the elements inside the first element, which must have this tag."""
    for found, content in _elements(data):
        if found == tag:
            return list(_elements(content))
        break
    raise ValueError("another structure than that of a certificate")


def _certificate(der: bytes) -> Certificate:
    (tag, body), *_ = _inner(der, _SEQUENCE)
    fields = list(_elements(body))
    if tag != _SEQUENCE or not fields:
        raise ValueError("another structure than that of a certificate")
    if fields[0][0] == _VERSION:
        del fields[0]
    serial, _, _, validity = fields[:4]
    begin, end = _elements(validity[1])
    if serial[0] != _INTEGER:
        raise ValueError("no serial number")
    names: tuple[tuple[str, str], ...] = ()
    for tag, content in fields[4:]:
        if tag == _EXTENSIONS:
            names = tuple(_names(content))
    number = f"{int.from_bytes(serial[1], 'big', signed=True):x}"
    return Certificate(number, _time(*begin), _time(*end), names)


def _time(tag: int, text: bytes) -> int:
    """RFC 5280 4.1.2.5: UTCTime means 1950 to 2049; both end with Z."""
    digits = text.decode("ascii")
    if tag == _UTC_TIME:
        digits = ("19" if digits[:2] >= "50" else "20") + digits
    elif tag != _GENERALIZED_TIME:
        raise ValueError("no time")
    return int(datetime.strptime(digits, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp())


def _names(extensions: bytes) -> Iterator[tuple[str, str]]:
    for _, extension in _inner(extensions, _SEQUENCE):
        parts = dict(_elements(extension))
        if parts.get(_OID) != _ALTERNATIVE_NAMES:
            continue
        for tag, value in _inner(parts[_OCTETS], _SEQUENCE):
            if tag == _ADDRESS:
                yield "ip_address", value.hex()
            elif tag in (_DNS, _URI, _EMAIL):
                kind = {_DNS: "dns", _URI: "uri", _EMAIL: "email"}[tag]
                yield kind, value.decode("latin-1")
