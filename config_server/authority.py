"""The vault's own certificate authority: one EC P-256 key that signs who is who, for a year at a time.

It signs public keys, not requests: of a signing request nothing is used but the key and the proof of holding it. Names
come from the registry, as `<uuid>.<role>.replicar`. Certificates begin five minutes early, since clocks may differ by
that much (and no more: more is refused), and end with the authority at the latest.

Weak: the authority's key lies on the config server, readable by its owner. Who has that file can be anybody in this
vault, so the vault's directory is to be guarded, and backed up, like the data itself.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from replicar.control.identity import CONFIG_SERVER_NAME, Role, dns_name
from replicar.control.messages import MAX_CLOCK_SKEW_SECONDS
from replicar.errors import PermanentError

AUTHORITY_DAYS: Final = 3650
CERTIFICATE_DAYS: Final = 365
_EARLY: Final = timedelta(seconds=MAX_CLOCK_SKEW_SECONDS)
_SERVING: Final = (Role.CONFIG_SERVER, Role.PROCESS_SERVER)


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate as issued. `serial` is upper-case hex, as TLS reports it."""

    pem: bytes
    serial: str
    issued_ns: int
    expires_ns: int


@dataclass(frozen=True, slots=True)
class Authority:
    """The authority's key and its self-signed certificate."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate

    @classmethod
    def create(cls, vault_name: str, now_ns: int) -> Authority:
        """A new authority, good for ten years from `now_ns`."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Replicar vault {vault_name}"[:64])])
        now = _moment(now_ns)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _EARLY)
            .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .add_extension(identifier, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate)

    @classmethod
    def from_pem(cls, key_pem: bytes, certificate_pem: bytes) -> Authority:
        """The authority as it was kept.

        Raises:
            PermanentError: the two are not a key and its certificate.
        """
        hint = "restore the vault's directory from its backup"
        try:
            key = serialization.load_pem_private_key(key_pem, password=None)
            certificate = x509.load_pem_x509_certificate(certificate_pem)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise PermanentError("the authority's key or certificate is damaged", hint=hint) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise PermanentError("the authority's key does not fit its certificate", hint=hint)
        return cls(key, certificate)

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @property
    def expires_ns(self) -> int:
        return int(self.certificate.not_valid_after_utc.timestamp()) * 10**9

    def issue(self, csr_pem: bytes, role: Role, party_id: uuid.UUID, now_ns: int) -> Certificate:
        """A certificate for the key of a signing request, for a year.

        Raises:
            PermanentError: the request is damaged, its key is not EC P-256, or the authority has expired.
        """
        key = _requested_key(csr_pem)
        now = _moment(now_ns)
        end = min(now + timedelta(days=CERTIFICATE_DAYS), self.certificate.not_valid_after_utc)
        if end <= now:
            raise PermanentError(
                f"the vault's authority expired at {end:%Y-%m-%d}", hint="make a new vault and enrol its parts again"
            )
        names = [dns_name(party_id, role)] + ([CONFIG_SERVER_NAME] if role is Role.CONFIG_SERVER else [])
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH] + ([ExtendedKeyUsageOID.SERVER_AUTH] if role in _SERVING else [])
        own = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(party_id))]))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _EARLY)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return Certificate(
            pem=certificate.public_bytes(serialization.Encoding.PEM),
            serial=serial_text(certificate.serial_number),
            issued_ns=now_ns,
            expires_ns=int(end.timestamp()) * 10**9,
        )


def serial_text(serial: int) -> str:
    """A serial number as `ssl` writes it: upper-case hex of whole bytes."""
    text = f"{serial:X}"
    return text if len(text) % 2 == 0 else f"0{text}"


def _requested_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    hint = "use the part's own `enrol`"
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm):
        raise PermanentError("the certificate signing request is damaged", hint=hint, status=400) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1) or not valid:
        raise PermanentError("the signing request is not one by an EC P-256 key", hint=hint, status=400)
    return key


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _moment(now_ns: int) -> datetime:
    return datetime.fromtimestamp(now_ns // 10**9, UTC)
