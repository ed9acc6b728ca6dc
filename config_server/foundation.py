"""Founding a vault, and what is made where the vault lies: registration keys and operators' identities.

All of it works on the vault's directory alone, with the config server running or not. A vault is built beside its
place and renamed into it, so that there is a whole one or none.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sqlite3
import uuid
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from config_server import parties
from config_server.registry import Registry
from config_server.vault import (
    IDENTITY_DIRECTORY,
    OPERATOR_DIRECTORY,
    REGISTRATION_FILE,
    REGISTRY_FILE,
    SETTINGS_FILE,
    Vault,
)
from replicar.clock import Clock
from replicar.control.enrolment import RegistrationKey
from replicar.control.files import PUBLIC_MODE, make_directory, sync_directory, write_file
from replicar.control.identity import Identity, Role, new_key, signing_request
from replicar.control.message import NAME_PATTERN
from replicar.control.proofs import registration_digest
from replicar.control.transport import parse_address
from replicar.errors import PermanentError

KEY_BYTES: Final = 32
CONFIG_SERVER: Final = "config-server"
OPERATOR: Final = "operator"


def found_vault(directory: Path, name: str, *, address: str, listen: str, port: int, clock: Clock) -> Vault:
    """Make a vault in `directory`: its secrets, registry, identities, a registration key and a settings file.

    Raises:
        PermanentError: the name or address is none, or the directory holds something.
    """
    check_name(name, "a vault")
    parse_address(address)
    directory = directory.absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PermanentError(f"{directory} is not empty", hint="choose an empty or new directory", path=str(directory))
    building = directory.with_name(f".{directory.name}.{secrets.token_hex(6)}")
    try:
        _build(building, name, address, listen, port, clock)
        os.rename(building, directory)  # onto nothing, or onto an empty directory
    except OSError as error:
        hint = "choose another directory"
        raise PermanentError(f"can't make {directory}: {error.strerror}", hint=hint, path=str(directory)) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    sync_directory(directory.parent)
    return Vault.load(directory)


def new_registration_key(vault: Vault, registry: Registry, file: Path, clock: Clock) -> RegistrationKey:
    """A key that admits process servers for five days, written to `file` (0600); only its hash is kept here."""
    key_id, key, now_ns = str(uuid.uuid4()), SecretStr(secrets.token_urlsafe(KEY_BYTES)), clock.now_ns()
    expires_ns = registry.run(
        lambda connection: parties.record_registration_key(connection, key_id, registration_digest(key), now_ns)
    )
    registration = RegistrationKey(vault.name, key_id, key, expires_ns)
    registration.save(file)
    return registration


def new_identity(
    vault: Vault, registry: Registry, role: Role, name: str, directory: Path, *, address: str, clock: Clock
) -> Identity:
    """An identity made where the vault is, saved in `directory`; a name that is known gets a new one in its place.

    Raises:
        PermanentError: it is no name, or the directory can't be written.
    """
    check_name(name, f"an {role}" if role in (Role.OPERATOR, Role.AUDITOR) else f"a {role}")
    key_pem, now_ns = new_key(), clock.now_ns()
    make_directory(directory)

    def enter(connection: sqlite3.Connection) -> tuple[parties.Party, bytes]:
        party = parties.admit(connection, role, name, now_ns)
        certificate = vault.authority.issue(signing_request(key_pem), role, party.id, now_ns)
        parties.record_certificate(connection, party.id, certificate)
        parties.audit(connection, party.id, "identity", f"{role} {name}", now_ns)
        return party, certificate.pem

    party, certificate_pem = registry.run(enter)
    return Identity(
        id=party.id,
        role=role,
        name=name,
        config_server=address,
        vault=vault.name,
        vault_id=vault.id,
        incarnation=party.incarnation,
        certificate_pem=certificate_pem,
        authority_pem=vault.authority.certificate_pem,
        key_pem=key_pem,
    ).save(directory)


def check_name(name: str, what: str) -> None:
    """Raises:
    PermanentError: it is no name.
    """
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise PermanentError(
            f"{name!r} is no name for {what}",
            hint="use 1 to 63 letters, digits, dots, dashes or underscores, beginning with a letter or digit",
        )


def _build(directory: Path, name: str, address: str, listen: str, port: int, clock: Clock) -> None:
    vault = Vault.create(directory, name, clock.now_ns())
    registry = Registry(directory / REGISTRY_FILE)
    try:
        for role, known_as, place in (
            (Role.CONFIG_SERVER, CONFIG_SERVER, IDENTITY_DIRECTORY),
            (Role.OPERATOR, OPERATOR, OPERATOR_DIRECTORY),
        ):
            new_identity(vault, registry, role, known_as, directory / place, address=address, clock=clock)
        new_registration_key(vault, registry, directory / REGISTRATION_FILE, clock)
    finally:
        registry.close()
    lines = (
        "# Settings of `config-server run`; see `config-server run --help`.",
        f"listen = {json.dumps(listen)}",  # a JSON string is a TOML string
        f"port = {port}",
        f"address = {json.dumps(address)}  # where the other parts reach it",
    )
    write_file(directory / SETTINGS_FILE, ("\n".join(lines) + "\n").encode(), mode=PUBLIC_MODE)
