"""What makes a request ours: an account's key, a shared access signature, or an identity's token, put on one request.

Microsoft's client signs too, but only what goes through its pipeline, which costs more than the bytes of a segment
do (see `uplink`). The rules are those of "Authorize with Shared Key": the verb, a few headers, all `x-ms-` headers by
name, and the path with its query, joined by newlines and hashed with the key.

The first two may be renewed while in use (their objects say so), so they are read for every request; a token is asked
for again some minutes before it ends.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from email.utils import formatdate
from typing import Final, Protocol

from azure.core.credentials import AccessToken, AzureNamedKeyCredential, AzureSasCredential

from replicar.storage.entra import SCOPE, TokenCredential

#: Before a token ends; azure-identity itself begins to renew it as early.
RENEW_SECONDS: Final = 300.0

Credential = AzureNamedKeyCredential | AzureSasCredential | TokenCredential


class Signer(Protocol):
    """Completes a request's headers (names in lower case) and query."""

    async def sign(
        self, method: str, path: str, query: Mapping[str, str], headers: dict[str, str], content_length: int
    ) -> str:
        """Add to `headers` what authorises the request; returns the query string to send."""
        ...


class SharedKey:
    """Signs with an account's key."""

    def __init__(self, credential: AzureNamedKeyCredential, *, now: Callable[[], float] = time.time) -> None:
        self._credential = credential
        self._now = now

    async def sign(
        self, method: str, path: str, query: Mapping[str, str], headers: dict[str, str], content_length: int
    ) -> str:
        name, key = self._credential.named_key
        headers["x-ms-date"] = formatdate(self._now(), usegmt=True)
        text = string_to_sign(method, name, path, query, headers, content_length)
        digest = hmac.digest(base64.b64decode(key), text.encode(), hashlib.sha256)
        headers["authorization"] = f"SharedKey {name}:{base64.b64encode(digest).decode()}"
        return _joined(query)


class SharedAccess:
    """Sends a shared access signature along."""

    def __init__(self, credential: AzureSasCredential) -> None:
        self._credential = credential

    async def sign(
        self, method: str, path: str, query: Mapping[str, str], headers: dict[str, str], content_length: int
    ) -> str:
        return f"{_joined(query)}&{self._credential.signature.lstrip('?')}"


class Bearer:
    """Sends an identity's token along."""

    def __init__(self, credential: TokenCredential, *, now: Callable[[], float] = time.time) -> None:
        self._credential = credential
        self._now = now
        self._token: AccessToken | None = None

    async def sign(
        self, method: str, path: str, query: Mapping[str, str], headers: dict[str, str], content_length: int
    ) -> str:
        if self._token is None or self._token.expires_on - self._now() < RENEW_SECONDS:
            self._token = await self._credential.get_token(SCOPE)
        headers["x-ms-date"] = formatdate(self._now(), usegmt=True)
        headers["authorization"] = f"Bearer {self._token.token}"
        return _joined(query)


def signer_for(credential: Credential) -> Signer:
    """Who signs with such a credential."""
    if isinstance(credential, AzureNamedKeyCredential):
        return SharedKey(credential)
    if isinstance(credential, AzureSasCredential):
        return SharedAccess(credential)
    return Bearer(credential)


def string_to_sign(
    method: str, account: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], content_length: int
) -> str:
    """What Shared Key hashes, for a request with no other standard headers than those it names.

    Args:
        path: as it is sent, escapes and all.
    """
    standard = (
        *("content-encoding", "content-language", "content-length", "content-md5", "content-type", "date"),
        *("if-modified-since", "if-match", "if-none-match", "if-unmodified-since", "range"),
    )
    known = {**headers, "content-length": str(content_length) if content_length else ""}
    lines = [method, *(known.get(name, "") for name in standard)]
    lines += [f"{name}:{headers[name]}" for name in sorted(headers) if name.startswith("x-ms-")]
    resource = f"/{account}{path}" + "".join(f"\n{name}:{query[name]}" for name in sorted(query))
    return "\n".join([*lines, resource])


def _joined(query: Mapping[str, str]) -> str:
    return "&".join(f"{name}={value}" for name, value in query.items())
