"""The vault's key: what wraps every machine's data key (AES key wrap, RFC 3394), and the former ones that once did.

It is kept in one file, `vault.key`, in one of two forms. Plain: 32 bytes for each key, the present one first. Held by
Azure Key Vault: JSON that names, for each key in the same order, the Key Vault key that wraps it; then the file alone
opens nothing. Whoever has the file (and, for the second form, may use the Key Vault key) and the container can recover
every machine, without the config server.

Which of the keys wrapped something is found by trying: unlike AES-GCM, key wrap is bound to its key by 64 bits of its
own that have to come out right. Former keys are kept so that wrapped keys in the headers of older log blobs can still
be opened, until `replicar rewrap` has replaced those.

Weak: the plain keys are in this process's memory while it runs, and Python can't promise to wipe what it has let go.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from cryptography.hazmat.primitives import keywrap

from replicar.control.files import read_file, write_file
from replicar.errors import CorruptionError, LimitError, PermanentError

KEY_BYTES: Final = 32
#: A rotation a month for five years, with some to spare.
MAX_KEYS: Final = 64
KEY_VAULT: Final = "azure-key-vault"
_FORMAT: Final = 1


class Holder(Protocol):
    """Who wraps the vault's key itself: Azure Key Vault, see `key_vault`."""

    def wrap(self, name: str, plain: bytes) -> tuple[str, str, bytes]:
        """Wrap with the key of that name: the exact version's name, the algorithm, the wrapped form."""
        ...

    def unwrap(self, name: str, algorithm: str, wrapped: bytes) -> bytes:
        """The plain form of what `wrap` gave."""
        ...


@dataclass(frozen=True, slots=True)
class VaultKey:
    """The vault's keys, the present one first. `held_by`: the Key Vault key that wraps them in the file, or nothing."""

    keys: tuple[bytes, ...] = field(repr=False)
    held_by: str = ""

    @classmethod
    def new(cls) -> VaultKey:
        return cls((secrets.token_bytes(KEY_BYTES),))

    @classmethod
    def read(cls, path: Path, *, hint: str = "", holder: Callable[[], Holder] | None = None) -> VaultKey:
        """The key in a file of either form.

        Args:
            holder: makes what unwraps the second form; by default Azure Key Vault with the identity of where this runs.

        Raises:
            PermanentError: it is missing, may be read by others, holds something else, or Key Vault refuses.
            TransientError: Key Vault is away.
        """
        data = read_file(path, what="the vault's key", hint=hint, secret=True)
        described = _described(data)
        if described is not None:
            return _unwrapped(path, described, holder or _key_vault)
        if not data or len(data) % KEY_BYTES or len(data) > MAX_KEYS * KEY_BYTES:
            raise PermanentError(
                f"the vault's key at {path} is {len(data)} bytes, not {KEY_BYTES} for each of its keys",
                hint=hint or "it must be the vault.key of a vault's directory",
                path=str(path),
            )
        return cls(tuple(data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES)))

    def save(self, path: Path, *, holder: Callable[[], Holder] | None = None) -> None:
        """Write it in its form, replacing what is there at once.

        Raises:
            PermanentError: it can't be written, or Key Vault refuses.
            TransientError: Key Vault is away.
        """
        if not self.held_by:
            write_file(path, b"".join(self.keys))
            return
        keeper = (holder or _key_vault)()
        entries = []
        for key in self.keys:
            name, algorithm, wrapped = keeper.wrap(self.held_by, key)
            entries.append({"key": name, "algorithm": algorithm, "wrapped": base64.b64encode(wrapped).decode()})
        facts = {"format": _FORMAT, "provider": KEY_VAULT, "held_by": self.held_by, "keys": entries}
        write_file(path, (json.dumps(facts, indent=2) + "\n").encode())

    def rotated(self) -> VaultKey:
        """A new present key, the others behind it.

        Raises:
            LimitError: there are too many.
        """
        if len(self.keys) >= MAX_KEYS:
            raise LimitError(
                f"the vault has {len(self.keys)} keys; {MAX_KEYS} is the limit",
                hint="run `replicar rewrap`, then `config-server vault-key forget`",
            )
        return VaultKey((secrets.token_bytes(KEY_BYTES), *self.keys), self.held_by)

    def present(self) -> VaultKey:
        """Without the former keys."""
        return VaultKey(self.keys[:1], self.held_by)

    def wrap(self, data_key: bytes) -> bytes:
        """A data key under the present key: 8 bytes longer."""
        return keywrap.aes_key_wrap(self.keys[0], data_key)

    def unwrap(self, wrapped: bytes) -> bytes:
        """The data key of its wrapped form.

        Raises:
            CorruptionError: none of these keys wrapped it, or it was changed since.
        """
        for key in self.keys:
            try:
                return keywrap.aes_key_unwrap(key, wrapped)
            except (keywrap.InvalidUnwrap, ValueError):
                continue
        raise CorruptionError(
            "a data key was not wrapped by this vault's key",
            hint="registry.sqlite and vault.key must come from the same backup",
        )

    def opens(self, wrapped: bytes) -> bool:
        """Whether any of the keys wrapped it."""
        return any(VaultKey((key,)).is_present(wrapped) for key in self.keys)

    def is_present(self, wrapped: bytes) -> bool:
        """Whether the present key wrapped it."""
        try:
            keywrap.aes_key_unwrap(self.keys[0], wrapped)
        except (keywrap.InvalidUnwrap, ValueError):
            return False
        return True


def _described(data: bytes) -> dict[str, Any] | None:
    """The file's second form; None for the first. That random bytes are such an object can't be."""
    try:
        facts = json.loads(data)
    except ValueError:
        return None
    return facts if isinstance(facts, dict) and "provider" in facts else None


def _unwrapped(path: Path, facts: dict[str, Any], holder: Callable[[], Holder]) -> VaultKey:
    damaged = PermanentError(
        f"the vault's key at {path} is damaged, or of a later version",
        hint="restore it from the backup of the vault's directory",
        path=str(path),
    )
    if facts.get("format") != _FORMAT or facts.get("provider") != KEY_VAULT:
        raise damaged
    try:
        held_by = str(facts["held_by"])
        entries = [
            (str(each["key"]), str(each["algorithm"]), base64.b64decode(each["wrapped"], validate=True))
            for each in facts["keys"]
        ]
    except (KeyError, TypeError, binascii.Error, ValueError):
        raise damaged from None
    if not 0 < len(entries) <= MAX_KEYS:
        raise damaged
    keeper = holder()
    keys = tuple(keeper.unwrap(*entry) for entry in entries)
    if any(len(key) != KEY_BYTES for key in keys):
        raise damaged
    return VaultKey(keys, held_by)


def _key_vault() -> Holder:
    # Not above: few vaults are held there, and its libraries are an extra.
    from replicar.control.key_vault import KeyVault

    return KeyVault()
