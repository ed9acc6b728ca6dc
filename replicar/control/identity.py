"""An identity: who a part is, as a directory with a private key, a certificate, the authority and a few facts.

    key.pem           the private key, made here, never sent anywhere; mode 0600
    certificate.pem   what the vault's authority says about that key: `<id>.<role>.replicar`, for a year
    authority.pem     the one certificate authority this part believes
    identity.json     id, role, name, vault, where the config server is, incarnation

Renewal keeps the key, so that it replaces one file and a crash leaves either certificate, both good. Enrolling again
makes a new key and replaces all four; a crash between the renames leaves a key that does not fit its certificate,
which `Identity.load` says, and enrolling once more mends.

The `incarnation` counts how often a machine of this name was enrolled (0 at first). A machine that lost its change log
enrols again, and its sequence numbers go on at `first_sequence`, far above anything the lost log can have used.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from replicar.control.files import PUBLIC_MODE, SECRET_MODE, make_directory, read_file, write_file
from replicar.errors import PermanentError

DOMAIN: Final = "replicar"
KEY_FILE: Final = "key.pem"
CERTIFICATE_FILE: Final = "certificate.pem"
AUTHORITY_FILE: Final = "authority.pem"
FACTS_FILE: Final = "identity.json"
#: A third of a certificate's year: a part that was off for two months still comes back by itself.
RENEW_BEFORE_DAYS: Final = 122
#: Sequence numbers of one incarnation; the same shift as in the frame format.
INCARNATION_SHIFT: Final = 48
#: Sequence numbers stay below 2**63, which is what the registry's integers hold.
MAX_INCARNATION: Final = (1 << 15) - 1

_AGAIN: Final = "enrol this part again (see `mobility-agent --help`, `process-server --help` or `config-server --help`)"


class Role(StrEnum):
    """What a certificate's holder may do; the second label of its name."""

    MACHINE = "machine"
    PROCESS_SERVER = "process-server"
    CONFIG_SERVER = "config-server"
    RECOVERY = "recovery"
    READER = "reader"
    OPERATOR = "operator"
    AUDITOR = "auditor"
    ADMIN = "admin"


def dns_name(party_id: uuid.UUID, role: Role) -> str:
    """The name in the certificate, which is what a peer verifies: `<uuid>.<role>.replicar`."""
    return f"{party_id}.{role}.{DOMAIN}"


#: The config server has this name besides its own, so that a part can find it before it knows any id.
CONFIG_SERVER_NAME: Final = f"{Role.CONFIG_SERVER}.{DOMAIN}"


def first_sequence(incarnation: int) -> int:
    """The first sequence number of a change log of this incarnation."""
    return (incarnation << INCARNATION_SHIFT) + 1


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a part is. PEM fields are bytes as they lie in the files; the private key never shows in a repr.

    `config_server` is `host:port`. `directory` is where it was loaded from or saved to; TLS reads the files there.
    """

    id: uuid.UUID
    role: Role
    name: str
    config_server: str
    vault: str
    vault_id: uuid.UUID
    incarnation: int
    certificate_pem: bytes = field(repr=False)
    authority_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)
    directory: Path | None = None

    @classmethod
    def load(cls, directory: Path | str) -> Identity:
        """Read and check an identity directory.

        Raises:
            PermanentError: something is missing, unreadable, readable by others, or does not fit together.
        """
        directory = Path(directory)
        facts = _facts(read_file(directory / FACTS_FILE, what="the identity", hint=_AGAIN), directory)
        key_pem = read_file(directory / KEY_FILE, what="the private key", hint=_AGAIN, secret=True)
        certificate_pem = read_file(directory / CERTIFICATE_FILE, what="the certificate", hint=_AGAIN)
        authority_pem = read_file(directory / AUTHORITY_FILE, what="the authority's certificate", hint=_AGAIN)
        try:
            identity = cls(
                id=uuid.UUID(facts["id"]),
                role=Role(facts["role"]),
                name=str(facts["name"]),
                config_server=str(facts["config_server"]),
                vault=str(facts["vault"]),
                vault_id=uuid.UUID(facts["vault_id"]),
                incarnation=int(facts["incarnation"]),
                certificate_pem=certificate_pem,
                authority_pem=authority_pem,
                key_pem=key_pem,
                directory=directory,
            )
            fits = identity._fits()
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise _damaged(directory, f"{type(error).__name__}") from None
        if not fits:
            raise _damaged(directory, "key, certificate and authority do not fit together")
        return identity

    def save(self, directory: Path | str) -> Identity:
        """Write the four files durably (the directory is made when missing); returns self with `directory` set.

        Raises:
            PermanentError: when they can't be written.
        """
        directory = Path(directory)
        make_directory(directory)
        facts = {
            "id": str(self.id),
            "role": str(self.role),
            "name": self.name,
            "config_server": self.config_server,
            "vault": self.vault,
            "vault_id": str(self.vault_id),
            "incarnation": self.incarnation,
        }
        write_file(directory / KEY_FILE, self.key_pem, mode=SECRET_MODE)
        write_file(directory / AUTHORITY_FILE, self.authority_pem, mode=PUBLIC_MODE)
        write_file(directory / CERTIFICATE_FILE, self.certificate_pem, mode=PUBLIC_MODE)
        write_file(directory / FACTS_FILE, (json.dumps(facts, indent=2) + "\n").encode(), mode=PUBLIC_MODE)
        return replace(self, directory=directory)

    def renewed(self, certificate_pem: bytes) -> Identity:
        """This identity with a newer certificate of the same key, written to its directory when it has one.

        Raises:
            PermanentError: the certificate is not one of this key and name.
        """
        renewed = replace(self, certificate_pem=certificate_pem)
        try:
            fits = renewed._fits()
        except ValueError:
            fits = False
        if not fits:
            raise PermanentError("the renewed certificate is not one of this identity's key", hint=_AGAIN)
        if self.directory is not None:
            write_file(self.directory / CERTIFICATE_FILE, certificate_pem, mode=PUBLIC_MODE)
        return renewed

    @property
    def dns_name(self) -> str:
        return dns_name(self.id, self.role)

    @property
    def first_sequence(self) -> int:
        """Where this machine's sequence numbers begin."""
        return first_sequence(self.incarnation)

    @property
    def expires_ns(self) -> int:
        """When the certificate ends, nanoseconds since 1970."""
        return int(self._certificate().not_valid_after_utc.timestamp()) * 10**9

    def is_due(self, now_ns: int) -> bool:
        """Whether the certificate should be renewed by now."""
        return self.expires_ns - now_ns < RENEW_BEFORE_DAYS * 86_400 * 10**9

    def check_dates(self, now_ns: int) -> None:
        """Raises:
        PermanentError: the certificate has expired, so that nobody will speak to its holder.
        """
        if now_ns >= self.expires_ns:
            ended = datetime.fromtimestamp(self.expires_ns / 1e9, UTC)
            raise PermanentError(
                f"the certificate of {self.role} {self.name} expired at {ended:%Y-%m-%d %H:%M} UTC",
                hint=_AGAIN,
                name=self.name,
            )

    def signing_request(self) -> bytes:
        """A PEM certificate signing request by this identity's key."""
        return signing_request(self.key_pem)

    def _certificate(self) -> x509.Certificate:
        return _read_certificate(self.certificate_pem)

    def _fits(self) -> bool:
        key = serialization.load_pem_private_key(self.key_pem, password=None)
        certificate = self._certificate()
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        try:
            certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(self.authority_pem))
        except (InvalidSignature, ValueError, TypeError):  # ValueError: of another name
            return False
        return (
            isinstance(key, ec.EllipticCurvePrivateKey)
            and key.public_key() == certificate.public_key()
            and self.dns_name in names.get_values_for_type(x509.DNSName)
        )


def new_key() -> bytes:
    """A new EC P-256 private key as unencrypted PKCS #8 PEM."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def signing_request(key_pem: bytes) -> bytes:
    """A PEM request that proves possession of the key; names are the authority's to give, so it carries none."""
    key = serialization.load_pem_private_key(key_pem, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@lru_cache(maxsize=8)
def _read_certificate(pem: bytes) -> x509.Certificate:
    """Every heartbeat asks whether its certificate is due."""
    return x509.load_pem_x509_certificate(pem)


def _facts(data: bytes, directory: Path) -> dict[str, Any]:
    try:
        facts = json.loads(data)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise _damaged(directory, f"{FACTS_FILE} is no JSON object")
    return facts


def _damaged(directory: Path, what: str) -> PermanentError:
    return PermanentError(f"the identity in {directory} is damaged: {what}", hint=_AGAIN, path=str(directory))
