"""Certificate authorities of our own, and the files that they issue."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

DAY: Final = timedelta(days=1)
LIFE: Final = 90 * DAY
"""Long enough that nothing warns of the end."""

Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Issued:
    """The two files of a server."""

    crt: str
    key: str


class Authority:
    """A certificate authority whose files lie in one folder.

    Args:
        folder: to write into; made if need be.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._root = trustme.CA(organization_name=f"authority of {folder.name}")
        path = folder / "ca.pem"
        path.write_bytes(self._root.cert_pem.bytes())
        self.ca = str(path)
        """Path of its own certificate, for ca=."""

    def issue(
        self,
        *names: str,
        label: str = "server",
        start: timedelta = -DAY,
        end: timedelta = LIFE,
        is_indirect: bool = False,
    ) -> Issued:
        """Write a certificate and its key; a second one of the same label replaces the first.

        Args:
            names: host names and addresses it is for.
            label: of the files.
            start: when it begins, from now; `end` likewise.
            is_indirect: signed by an intermediate authority, which the file holds, too.
        """
        signer = self._root.create_child_ca() if is_indirect else self._root
        now = datetime.now(UTC)
        cert = signer.issue_cert(*names, not_before=now + start, not_after=now + end)
        chain = b"".join(part.bytes() for part in cert.cert_chain_pems)
        return _write(self._folder, label, chain, cert.private_key_pem.bytes())

    def issue_expired(self, *names: str) -> Issued:
        """Write a certificate that ended a day and a half ago."""
        return self.issue(*names, label="expired", start=-LIFE, end=-1.5 * DAY)

    def issue_early(self, *names: str) -> Issued:
        """Write a certificate that begins in a day and a half."""
        return self.issue(*names, label="early", start=1.5 * DAY)


def self_signed(
    folder: Path,
    *names: str,
    label: str = "self",
    key: Key | None = None,
    end: timedelta = LIFE,
) -> Issued:
    """Write a certificate that no authority has signed.

    Args:
        folder: to write into; must exist.
        names: host names and addresses; none = the certificate has no subjectAltName.
        label: of the files.
        key: None = a new one on P-256.
        end: when it ends, from now.
    """
    key = ec.generate_private_key(ec.SECP256R1()) if key is None else key
    now = datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "self-signed")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + min(-DAY, end - DAY))
        .not_valid_after(now + end)
    )
    if names:
        alternative = x509.SubjectAlternativeName([_general_name(name) for name in names])
        builder = builder.add_extension(alternative, critical=False)
    is_ed25519 = isinstance(key, ed25519.Ed25519PrivateKey)
    cert = builder.sign(key, None if is_ed25519 else hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return _write(folder, label, cert.public_bytes(pem), private)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(folder: Path, label: str, chain: bytes, key: bytes) -> Issued:
    """Replace both files as renewal tools do: written aside, then moved into place."""
    issued = Issued(str(folder / f"{label}.crt"), str(folder / f"{label}.key"))
    for path, data in ((issued.crt, chain), (issued.key, key)):
        fresh = Path(f"{path}.new")
        fresh.touch(mode=0o600)
        fresh.write_bytes(data)
        fresh.replace(path)
    return issued
