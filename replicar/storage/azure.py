"""Page blobs of Azure, Azure Stack Hub and Azurite, through Microsoft's client.

The client is used for what it knows (signatures, URLs, XML) and held back where it costs. What was measured on the way:

- a CA file given to the client itself makes it build a new TLS context for *every request*; ours is built once and
  lives in the session's connector;
- its retries are off: `retry.py` decorates, with a deadline, one jitter, and the rule for uncertain outcomes;
- `download_blob` on a page blob asks for the whole blob's page ranges after every read, which a fragmented blob answers
  slowly or not at all, and retries a torn body three times by itself, a second apart. `OneRequestTransport` stops both;
- aiohttp below it repeats a PUT by itself when the service hangs up, which the rule for uncertain outcomes forbids;
  the same transport stops that;
- its HTTP logger is replaced by one that is off, so no request pays for a log line and no URL reaches a log;
- pages are written past it altogether, by `uplink`: the client's two milliseconds of Python a request were a third of
  what a process server spends. Content validation is off in both, since segments are sealed.

Every failure leaves through `_ask` as an error of our tree and *without* the library's exception as its cause or
context: those can carry the URL, and with it a shared access signature.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import OrderedDict
from collections.abc import Awaitable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast
from urllib.parse import quote

import aiohttp
from azure.core import MatchConditions
from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
from azure.core.exceptions import AzureError, HttpResponseError
from azure.storage.blob import BlobProperties, SequenceNumberAction
from azure.storage.blob.aio import BlobClient, BlobLeaseClient, ContainerClient

from replicar.errors import ConflictError, PermanentError, ReplicarError
from replicar.storage.outcomes import NO_LEASE_CODES, answer_error, copied, no_answer, past_end, untrusted
from replicar.storage.route import STRAIGHT, Route
from replicar.storage.signing import Credential, signer_for
from replicar.storage.store import (
    BLOB_MISSING,
    COPY_OF,
    BlobInfo,
    Blobs,
    CopySource,
    Pages,
    Ranges,
    is_gone,
    is_missing,
    merge_ranges,
)
from replicar.storage.transport import OneRequestTransport
from replicar.storage.uplink import NotConnectedError, Uplink

#: Blob clients kept, one a name; making one costs about a tenth of a millisecond.
MAX_CLIENTS: Final = 256
CONNECT_TIMEOUT_SECONDS: Final = 10.0
#: One request, whole. Azure gives up on a Put Page itself after 30 s and a slow line needs 4 MiB of time.
REQUEST_TIMEOUT_SECONDS: Final = 60.0
#: Largest read in a single request; longer ones are split by the client.
SINGLE_READ_BYTES: Final = 64 << 20
#: No lease period: held until released or broken.
_INFINITE = -1

_T = TypeVar("_T")

_SILENT = logging.Logger("replicar.storage.azure.silent", logging.CRITICAL + 1)
_SILENT.propagate = False


class AzureBlobStore:
    """A container of an account, as a `PageBlobStore`.

    Args:
        account_url: the account's blob endpoint, e.g. `https://name.blob.core.windows.net`.
        container: its name.
        credential: the account's name and key, a shared access signature, or an identity (closed with the store).
        trust: the TLS context that says whom to believe; None only for plain HTTP to this machine.
        api_version: the service's version to speak; None for the client's newest.
        route: how connections are made.
        request_timeout_seconds: when a request is given up; its outcome is uncertain then.
        list_page_size: blobs asked for in one request of a listing; None for the service's own (5,000).

    Raises:
        ValueError: the client does not know that `api_version`.
    """

    def __init__(
        self,
        account_url: str,
        container: str,
        credential: Credential,
        *,
        trust: ssl.SSLContext | None,
        api_version: str | None = None,
        route: Route = STRAIGHT,
        request_timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
        list_page_size: int | None = None,
    ) -> None:
        self._name = container
        self._timeout = request_timeout_seconds
        self._list_page_size = list_page_size
        self._blobs: OrderedDict[str, BlobClient] = OrderedDict()
        self._client = ContainerClient(
            account_url,
            container,
            credential=cast(Any, credential),  # of ours it asks no more than ours say
            api_version=api_version,
            transport=OneRequestTransport(
                trust, route, connection_timeout=CONNECT_TIMEOUT_SECONDS, read_timeout=request_timeout_seconds
            ),
            retry_total=0,
            logger=_SILENT,
            max_single_get_size=SINGLE_READ_BYTES,
        )
        self._uplink = Uplink(
            *(account_url, container, signer_for(credential)),
            trust=trust,
            version=self._client.api_version,
            request_seconds=request_timeout_seconds,
            route=route,
        )
        self._account_url = account_url.rstrip("/")
        self._signature = f"&{credential.signature}" if isinstance(credential, AzureSasCredential) else ""
        self._identity = None if isinstance(credential, AzureNamedKeyCredential | AzureSasCredential) else credential

    def __repr__(self) -> str:
        return f"AzureBlobStore(container={self._name!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        self._blobs.clear()
        await self._uplink.close()
        await self._client.close()
        if self._identity is not None:
            await self._identity.close()

    def budget_wait_seconds(self, name: str, length: int) -> float:
        return 0.0

    async def ensure_container(self) -> None:
        try:
            await self._ask("create the container", None, self._client.create_container())
        except ConflictError:
            return

    async def container_exists(self) -> bool:
        try:
            await self._ask("look at the container", None, self._client.get_container_properties())
        except PermanentError as error:
            if is_missing(error):
                return False
            raise
        return True

    async def create(self, name: str, size_bytes: int, *, metadata: Mapping[str, str] | None = None) -> None:
        # IfMissing is If-None-Match: *, without which Azure replaces the blob that is there.
        call = self._blob(name).create_page_blob(
            size_bytes, metadata=dict(metadata or {}), match_condition=MatchConditions.IfMissing
        )
        await self._ask("create the blob", name, call)

    async def put_pages(
        self,
        name: str,
        offset: int,
        data: Pages,
        *,
        lease_id: str | None = None,
        if_sequence_number_lt: int | None = None,
    ) -> None:
        call = self._uplink.put_pages(name, offset, data, lease_id, if_sequence_number_lt)
        reply = await self._ask("write pages", name, call, is_timed=True)
        if reply.status != 201:
            code = reply.headers.get("x-ms-error-code", "")
            where = {"doing": "write pages", "container": self._name, "blob": name}
            raise answer_error(reply.status, code, reply.headers, **where)

    async def clear_pages(self, name: str, offset: int, length: int, *, lease_id: str | None = None) -> None:
        await self._ask("clear pages", name, self._blob(name).clear_page(offset, length, lease=lease_id))

    async def read(self, name: str, offset: int, length: int) -> bytes:
        return await self._download(self._blob(name), name, offset, length)

    async def _download(self, client: BlobClient, name: str, offset: int, length: int) -> bytes:
        if not length:
            return b""

        async def download() -> bytes:
            stream = await client.download_blob(offset, length, validate_content=False)
            return await stream.readall()

        data = await self._ask("read", name, download())
        if len(data) != length:
            raise past_end("read", self._name, name)
        return data

    async def list(self, prefix: str) -> Blobs:
        # Azure lists in order; sorting what is sorted is cheap and spares trusting every emulator with it.
        return sorted(await self._listed(prefix, "metadata"), key=lambda info: info.name)

    async def _listed(self, prefix: str, *include: str) -> Blobs:
        infos: list[BlobInfo] = []
        blobs = self._client.list_blobs(
            name_starts_with=prefix or None, include=[*include], results_per_page=self._list_page_size
        )
        pages = blobs.by_page()
        while (page := await self._ask("list blobs", None, anext(pages, None))) is not None:
            infos.extend([_info(properties) async for properties in page])
        return infos

    async def page_ranges(self, name: str) -> Ranges:
        async def collect() -> Ranges:
            ranges = self._blob(name).list_page_ranges()
            return [
                (each.start, each.end - each.start + 1)
                async for each in ranges
                if each.start is not None and each.end is not None and not each.cleared
            ]

        return merge_ranges(await self._ask("list page ranges", name, collect()))

    async def properties(self, name: str) -> BlobInfo:
        return _info(await self._ask("look at the blob", name, self._blob(name).get_blob_properties()))

    async def set_metadata(self, name: str, metadata: Mapping[str, str], *, lease_id: str | None = None) -> None:
        call = self._blob(name).set_blob_metadata(dict(metadata), lease=lease_id)
        await self._ask("set metadata", name, call)

    async def bump_sequence_number(self, name: str, *, lease_id: str | None = None) -> int:
        call = self._blob(name).set_sequence_number(SequenceNumberAction.INCREMENT, lease=lease_id)
        answer: Mapping[str, Any] = await self._ask("raise the sequence number", name, call)
        return int(answer["blob_sequence_number"])

    async def delete(self, name: str, *, lease_id: str | None = None) -> None:
        try:
            await self._ask("delete the blob", name, self._blob(name).delete_blob(lease=lease_id))
        except PermanentError as error:
            if error.fields.get("reason") != BLOB_MISSING:
                raise
        self._blobs.pop(name, None)

    async def snapshot(
        self,
        name: str,
        *,
        metadata: Mapping[str, str] | None = None,
        lease_id: str | None = None,
        if_etag: str | None = None,
    ) -> str:
        condition: dict[str, Any] = {}
        if if_etag is not None:
            condition = {"etag": f'"{if_etag}"', "match_condition": MatchConditions.IfNotModified}
        call = self._blob(name).create_snapshot(metadata=dict(metadata or {}), lease=lease_id, **condition)
        answer: Mapping[str, Any] = await self._ask("take a snapshot", name, call)
        return str(answer["snapshot"])

    async def snapshots(self, prefix: str) -> Blobs:
        found = [info for info in await self._listed(prefix, "metadata", "snapshots") if info.snapshot is not None]
        return sorted(found, key=lambda info: (info.name, info.snapshot or ""))

    async def read_snapshot(self, name: str, snapshot: str, offset: int, length: int) -> bytes:
        client = self._client.get_blob_client(name, snapshot=snapshot)
        return await self._download(client, name, offset, length)

    async def copy(self, name: str, source: CopySource) -> bool:
        doing = "copy a snapshot"
        try:
            there = await self._ask(doing, name, self._blob(name).get_blob_properties())
        except PermanentError as error:
            if not is_gone(error):
                raise
            call = self._blob(name).start_copy_from_url(
                self._link(source), metadata={COPY_OF: str(source)}, match_condition=MatchConditions.IfMissing
            )
            begun: Mapping[str, Any] = await self._ask(doing, name, call)
            return copied(str(begun["copy_status"]), self._name, name)
        if {key.lower(): value for key, value in (there.metadata or {}).items()}.get(COPY_OF) != str(source):
            raise answer_error(409, "BlobAlreadyExists", {}, doing=doing, container=self._name, blob=name)
        return copied(str(there.copy.status), self._name, name)

    async def delete_snapshot(self, name: str, snapshot: str) -> None:
        try:
            call = self._client.get_blob_client(name, snapshot=snapshot).delete_blob()
            await self._ask("delete the snapshot", name, call)
        except PermanentError as error:
            if error.fields.get("reason") != BLOB_MISSING:
                raise

    async def acquire_lease(self, name: str, *, proposed_id: str | None = None) -> str:
        lease = BlobLeaseClient(self._blob(name), lease_id=proposed_id)
        await self._ask("take the lease", name, lease.acquire(lease_duration=_INFINITE))
        return lease.id

    async def break_lease(self, name: str) -> None:
        try:
            call = BlobLeaseClient(self._blob(name)).break_lease(lease_break_period=0)
            await self._ask("break the lease", name, call)
        except ReplicarError as error:
            if error.fields.get("code") not in NO_LEASE_CODES:
                raise

    async def release_lease(self, name: str, lease_id: str) -> None:
        await self._ask("release the lease", name, BlobLeaseClient(self._blob(name), lease_id=lease_id).release())

    async def _ask(self, doing: str, name: str | None, call: Awaitable[_T], *, is_timed: bool = False) -> _T:
        """Await one request. The error is raised outside of the handler, so nothing of the library hangs on to it.

        Args:
            is_timed: it ends in time by itself.
        """
        try:
            async with asyncio.timeout(None if is_timed else self._timeout):
                return await call
        except (AzureError, aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            failure = self._failure(doing, name, error)
        raise failure

    def _failure(self, doing: str, name: str | None, error: Exception) -> ReplicarError:
        response: Any = getattr(error, "response", None)
        if isinstance(error, HttpResponseError) and response is not None and response.status_code >= 300:
            headers: Mapping[str, str] = response.headers
            code = headers.get("x-ms-error-code") or ""
            return answer_error(response.status_code, code, headers, doing=doing, container=self._name, blob=name)
        cause = getattr(error, "inner_exception", None) or error
        if isinstance(cause, ssl.CertificateError):
            return untrusted(doing, self._name)
        # Only a connection that never came to be proves that nothing was sent.
        certain = isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | NotConnectedError)
        return no_answer(doing, self._name, name, cause=type(cause).__name__, certain=certain)

    def _link(self, source: CopySource) -> str:
        """By which the service finds a snapshot of this account; with our signature, if that is what we have."""
        place = f"{self._account_url}/{source.container or self._name}/{quote(source.name)}"
        return f"{place}?snapshot={quote(source.snapshot)}{self._signature}"

    def _blob(self, name: str) -> BlobClient:
        client = self._blobs.get(name)
        if client is None:
            client = self._client.get_blob_client(name)
            self._blobs[name] = client
            if len(self._blobs) > MAX_CLIENTS:
                self._blobs.popitem(last=False)
        else:
            self._blobs.move_to_end(name)
        return client


def _info(properties: BlobProperties) -> BlobInfo:
    modified: datetime | None = properties.last_modified  # some emulators leave it out of a listing
    return BlobInfo(
        name=str(properties.name),
        size_bytes=int(properties.size),
        metadata={key.lower(): value for key, value in (properties.metadata or {}).items()},
        leased=properties.lease.state in ("leased", "breaking"),
        last_modified_ns=None if modified is None else int(modified.timestamp()) * 1_000_000_000,
        # Quoted in an answer's header, bare in a listing.
        etag=str(properties.etag or "").strip('"'),
        snapshot=properties.snapshot or None,
    )
