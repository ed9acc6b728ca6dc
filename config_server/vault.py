"""The vault: one directory with the secrets and the registry that everything else depends on.

    vault.json                   id and name
    vault.key            0600    wraps every machine's data key (see `replicar.control.vault_key`)
    enrolment.key        0600    what the passphrase derives to (see `replicar.control.proofs`)
    passphrase           0600    for whoever enrols a part; the server never reads it, so it may be taken away
    registration.key     0600    admits process servers for five days
    authority/                   key.pem (0600) and certificate.pem of the vault's own authority
    identity/                    the config server's own identity
    operator/                    an identity for the `replicar` command
    registry.sqlite              machines, process servers, points; data keys in wrapped form only
    config-server.toml           settings for `config-server run`

Losing `vault.key` or `registry.sqlite` makes every sealed byte in storage unreadable for ever: back the directory up,
and guard the copy as well. The registry alone gives no key away, nor does `vault.key` alone.

`enrolment.key` is as good as the passphrase for enrolling with this vault, and for nothing else; it can't be a mere
hash, since proofs in both directions need the shared key on both sides.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from config_server.authority import Authority
from replicar.control.files import PUBLIC_MODE, make_directory, read_file, write_file
from replicar.control.messages import DATA_KEY_BYTES
from replicar.control.proofs import KEY_BYTES, enrolment_key
from replicar.control.vault_key import VaultKey
from replicar.errors import PermanentError

FORMAT: Final = 1
PASSPHRASE_BYTES: Final = 20  # 160 bits: 32 letters and digits, in groups that can be read out
REGISTRY_FILE: Final = "registry.sqlite"
VAULT_KEY_FILE: Final = "vault.key"
PASSPHRASE_FILE: Final = "passphrase"  # noqa: S105 - the name of the file
REGISTRATION_FILE: Final = "registration.key"
SETTINGS_FILE: Final = "config-server.toml"
IDENTITY_DIRECTORY: Final = "identity"
OPERATOR_DIRECTORY: Final = "operator"

_RESTORE: Final = "restore the vault's directory from its backup"


@dataclass(frozen=True, slots=True)
class Vault:
    """An opened vault; its secrets never show in a repr."""

    directory: Path
    id: uuid.UUID
    name: str
    authority: Authority = field(repr=False)
    key: VaultKey = field(repr=False)
    enrolment_key: bytes = field(repr=False)

    @classmethod
    def create(cls, directory: Path, name: str, now_ns: int) -> Vault:
        """Write a new vault's secrets into `directory`, which must be empty or missing.

        Raises:
            PermanentError: something is there already, or the directory can't be written.
        """
        make_directory(directory)
        if any(directory.iterdir()):
            raise PermanentError(
                f"{directory} is not empty", hint="choose an empty or new directory", path=str(directory)
            )
        os.chmod(directory, 0o700)
        vault_id = uuid.uuid4()
        passphrase = new_passphrase()
        vault = cls(
            directory=directory,
            id=vault_id,
            name=name,
            authority=Authority.create(name, now_ns),
            key=VaultKey.new(),
            enrolment_key=enrolment_key(passphrase, vault_id),
        )
        make_directory(directory / "authority")
        write_file(directory / "authority" / "key.pem", vault.authority.key_pem)
        write_file(directory / "authority" / "certificate.pem", vault.authority.certificate_pem, mode=PUBLIC_MODE)
        vault.key.save(directory / VAULT_KEY_FILE)
        write_file(directory / "enrolment.key", vault.enrolment_key)
        write_file(directory / PASSPHRASE_FILE, passphrase.get_secret_value().encode() + b"\n")
        facts = {"format": FORMAT, "id": str(vault_id), "name": name}
        write_file(directory / "vault.json", (json.dumps(facts, indent=2) + "\n").encode(), mode=PUBLIC_MODE)
        return vault

    @classmethod
    def load(cls, directory: Path) -> Vault:
        """Open the vault in `directory`.

        Raises:
            PermanentError: there is none, its files are damaged, or its secrets may be read by others.
        """
        hint = f"make one: `config-server init --vault NAME --directory {directory}`"
        facts_data = read_file(directory / "vault.json", what="the vault", hint=hint)
        try:
            facts = json.loads(facts_data)
            vault_format, vault_id, name = facts["format"], uuid.UUID(facts["id"]), str(facts["name"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise PermanentError(f"{directory / 'vault.json'} is damaged", hint=_RESTORE, path=str(directory)) from None
        if vault_format != FORMAT:
            raise PermanentError(
                f"the vault in {directory} has format {vault_format}; this version knows {FORMAT}",
                hint="run the version of config-server that made it, or a newer one",
            )
        authority = Authority.from_pem(
            read_file(directory / "authority" / "key.pem", what="the authority's key", hint=_RESTORE, secret=True),
            read_file(directory / "authority" / "certificate.pem", what="the authority's certificate", hint=_RESTORE),
        )
        key = VaultKey.read(directory / VAULT_KEY_FILE, hint=_RESTORE)
        return cls(
            directory,
            vault_id,
            name,
            authority,
            key,
            _secret(directory / "enrolment.key", "the enrolment key", KEY_BYTES),
        )

    def wrap(self, data_key: bytes) -> bytes:
        """A data key under the vault's key, by RFC 3394: 8 bytes longer."""
        return self.key.wrap(data_key)

    def unwrap(self, wrapped_key: bytes) -> bytes:
        """The data key of its wrapped form.

        Raises:
            CorruptionError: it was not wrapped by this vault's key, or was changed since.
        """
        return self.key.unwrap(wrapped_key)

    def new_data_key(self) -> bytes:
        """A new data key, wrapped."""
        return self.wrap(secrets.token_bytes(DATA_KEY_BYTES))

    def revealed(self, wrapped_key: bytes) -> SecretStr:
        """The data key as messages carry it, in base64."""
        return SecretStr(base64.b64encode(self.unwrap(wrapped_key)).decode())


def new_passphrase() -> SecretStr:
    """A passphrase nobody can guess: eight groups of four letters and digits."""
    text = base64.b32encode(secrets.token_bytes(PASSPHRASE_BYTES)).decode().lower()
    return SecretStr("-".join(text[start : start + 4] for start in range(0, len(text), 4)))


def _secret(path: Path, what: str, length: int) -> bytes:
    data = read_file(path, what=what, hint=_RESTORE, secret=True)
    if len(data) != length:
        raise PermanentError(f"{what} at {path} is {len(data)} bytes, not {length}", hint=_RESTORE, path=str(path))
    return data
