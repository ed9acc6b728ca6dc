"""What the sink remembers of page blobs, and what it answers: a request in, an answer out, no socket anywhere.

Remembered are names, sizes, metadata, leases and the first 512 bytes of each blob (a log's readers look there); every
other byte is zero when it is read back. So this is enough for a writer of new logs, and no storage at all: nothing that
was written can be recovered, and a writer that starts again finds its log empty.

Leases, missing blobs and `If-None-Match` are answered as Azure does, since a writer's fencing rests on them. Signatures
are not looked at.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

#: Bodies up to this are handed in whole, since they may be a blob's first page; of larger ones only the length.
KEPT_BYTES: Final = 512
MAX_BLOBS: Final = 4096
#: The largest read that is answered; nobody has a reason to read many zeros.
MAX_READ_BYTES: Final = 64 << 20
_METADATA: Final = "x-ms-meta-"


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request. Header names are in lower case; `body` is empty where it was longer than `KEPT_BYTES`."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer; `body` None has the headers speak for it (an answer to HEAD)."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(slots=True)
class _Blob:
    size_bytes: int
    metadata: dict[str, str]
    head: bytes = bytes(KEPT_BYTES)
    lease_id: str = ""
    sequence_number: int = 0
    modified: str = ""


class PageBlobs:
    """One account, whose containers are there as soon as they are asked for. `bytes_put` counts pages written."""

    def __init__(self) -> None:
        self.bytes_put = 0
        self.requests = 0
        self._blobs: dict[str, _Blob] = {}

    def answer(self, request: Request) -> Answer:
        """Do what a request asks for. Whatever the sink does not know is answered with 501."""
        self.requests += 1
        place = urlsplit(request.target)
        query = {name: values[0] for name, values in parse_qs(place.query, keep_blank_values=True).items()}
        parts = unquote(place.path).lstrip("/").split("/", 2)  # account, container, blob
        if len(parts) < 3 or query.get("restype") == "container":
            return self._container(request, parts[1] if len(parts) > 1 else "", query)
        key, operation = f"{parts[1]}/{parts[2]}", query.get("comp", "")
        blob = self._blobs.get(key)
        if request.method == "PUT" and not operation:
            return self._create(request, key, blob)
        if blob is None:
            return _failure(404, "BlobNotFound")
        found = _OPERATIONS.get((request.method, operation))
        if found is not None:
            return found(self, request, blob)
        if request.method == "DELETE" and not operation:
            if (refusal := _lease_refusal(request, blob)) is not None:
                return refusal
            del self._blobs[key]
            return Answer(202)
        return _failure(501, "NotImplemented")

    # --- containers ---

    def _container(self, request: Request, container: str, query: Mapping[str, str]) -> Answer:
        if query.get("comp") == "list" and container:
            prefix = query.get("prefix", "")
            body = self._listing(container, prefix).encode()
            return Answer(200, {"Content-Type": "application/xml"}, body)
        if request.method == "PUT":
            return Answer(201, _stamp())
        if request.method in ("GET", "HEAD"):
            return Answer(200, _stamp() | {"x-ms-lease-state": "available", "x-ms-lease-status": "unlocked"})
        return _failure(501, "NotImplemented")

    def _listing(self, container: str, prefix: str) -> str:
        start = f"{container}/{prefix}"
        rows = "".join(
            _entry(key.partition("/")[2], blob) for key, blob in sorted(self._blobs.items()) if key.startswith(start)
        )
        return (
            '<?xml version="1.0" encoding="utf-8"?>'
            f'<EnumerationResults ContainerName="{escape(container)}"><Prefix>{escape(prefix)}</Prefix>'
            f"<Blobs>{rows}</Blobs><NextMarker/></EnumerationResults>"
        )

    # --- blobs ---

    def _create(self, request: Request, key: str, there: _Blob | None) -> Answer:
        if there is not None and request.headers.get("if-none-match") == "*":
            return _failure(409, "BlobAlreadyExists")
        if there is None and len(self._blobs) == MAX_BLOBS:
            return _failure(503, "ServerBusy")
        size = int(request.headers.get("x-ms-blob-content-length", "0"))
        self._blobs[key] = _Blob(size, _metadata(request), modified=formatdate(usegmt=True))
        return Answer(201, _stamp())

    def _put(self, request: Request, blob: _Blob) -> Answer:
        if (refusal := _lease_refusal(request, blob)) is not None:
            return refusal
        start, length = _range(request)
        if start + length > blob.size_bytes:
            return _failure(416, "InvalidPageRange")
        if start == 0 and request.body:
            blob.head = request.body.ljust(KEPT_BYTES, b"\0")
        elif start == 0:
            blob.head = bytes(KEPT_BYTES)
        if request.headers.get("x-ms-page-write", "").lower() == "update":
            self.bytes_put += length
        return Answer(201, _stamp() | {"x-ms-blob-sequence-number": str(blob.sequence_number)})

    def _read(self, request: Request, blob: _Blob) -> Answer:
        headers = _properties(blob)
        if request.method == "HEAD":
            return Answer(200, headers | {"Content-Length": str(blob.size_bytes)})
        start, length = _range(request)
        length = min(length or blob.size_bytes, blob.size_bytes - start)
        if length <= 0 or length > MAX_READ_BYTES:
            return _failure(416, "InvalidRange")
        body = blob.head[start : start + length].ljust(length, b"\0")
        return Answer(206, headers | {"Content-Range": f"bytes {start}-{start + length - 1}/{blob.size_bytes}"}, body)

    def _lease(self, request: Request, blob: _Blob) -> Answer:
        action, given = request.headers.get("x-ms-lease-action", ""), request.headers.get("x-ms-lease-id", "")
        if action == "acquire":
            proposed = request.headers.get("x-ms-proposed-lease-id") or str(uuid.uuid4())
            if blob.lease_id not in ("", proposed):
                return _failure(409, "LeaseAlreadyPresent")
            blob.lease_id = proposed
            return Answer(201, _stamp() | {"x-ms-lease-id": proposed})
        if not blob.lease_id:
            return _failure(409, "LeaseNotPresentWithLeaseOperation")
        if action == "break":
            blob.lease_id = ""
            return Answer(202, _stamp() | {"x-ms-lease-time": "0"})
        if given != blob.lease_id:
            return _failure(409, "LeaseIdMismatchWithLeaseOperation")
        if action == "release":
            blob.lease_id = ""
        return Answer(200, _stamp() | {"x-ms-lease-id": given})

    def _set_metadata(self, request: Request, blob: _Blob) -> Answer:
        if (refusal := _lease_refusal(request, blob)) is not None:
            return refusal
        blob.metadata = _metadata(request)
        return Answer(200, _stamp())

    def _set_properties(self, request: Request, blob: _Blob) -> Answer:
        if (refusal := _lease_refusal(request, blob)) is not None:
            return refusal
        if request.headers.get("x-ms-sequence-number-action", "").lower() == "increment":
            blob.sequence_number += 1
        return Answer(200, _stamp() | {"x-ms-blob-sequence-number": str(blob.sequence_number)})


_OPERATIONS: Final[dict[tuple[str, str], Callable[[PageBlobs, Request, _Blob], Answer]]] = {
    ("PUT", "page"): PageBlobs._put,
    ("PUT", "lease"): PageBlobs._lease,
    ("PUT", "metadata"): PageBlobs._set_metadata,
    ("PUT", "properties"): PageBlobs._set_properties,
    ("GET", ""): PageBlobs._read,
    ("HEAD", ""): PageBlobs._read,
}


def _lease_refusal(request: Request, blob: _Blob) -> Answer | None:
    """Why a write may not be, as far as leases go."""
    given = request.headers.get("x-ms-lease-id", "")
    if given == blob.lease_id:
        return None
    if not given:
        return _failure(412, "LeaseIdMissing")
    return _failure(412, "LeaseIdMismatchWithBlobOperation" if blob.lease_id else "LeaseNotPresentWithBlobOperation")


def _range(request: Request) -> tuple[int, int]:
    """First byte and length that a request names; (0, 0) if it names none."""
    text = request.headers.get("x-ms-range") or request.headers.get("range") or ""
    first, _, last = text.removeprefix("bytes=").partition("-")
    if not first:
        return 0, 0
    return int(first), int(last) - int(first) + 1 if last else 0


def _metadata(request: Request) -> dict[str, str]:
    return {name[len(_METADATA) :]: value for name, value in request.headers.items() if name.startswith(_METADATA)}


def _stamp() -> dict[str, str]:
    return {"ETag": '"0x1"', "Last-Modified": formatdate(usegmt=True)}


def _properties(blob: _Blob) -> dict[str, str]:
    state, status = ("leased", "locked") if blob.lease_id else ("available", "unlocked")
    return {
        "ETag": '"0x1"',
        "Last-Modified": blob.modified,
        "Content-Type": "application/octet-stream",
        "x-ms-blob-type": "PageBlob",
        "x-ms-blob-sequence-number": str(blob.sequence_number),
        "x-ms-lease-state": state,
        "x-ms-lease-status": status,
        **{f"{_METADATA}{name}": value for name, value in blob.metadata.items()},
    }


def _entry(name: str, blob: _Blob) -> str:
    state, status = ("leased", "locked") if blob.lease_id else ("available", "unlocked")
    metadata = "".join(f"<{key}>{escape(value)}</{key}>" for key, value in blob.metadata.items())
    return (
        f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{blob.modified}</Last-Modified>"
        f"<Etag>0x1</Etag><Content-Length>{blob.size_bytes}</Content-Length><BlobType>PageBlob</BlobType>"
        f"<LeaseStatus>{status}</LeaseStatus><LeaseState>{state}</LeaseState></Properties>"
        f"<Metadata>{metadata}</Metadata></Blob>"
    )


def _failure(status: int, code: str) -> Answer:
    return Answer(status, {"x-ms-error-code": code})
