"""What an answer of the blob service means, as an error of our tree.

Pure: a status, a service code and headers in, an error out. It is the only place that knows the service's status codes,
and both `AzureBlobStore` and `MemoryStore` take their errors from here, so they read the same.

Whether a failed write is over (Azure, "Put Page", remarks on time-outs): the outcome is certain only for statuses
100-499 and 503; after any other failure the request may still be carried out later. A connection that was never made is
certain as well, since nothing was sent. The answer is in `fields["outcome_certain"]`.

Texts are made here, from names and codes; nothing the service or a library wrote is passed on, since a URL with a
shared access signature in it is a secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final

from replicar.errors import ConflictError, FencedError, PermanentError, ReplicarError, TransientError
from replicar.storage.store import BLOB_MISSING, CONTAINER_MISSING

#: A service that asks for longer than this is asked again after this; the deadline of the retries is far below it.
MAX_RETRY_AFTER_SECONDS: Final = 3600.0

_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
#: So are these, whatever their status: what is in the way ends by itself.
_TRANSIENT_CODES = frozenset({"ContainerBeingDeleted", "ServerBusy", "OperationTimedOut", "PendingCopyOperation"})
#: 409 and 412 codes that say: this blob is somebody else's.
_LEASE_CODES = frozenset(
    {
        *("LeaseAlreadyPresent", "LeaseIdMissing", "LeaseIdMismatchWithBlobOperation", "LeaseLost"),
        *("LeaseIdMismatchWithLeaseOperation", "LeaseNotPresentWithBlobOperation", "LeaseNotPresentWithLeaseOperation"),
        *("LeaseIsBreakingAndCannotBeAcquired", "LeaseIsBrokenAndCannotBeRenewed"),
    }
)
#: Which of those mean that nobody holds a lease (what breaking one that isn't there gets).
NO_LEASE_CODES: Final = frozenset({"LeaseNotPresentWithLeaseOperation"})


def answer_error(
    status: int, code: str, headers: Mapping[str, str], *, doing: str, container: str, blob: str | None = None
) -> ReplicarError:
    """The error for an HTTP answer that is no success.

    Args:
        status: the HTTP status.
        code: `x-ms-error-code`, or "" where the answer has none (an answer to HEAD, a proxy's).
        headers: the answer's headers, looked up case-insensitively by the caller's mapping or in lower case.
        doing: what was asked for, e.g. "write pages".
        container: its name; `blob` likewise, None for a request to the container itself.
    """
    place = f"blob {blob} in container {container}" if blob else f"container {container}"
    facts: dict[str, Any] = {"container": container, "blob": blob, "status": status, "code": code}
    if request_id := headers.get("x-ms-request-id"):
        facts["request_id"] = request_id
    if status in _TRANSIENT or code in _TRANSIENT_CODES:
        return TransientError(
            f"could not {doing}: the storage service answered {status} for {place}",
            retry_after_seconds=retry_after_seconds(headers),
            outcome_certain=status < 500 or status == 503,
            **facts,
        )
    if status == 404:
        return missing(doing, container, None if code == "ContainerNotFound" else blob)
    if code in _LEASE_CODES or status == 412:
        return fenced(doing, container, blob, code or "precondition failed")
    if code in ("BlobAlreadyExists", "ContainerAlreadyExists"):
        return conflict(container, blob)
    if status in (401, 403) or code == "InvalidAuthenticationInfo":
        return PermanentError(
            f"could not {doing}: the storage service refuses our credentials for {place} ({status} {code})".rstrip(),
            hint="check that the account key, shared access signature or identity is this account's, not expired, may "
            "do this, and that this machine's clock is right",
            reason="forbidden",
            **facts,
        )
    if status == 416:
        return past_end(doing, container, blob)
    return PermanentError(
        f"could not {doing}: the storage service answered {status} {code} for {place}".replace("  ", " "),
        hint="see the code in the storage service's documentation; an older service may need `api_version` set",
        reason="refused",
        **facts,
    )


def missing(doing: str, container: str, blob: str | None) -> PermanentError:
    """404: the blob, or the container when `blob` is None, is not there."""
    if blob is None:
        return PermanentError(
            f"could not {doing}: there is no container {container}",
            hint="check the container's name in the settings, or create it",
            reason=CONTAINER_MISSING,
            container=container,
        )
    return PermanentError(
        f"could not {doing}: there is no blob {blob} in container {container}",
        hint="check that nobody deleted it and that the container is the right one",
        reason=BLOB_MISSING,
        container=container,
        blob=blob,
    )


def fenced(doing: str, container: str, blob: str | None, code: str) -> FencedError:
    """A lease or a sequence number says that somebody else owns the blob now."""
    return FencedError(
        f"could not {doing}: blob {blob} in container {container} is not ours to write ({code})",
        hint="another process server has taken over this machine's log; stop writing to it",
        container=container,
        blob=blob,
        code=code,
    )


def conflict(container: str, blob: str | None) -> ConflictError:
    """409: what should be made is there already."""
    return ConflictError(
        f"blob {blob} is already there in container {container}",
        hint="somebody else made it; look at its metadata, and begin a new run under another name",
        container=container,
        blob=blob,
    )


def past_end(doing: str, container: str, blob: str | None) -> PermanentError:
    """416, or an answer shorter than what was asked for."""
    return PermanentError(
        f"could not {doing}: it reaches past the end of blob {blob} in container {container}",
        hint="the blob is shorter than its reader believes; it may have been replaced",
        reason="past_end",
        container=container,
        blob=blob,
    )


def copied(status: str, container: str, blob: str) -> bool:
    """What the service says of a copy that it makes: whether it is complete, or still under way.

    Raises:
        PermanentError: it was given up.
    """
    if status in ("success", "pending"):
        return status == "success"
    raise PermanentError(
        f"the storage service gave up the copy that was to be blob {blob} in container {container} ({status})",
        hint="its source was deleted, or somebody ended the copy; delete the blob and ask again",
        container=container,
        blob=blob,
        reason="copy",
    )


def no_answer(doing: str, container: str, blob: str | None, *, cause: str, certain: bool) -> TransientError:
    """The service could not be reached, did not answer in time, or hung up. `cause` is the exception's class."""
    return TransientError(
        f"could not {doing}: no answer from the storage service for {blob or 'container ' + container} ({cause})",
        hint="check the network between here and the storage endpoint",
        container=container,
        blob=blob,
        cause=cause,
        outcome_certain=certain,
    )


def untrusted(doing: str, container: str) -> PermanentError:
    """The service's certificate is signed by nobody we believe, or is somebody else's."""
    return PermanentError(
        f"could not {doing}: the storage service's certificate is not to be trusted",
        hint="set `authority_file` to the certificate of the authority that signed it (Azure Stack Hub and emulators "
        "have their own), and check the endpoint's host name and this machine's clock",
        container=container,
        reason="untrusted",
    )


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """What the service asks us to wait: `x-ms-retry-after-ms` or `retry-after-ms`, else `Retry-After` in seconds.

    A `Retry-After` that is a date counts against the answer's own `Date`, so no clock is needed. None when there is
    neither, or nothing sensible in it.
    """
    for name in ("x-ms-retry-after-ms", "retry-after-ms"):
        if (milliseconds := _number(headers.get(name))) is not None:
            return min(milliseconds / 1000, MAX_RETRY_AFTER_SECONDS)
    text = headers.get("retry-after")
    if text is None:
        return None
    if (seconds := _number(text)) is not None:
        return min(seconds, MAX_RETRY_AFTER_SECONDS)
    try:
        wait = parsedate_to_datetime(text) - parsedate_to_datetime(headers.get("date", ""))
    except (ValueError, TypeError):
        return None
    return min(max(wait.total_seconds(), 0.0), MAX_RETRY_AFTER_SECONDS)


def _number(text: str | None) -> float | None:
    if text is None or not text.strip().isascii() or not text.strip().isdigit():
        return None
    return float(text)
