"""Where page blobs go: the settings of a storage account, checked before anything is sent.

The credential is exactly one of: the account's key, a shared access signature, a connection string, an Azure identity
of this host. Secrets may stand in the settings (from the environment, say) or, better, in a file that the settings
name, since a file can be kept from others and does not show in a process's environment. Secrets are `SecretStr`, so
neither `repr` nor an error shows them; what a file held is read when the store is opened and not kept here.

Settings that can't be honoured are refused with a `PermanentError` that says which and why, never ignored.
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from random import Random, SystemRandom
from typing import Annotated, Final, Self
from urllib.parse import urlsplit

from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from replicar.clock import Clock, SystemClock
from replicar.errors import PermanentError
from replicar.storage.entra import Kind, credential
from replicar.storage.limits import LimitedStore
from replicar.storage.retry import DEFAULT_POLICY, RetryingStore, RetryPolicy, RetryTally
from replicar.storage.route import Route, basic, check_connect_to, check_proxy
from replicar.storage.signing import Credential
from replicar.storage.store import PageBlobStore

#: A credential file longer than this is some other file.
MAX_CREDENTIAL_BYTES: Final = 16 << 10
_CONTAINER = re.compile(r"[a-z0-9](?:-?[a-z0-9])+")
_KINDS = ("account_key", "shared_access_signature", "connection_string")


@dataclass(frozen=True, slots=True)
class _Access:
    url: str
    credential: Credential


class StorageTarget(BaseModel):
    """One container of one storage account; see the module for the rules."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    container: Annotated[str, Field(description="name of the container that holds the log")]
    endpoint: Annotated[
        str | None, Field(description="the account's blob endpoint, e.g. https://NAME.blob.core.windows.net")
    ] = None
    account_name: Annotated[str | None, Field(description="the storage account; goes with an account key")] = None
    account_key: SecretStr | None = None
    account_key_file: Path | None = None
    shared_access_signature: SecretStr | None = None
    shared_access_signature_file: Path | None = None
    connection_string: SecretStr | None = None
    connection_string_file: Path | None = None
    identity: Annotated[
        Kind | None, Field(description="an Azure identity of this host instead of a secret: default, managed, workload")
    ] = None
    identity_client_id: Annotated[str | None, Field(description="which identity, where this host has several")] = None
    proxy: Annotated[str | None, Field(description="HTTP proxy to go through by CONNECT, http://HOST:PORT")] = None
    proxy_credentials_file: Annotated[Path | None, Field(description="NAME:PASSWORD for the proxy; mode 0600")] = None
    connect_to: Annotated[
        str | None, Field(description="address of a private endpoint, where DNS does not know it; TLS checks the name")
    ] = None
    authority_file: Annotated[
        Path | None, Field(description="PEM certificate(s) to believe instead of the system's; for Azure Stack Hub")
    ] = None
    api_version: Annotated[
        str | None, Field(description="storage API version; 2019-07-07 for Azure Stack Hub, else leave it out")
    ] = None

    @model_validator(mode="after")
    def _make_sense(self) -> Self:
        given = [name for kind in _KINDS for name in (kind, f"{kind}_file") if getattr(self, name) is not None]
        given += ["identity"] if self.identity is not None else []
        if len(given) != 1:
            raise PermanentError(
                "storage: there is no credential" if not given else f"storage: {' and '.join(given)} are both set",
                hint="set exactly one of account_key_file, shared_access_signature_file and connection_string_file "
                "(or one of them without _file), or identity",
            )
        if len(self.container) > 63 or len(self.container) < 3 or not _CONTAINER.fullmatch(self.container):
            raise PermanentError(
                f"storage: {self.container!r} is no container name",
                hint="use 3 to 63 lower-case letters, digits and single dashes",
            )
        if given[0].startswith("connection_string"):
            if self.endpoint is not None or self.account_name is not None:
                raise PermanentError(
                    "storage: the connection string already says endpoint and account name",
                    hint="remove endpoint and account_name, or use an account key instead",
                )
        elif self.endpoint is None:
            raise PermanentError("storage: endpoint is not set", hint="set it to the account's blob endpoint")
        else:
            check_endpoint(self.endpoint)
            if given[0].startswith("account_key") and not self.account_name:
                raise PermanentError("storage: an account key needs account_name")
            if given == ["identity"] and not self.endpoint.startswith("https:"):
                raise PermanentError("storage: an identity's token is sent over https only")
        self._check_route()
        return self

    def _check_route(self) -> None:
        if self.identity_client_id is not None and self.identity is None:
            raise PermanentError("storage: identity_client_id goes with identity")
        if self.proxy_credentials_file is not None and self.proxy is None:
            raise PermanentError("storage: proxy_credentials_file goes with proxy")
        if self.proxy is not None and self.connect_to is not None:
            raise PermanentError(
                "storage: proxy and connect_to are both set",
                hint="leave connect_to out: the proxy finds the address",
            )
        if self.proxy is not None:
            check_proxy(self.proxy)
        if self.connect_to is not None:
            if self.endpoint is None:
                raise PermanentError("storage: connect_to goes with endpoint, not with a connection string")
            check_connect_to(self.connect_to, self.endpoint)

    def access(self) -> _Access:
        """Endpoint and credential, read from the files that the settings name.

        Raises:
            PermanentError: a file is missing, empty, or does not hold what it should.
        """
        if self.identity is not None:
            return _Access((self.endpoint or "").rstrip("/"), credential(self.identity, self.identity_client_id))
        kind, secret = self._secret()
        if kind == "connection_string":
            return _read_connection_string(secret)
        url = (self.endpoint or "").rstrip("/")
        if kind == "shared_access_signature":
            return _Access(url, AzureSasCredential(secret.lstrip("?")))
        return _Access(url, _named_key(self.account_name or "", secret))

    def trust(self) -> ssl.SSLContext:
        """Whom to believe: `authority_file`, else the system's authorities."""
        if self.authority_file is not None and not self.authority_file.is_file():
            raise PermanentError(f"storage: there is no authority_file {self.authority_file}")
        try:
            context = ssl.create_default_context(cafile=self.authority_file)
        except (ssl.SSLError, OSError) as error:
            raise PermanentError(
                f"storage: authority_file {self.authority_file} holds no readable certificate", hint="it must be PEM"
            ) from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # what Azure Stack Hub speaks
        return context

    def route(self) -> Route:
        """How connections are made.

        Raises:
            PermanentError: the proxy's credentials can't be read.
        """
        authorization = None
        if self.proxy_credentials_file is not None:
            name = "proxy_credentials_file"
            text = _filled(_read_secret(self.proxy_credentials_file, name), f"{name} {self.proxy_credentials_file}")
            if ":" not in text:
                raise PermanentError(f"storage: {name} {self.proxy_credentials_file} holds no NAME:PASSWORD")
            authorization = basic(text)
        return Route(self.proxy, authorization, self.connect_to)

    def _secret(self) -> tuple[str, str]:
        for kind in _KINDS:
            direct: SecretStr | None = getattr(self, kind)
            path: Path | None = getattr(self, f"{kind}_file")
            if direct is not None:
                return kind, _filled(direct.get_secret_value(), kind)
            if path is not None:
                return kind, _filled(_read_secret(path, f"{kind}_file"), f"{kind}_file {path}")
        raise AssertionError("a target without a credential was refused when it was made")


def open_store(
    target: StorageTarget,
    *,
    clock: Clock | None = None,
    random: Random | None = None,
    policy: RetryPolicy = DEFAULT_POLICY,
    tally: RetryTally | None = None,
) -> PageBlobStore:
    """The store a part works with: retries around limits around Azure, so that every retry is paced as well.

    Nothing is sent yet; close it (or use it as a context manager) when done.

    Raises:
        PermanentError: the settings name a file that is missing or holds something else.
    """
    # Not above: it takes longer to import than most commands run, and few of them speak to storage.
    from replicar.storage.azure import AzureBlobStore

    clock = clock or SystemClock()
    access = target.access()
    try:
        azure = AzureBlobStore(
            *(access.url, target.container, access.credential),
            trust=target.trust(),
            api_version=target.api_version,
            route=target.route(),
        )
    except ValueError as error:
        raise PermanentError(
            f"storage: api_version {target.api_version!r} is not known", hint="use one like 2019-07-07, or leave it out"
        ) from error
    limited = LimitedStore(azure, clock=clock)
    return RetryingStore(limited, clock=clock, random=random or SystemRandom(), policy=policy, tally=tally)


def check_endpoint(endpoint: str) -> None:
    """Refuse an endpoint that isn't HTTPS (but for this machine itself), or that carries anything besides its place."""
    parts = urlsplit(endpoint)
    if parts.query or parts.fragment or parts.username or parts.password:
        raise PermanentError(
            "storage: the endpoint holds more than scheme, host and path",
            hint="put a shared access signature into shared_access_signature_file, not into the endpoint",
        )
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise PermanentError(f"storage: {endpoint!r} is no endpoint", hint="it looks like https://NAME.blob.HOST")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise PermanentError(
            f"storage: {endpoint} would go out unprotected", hint="use https; http is for this machine only"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_secret(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(MAX_CREDENTIAL_BYTES + 1)
    except OSError as error:
        raise PermanentError(
            f"storage: can't read {name} {path}: {error.strerror}", hint="check the path and whose file it is"
        ) from None
    if mode & 0o077:
        raise PermanentError(
            f"storage: {name} {path} may be read by others (mode {mode:04o})",
            hint=f"if nobody else has had it, run: chmod 600 {path}",
        )
    if len(data) > MAX_CREDENTIAL_BYTES or not data.isascii():
        raise PermanentError(
            f"storage: {name} {path} holds no credential", hint="it must hold just the secret, as text"
        )
    return data.decode("ascii")


def _filled(text: str, what: str) -> str:
    if not text.strip():
        raise PermanentError(f"storage: {what} is empty")
    return text.strip()


def _named_key(name: str, key: str) -> AzureNamedKeyCredential:
    if not re.fullmatch(r"[A-Za-z0-9+/]{4,}={0,2}", key) or len(key) % 4:
        raise PermanentError(
            f"storage: the account key of {name} is not base64", hint="copy it whole, as the portal shows it"
        )
    return AzureNamedKeyCredential(name, key)


def _read_connection_string(text: str) -> _Access:
    pairs = [part.split("=", 1) for part in text.strip().strip(";").split(";")]
    if any(len(pair) != 2 for pair in pairs):
        raise PermanentError("storage: the connection string is not made of NAME=VALUE; pairs")
    values = {name.strip().lower(): value.strip() for name, value in pairs}
    account, key, signature = (values.get(name) for name in ("accountname", "accountkey", "sharedaccesssignature"))
    url = values.get("blobendpoint", "").rstrip("/")
    if not url and account:
        scheme = values.get("defaultendpointsprotocol", "https")
        url = f"{scheme}://{account}.blob.{values.get('endpointsuffix', 'core.windows.net')}"
    if not url:
        raise PermanentError("storage: the connection string names neither BlobEndpoint nor AccountName")
    check_endpoint(url)
    if bool(account and key) == bool(signature):
        raise PermanentError(
            "storage: the connection string must hold either AccountName and AccountKey or SharedAccessSignature"
        )
    if signature:
        return _Access(url, AzureSasCredential(signature.lstrip("?")))
    return _Access(url, _named_key(account or "", key or ""))
