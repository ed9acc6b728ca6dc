"""Enrolment, seen from the part that enrols: from a passphrase to an identity the vault vouches for.

    identity = await enrol(config_server="config.example.org:443", role=Role.MACHINE, name="db1",
                           passphrase=read_passphrase(path), directory=Path("/etc/replicar"))

The private key is made here and stays here. This is the one place that speaks TLS without verifying certificates:
before it is enrolled a part has nothing to verify them by. What makes it safe are the proofs in both directions
(`proofs`, which says what a man in the middle could and could not do), so nothing of the answer is used before the
server's proof was found right.

Enrolling a name again keeps the id and raises the incarnation; the certificates of before are refused from then on.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from replicar.clock import Clock, SystemClock
from replicar.control.admission import EnrolReply, EnrolRequest, VaultInfo
from replicar.control.files import SECRET_MODE, read_file, write_file
from replicar.control.identity import Identity, Role, new_key, signing_request
from replicar.control.proofs import (
    client_proof,
    enrolment_key,
    is_server_proof,
    registration_digest,
    registration_proof,
)
from replicar.control.transport import Transport
from replicar.errors import PermanentError

NONCE_BYTES: Final = 16
#: Who may come this way; operators and the config server get their identities where the vault is.
ENROLLING_ROLES: Final = (Role.MACHINE, Role.PROCESS_SERVER, Role.RECOVERY)


@dataclass(frozen=True, slots=True)
class RegistrationKey:
    """What admits process servers for five days, besides the passphrase.

    `expires_ns` is for people; the config server keeps its own.
    """

    vault: str
    key_id: str
    key: SecretStr
    expires_ns: int

    @classmethod
    def load(cls, path: Path | str) -> RegistrationKey:
        """Read a registration key file.

        Raises:
            PermanentError: it is missing, readable by others, or no registration key.
        """
        path = Path(path)
        hint = "make one where the vault is: `config-server registration-key`"
        data = read_file(path, what="the registration key", hint=hint, secret=True)
        try:
            fields = json.loads(data)
            expires = datetime.fromisoformat(fields["expires"])
            return cls(
                str(fields["vault"]),
                str(fields["key_id"]),
                SecretStr(str(fields["key"])),
                int(expires.timestamp()) * 10**9,
            )
        except (ValueError, KeyError, TypeError):
            raise PermanentError(f"{path} is no registration key", hint=hint, path=str(path)) from None

    def save(self, path: Path | str) -> None:
        """Write it as JSON, readable by its owner alone."""
        fields = {
            "vault": self.vault,
            "key_id": self.key_id,
            "key": self.key.get_secret_value(),
            "expires": datetime.fromtimestamp(self.expires_ns // 10**9, UTC).isoformat(),
        }
        write_file(Path(path), (json.dumps(fields, indent=2) + "\n").encode(), mode=SECRET_MODE)


def read_passphrase(path: Path | str) -> SecretStr:
    """The vault's passphrase from a file of one line.

    Raises:
        PermanentError: the file is missing, readable by others, or empty.
    """
    path = Path(path)
    hint = "copy the file `passphrase` from the vault's directory, mode 0600"
    data = read_file(path, what="the passphrase", hint=hint, secret=True)
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text or "\n" in text:
        raise PermanentError(f"{path} does not hold a passphrase (one line of text)", hint=hint, path=str(path))
    return SecretStr(text)


async def enrol(
    *,
    config_server: str,
    role: Role,
    name: str,
    passphrase: SecretStr,
    directory: Path | str,
    registration_key: RegistrationKey | None = None,
    clock: Clock | None = None,
) -> Identity:
    """Enrol this machine or process server, and save its identity in `directory`.

    Args:
        config_server: `host:port`; also what the identity remembers.
        name: what the operator calls it; a name that is known already is enrolled again.
        registration_key: for process servers and recovery workers.

    Raises:
        PermanentError: a wrong passphrase, an expired key, a clock that is off, a server that can't prove itself...
        LimitError: too many wrong attempts.
        TransientError: the config server can't be reached.
    """
    if role not in ENROLLING_ROLES:
        raise PermanentError(f"a {role} is not enrolled over the network", hint="use `config-server operator` instead")
    if role is not Role.MACHINE and registration_key is None:
        raise PermanentError(
            f"a {'recovery worker' if role is Role.RECOVERY else 'process server'} needs a registration key",
            hint="make one where the vault is: `config-server registration-key`",
        )
    clock = clock or SystemClock()
    async with Transport(config_server, _unverified(), server_hostname=None) as transport:
        vault = VaultInfo.from_json(await transport.request("GET", "/vault"))
        if registration_key is not None and registration_key.vault != vault.name:
            raise PermanentError(
                f"the registration key is for vault {registration_key.vault}; {transport.where} serves {vault.name}",
                hint="use a registration key of that vault, or the address of the other one's config server",
            )
        key = await asyncio.to_thread(enrolment_key, passphrase, vault.id)
        key_pem = new_key()
        request = _request(role, name, key_pem, key, registration_key, clock.now_ns())
        reply = EnrolReply.from_json(await transport.request("POST", "/enrol", body=request.to_json()))
    if not is_server_proof(key, nonce=request.nonce, reply=reply) or reply.config.vault_id != vault.id:
        raise PermanentError(
            f"what answers at {transport.where} can't prove that it knows the vault's passphrase; nothing was kept",
            hint="check the config server's address, and who could sit between here and there",
            host=transport.host,
            port=transport.port,
        )
    identity = Identity(
        id=reply.id,
        role=role,
        name=name,
        config_server=config_server,
        vault=reply.config.vault,
        vault_id=reply.config.vault_id,
        incarnation=reply.config.incarnation,
        certificate_pem=reply.certificate.encode(),
        authority_pem=reply.authority.encode(),
        key_pem=key_pem,
    ).save(directory)
    return Identity.load(identity.directory or directory)


def _request(
    role: Role, name: str, key_pem: bytes, key: bytes, registration_key: RegistrationKey | None, now_ns: int
) -> EnrolRequest:
    try:
        request = EnrolRequest(
            role=str(role),
            name=name,
            csr=signing_request(key_pem).decode(),
            nonce=secrets.token_hex(NONCE_BYTES),
            time_ns=now_ns,
            registration_key_id=registration_key.key_id if registration_key is not None else "",
            proof="",
        )
    except ValueError:
        raise PermanentError(
            f"{name!r} is no name for a {role}",
            hint="use 1 to 63 letters, digits, dots, dashes or underscores, beginning with a letter or digit",
        ) from None
    if registration_key is not None:
        digest = registration_digest(registration_key.key)
        request = request.model_copy(update={"registration_proof": registration_proof(digest, request)})
    return request.model_copy(update={"proof": client_proof(key, request)})


def _unverified() -> ssl.SSLContext:
    """For enrolment alone; see above why nothing is verified here, and what is instead."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
