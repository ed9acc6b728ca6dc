"""The vault's key in its two forms: plain, and held by Azure Key Vault (a mock of it; see `key_vault_server`)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from azure.core.credentials import AccessToken

from replicar.control.files import write_file
from replicar.control.key_vault import KeyVault
from replicar.control.vault_key import MAX_KEYS, VaultKey
from replicar.errors import CorruptionError, LimitError, PermanentError, TransientError
from tests.control.key_vault_server import TOKEN, KeyVaultServer


def test_a_plain_file_holds_the_present_key_and_the_former_ones(tmp_path: Path) -> None:
    path, data_key = tmp_path / "vault.key", os.urandom(32)
    first = VaultKey.new()
    wrapped = first.wrap(data_key)
    second = first.rotated()
    second.save(path)
    read = VaultKey.read(path)
    assert path.read_bytes() == second.keys[0] + first.keys[0]
    assert read == second
    assert read.unwrap(wrapped) == data_key
    assert (read.is_present(wrapped), read.opens(wrapped)) == (False, True)
    assert read.is_present(read.wrap(data_key))
    with pytest.raises(CorruptionError, match="not wrapped by this vault's key"):
        read.present().unwrap(wrapped)


def test_a_key_shows_in_no_repr() -> None:
    key = VaultKey.new()
    assert key.keys[0].hex() not in repr(key)
    assert repr(key.keys[0]) not in repr(key)


def test_rotations_have_a_limit() -> None:
    with pytest.raises(LimitError, match="64 is the limit"):
        VaultKey(tuple(os.urandom(32) for _ in range(MAX_KEYS))).rotated()


@pytest.mark.parametrize("data", [b"", bytes(31), bytes(33), bytes(32 * (MAX_KEYS + 1)), b'{"provider": "other"}'])
def test_what_is_no_vaults_key_is_refused(tmp_path: Path, data: bytes) -> None:
    write_file(tmp_path / "vault.key", data)
    with pytest.raises(PermanentError):
        VaultKey.read(tmp_path / "vault.key", holder=lambda: pytest.fail("nothing to ask"))


# --- held by Key Vault ---


class Credential:
    """Gives the token that the mock believes, as this host's managed identity would give a real one."""

    def get_token(self, *scopes: str, **_: Any) -> AccessToken:
        assert scopes == ("https://vault.azure.net/.default",)
        return AccessToken(TOKEN, int(time.time()) + 3600)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[KeyVaultServer]:
    with KeyVaultServer(tmp_path) as running:
        yield running


def holder(server: KeyVaultServer) -> KeyVault:
    # The challenge names vault.azure.net, and the mock is elsewhere; in earnest that is refused, and stays so.
    options = {
        "connection_verify": str(server.authority_file),
        "verify_challenge_resource": False,
        "retry_total": 0,
    }
    return KeyVault(Credential(), options)


def test_held_by_key_vault_the_file_alone_opens_nothing(server: KeyVaultServer, tmp_path: Path) -> None:
    path, key = tmp_path / "vault.key", VaultKey(VaultKey.new().rotated().keys, server.key_url)
    key.save(path, holder=lambda: holder(server))
    held = path.read_bytes()
    assert not any(each in held or each.hex().encode() in held for each in key.keys)
    assert VaultKey.read(path, holder=lambda: holder(server)) == key
    assert server.calls.count("unwrapkey 1") == 2


def test_a_new_version_of_the_key_is_taken_up_and_the_old_one_still_opens(
    server: KeyVaultServer, tmp_path: Path
) -> None:
    path, key = tmp_path / "vault.key", VaultKey(VaultKey.new().keys, server.key_url)
    key.save(path, holder=lambda: holder(server))
    server.rotate()
    assert VaultKey.read(path, holder=lambda: holder(server)) == key
    assert server.calls[-1] == "unwrapkey 1"
    key.rotated().save(path, holder=lambda: holder(server))
    VaultKey.read(path, holder=lambda: holder(server))
    assert server.calls[-1] == "unwrapkey 2"


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [(403, PermanentError, "Crypto User"), (404, PermanentError, "deleted"), (503, TransientError, "again")],
)
def test_key_vaults_refusals_are_errors_that_say_what_to_do(
    server: KeyVaultServer, tmp_path: Path, status: int, error: type[PermanentError], words: str
) -> None:
    path = tmp_path / "vault.key"
    VaultKey(VaultKey.new().keys, server.key_url).save(path, holder=lambda: holder(server))
    server.refuse = status
    with pytest.raises(error) as caught:
        VaultKey.read(path, holder=lambda: holder(server))
    assert words in caught.value.hint
    assert TOKEN not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize("name", ["http://x/keys/k", "https://x/secrets/k", "https://x/keys/", "vault-key"])
def test_what_is_no_key_of_key_vault_is_refused_before_anybody_is_asked(name: str) -> None:
    with pytest.raises(PermanentError, match="is no key of Azure Key Vault"):
        KeyVault(Credential()).wrap(name, bytes(32))
