"""Azure Key Vault (or a managed HSM) as the holder of the vault's key: it wraps and unwraps, and its key never leaves.

The vault's key is 32 bytes; Key Vault wraps them with RSA-OAEP-256, or with AES key wrap where the key is an HSM's
symmetric one. So machines' data keys are wrapped as they always are, formats know nothing of Key Vault, and it is asked
when a vault is opened and at no other time. Taking the right to use that key away keeps the config server from starting
again; process servers that run go on.

Who asks is whatever identity this host has (`DefaultAzureCredential`: environment, workload identity, managed identity,
Azure CLI); it needs the right to wrap and unwrap keys, for example as "Key Vault Crypto User".

Weak: tried against a local server that speaks the documented REST interface, and never yet against Azure itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from azure.core.exceptions import AzureError, HttpResponseError

from replicar.errors import PermanentError, ReplicarError, TransientError

#: Names of what is asked for: RSA keys wrap by the first, symmetric keys of an HSM by the second.
RSA_ALGORITHM: Final = "RSA-OAEP-256"
OCT_ALGORITHM: Final = "A256KW"
_TIMEOUT_SECONDS: Final = 10
_RETRIES: Final = 2

_T = TypeVar("_T")


class KeyVault:
    """A `vault_key.Holder`.

    Args:
        credential: who asks; this host's own identity unless given.
        options: for the libraries' clients, for example whom to believe.
    """

    def __init__(self, credential: Any = None, options: Mapping[str, Any] | None = None) -> None:
        try:
            from azure.identity import DefaultAzureCredential
            from azure.keyvault import keys
        except ImportError:
            raise PermanentError(
                "the vault's key is held by Azure Key Vault, but the libraries for that are not installed",
                hint="pip install 'replicar[azure]'",
            ) from None
        self._keys = keys
        self._credential = credential or DefaultAzureCredential()
        # Hanging for minutes at a start helps nobody: a supervisor starts again.
        limits = {"retry_total": _RETRIES, "connection_timeout": _TIMEOUT_SECONDS, "read_timeout": _TIMEOUT_SECONDS}
        self._options = {**limits, **(options or {})}

    def wrap(self, name: str, plain: bytes) -> tuple[str, str, bytes]:
        """See `Holder`. `name`: the key's URL, with or without a version.

        Raises:
            PermanentError: no such key, or it may not be used.
            TransientError: Key Vault is away.
        """
        host, key_name, version = _parts(name)

        def work() -> tuple[str, str, bytes]:
            with self._keys.KeyClient(host, self._credential, **self._options) as client:
                key = client.get_key(key_name, version or None)
            algorithm = OCT_ALGORITHM if str(key.key_type).lower().startswith("oct") else RSA_ALGORITHM
            exact = str(key.id)
            return exact, algorithm, self._crypto(exact, "wrap", algorithm, plain)

        return _asked(name, "wrap", work)

    def unwrap(self, name: str, algorithm: str, wrapped: bytes) -> bytes:
        """See `Holder`; raises as `wrap` does."""
        if algorithm not in (RSA_ALGORITHM, OCT_ALGORITHM):
            raise PermanentError(
                f"the vault's key is wrapped by {algorithm!r}, which is not known here", hint="upgrade this part"
            )
        _parts(name)
        return _asked(name, "unwrap", lambda: self._crypto(name, "unwrap", algorithm, wrapped))

    def _crypto(self, name: str, what: str, algorithm: str, data: bytes) -> bytes:
        from azure.keyvault.keys.crypto import CryptographyClient, KeyWrapAlgorithm

        with CryptographyClient(name, self._credential, **self._options) as client:
            if what == "wrap":
                return bytes(client.wrap_key(KeyWrapAlgorithm(algorithm), data).encrypted_key)
            return bytes(client.unwrap_key(KeyWrapAlgorithm(algorithm), data).key)


def _parts(name: str) -> tuple[str, str, str]:
    """Key Vault's address, the key's name, its version ("" for none).

    Raises:
        PermanentError: it is no key's URL.
    """
    url = urlsplit(name)
    words = url.path.strip("/").split("/")
    if url.scheme != "https" or not url.hostname or len(words) not in (2, 3) or words[0] != "keys" or not all(words):
        raise PermanentError(
            f"{name!r} is no key of Azure Key Vault",
            hint="it looks like https://NAME.vault.azure.net/keys/KEY",
            key=name,
        )
    return f"https://{url.netloc}", words[1], words[2] if len(words) == 3 else ""


def _asked(name: str, doing: str, work: Callable[[], _T]) -> _T:
    """Do it; what goes wrong leaves as one of our errors, without the library's, which may carry requests."""
    try:
        return work()
    except HttpResponseError as error:
        failure = _refused(name, doing, error)
    except (AzureError, ValueError) as error:
        failure = TransientError(
            f"Azure Key Vault did not {doing} the vault's key with {name}: {type(error).__name__}",
            hint="see whether this host reaches it, and has an identity there (AZURE_CLIENT_ID, managed identity)",
            key=name,
        )
    raise failure


def _refused(name: str, doing: str, error: HttpResponseError) -> ReplicarError:
    status = error.status_code or 0
    if status == 429 or status >= 500:
        return TransientError(f"Azure Key Vault answered {status} for {name}", hint="try again in a minute", key=name)
    hint = {
        401: "this host's identity is none that the key vault knows",
        403: "give this host's identity the rights to get, wrap and unwrap keys (role Key Vault Crypto User); a key "
        "that is disabled or expired is refused as well",
        404: "see whether the key was deleted: it can be recovered while soft delete keeps it",
    }.get(status, "look at the key in the portal")
    return PermanentError(
        f"Azure Key Vault refuses to {doing} the vault's key with {name} (status {status})", hint=hint, key=name
    )
