"""What Azure Resource Manager answers, as errors of ours: what was tried, what was said, whether to try again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import aiohttp
from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    ServiceRequestError,
    ServiceResponseError,
)

from replicar.errors import PermanentError, TransientError

#: Somebody else's operation is under way, or Azure wants us to come later.
_LATER: Final = frozenset({408, 409, 429, 500, 502, 503, 504})


@asynccontextmanager
async def said(doing: str) -> AsyncIterator[None]:
    """Errors of the SDK as ours: what was tried, what Azure said, and whether it is worth trying again."""
    try:
        yield
    except ClientAuthenticationError as error:
        hint = (
            "look at the identity and its role in the resource group (Virtual Machine Contributor, Network Contributor)"
        )
        raise PermanentError(f"Azure does not let us {doing}: {error.message}", hint=hint) from None
    except HttpResponseError as error:
        code = error.error.code if error.error is not None else error.reason
        text = f"Azure won't {doing}: {code}: {error.message}"
        if error.status_code in _LATER:
            raise TransientError(text, hint="it is tried again", status=error.status_code) from None
        raise PermanentError(
            text, hint="correct the target settings, or Azure's side", status=error.status_code
        ) from None
    except (ServiceRequestError, ServiceResponseError, aiohttp.ClientError) as error:
        raise TransientError(f"Azure can't be reached to {doing}: {error}") from None
