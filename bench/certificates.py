"""A throw-away authority and a certificate for 127.0.0.1, so that benchmarks pay for TLS as the product does."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "127.0.0.1"
_DAYS = 2


@dataclass(frozen=True, slots=True)
class Certificates:
    """Where the files are. The authority's key is never written down."""

    authority: Path
    certificate: Path
    key: Path

    @classmethod
    def make(cls, directory: Path, *, host: str = HOST) -> Certificates:
        """Make them in `directory`, which is made if it is not there, for an address."""
        directory.mkdir(parents=True, exist_ok=True)
        made = cls(directory / "authority.pem", directory / "certificate.pem", directory / "key.pem")
        root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        root_name, name = _name("benchmark's throw-away authority"), _name(host)
        root = _builder(root_name, root_name, root_key, root_key).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        root = root.add_extension(_usage(signs_certificates=True), critical=True)
        leaf = _builder(name, root_name, key, root_key).add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False
        )
        leaf = leaf.add_extension(_usage(signs_certificates=False), critical=True)
        pem = serialization.Encoding.PEM
        made.authority.write_bytes(root.sign(root_key, hashes.SHA256()).public_bytes(pem))
        made.certificate.write_bytes(leaf.sign(root_key, hashes.SHA256()).public_bytes(pem))
        made.key.unlink(missing_ok=True)
        with os.fdopen(os.open(made.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        return made

    def server_context(self) -> ssl.SSLContext:
        """TLS 1.3 for a listening socket."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.certificate, self.key)
        return context

    def client_context(self) -> ssl.SSLContext:
        """TLS 1.3 for a client that believes this authority alone."""
        context = ssl.create_default_context(cafile=self.authority)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        return context


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, issuer_key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
