"""Azure identities as credentials for storage: whose, and the tokens that requests carry.

`default` tries what this host has: environment, workload identity, managed identity, Azure CLI, in Microsoft's order;
`managed` and `workload` ask for just that one. Nothing secret stands in the settings then. The identity needs the role
Storage Blob Data Contributor on the container (Storage Blob Data Reader to read and verify).
"""

from __future__ import annotations

from typing import Any, Final, Literal, Protocol

from azure.core.credentials import AccessToken
from azure.core.exceptions import AzureError

from replicar.errors import PermanentError, TransientError

Kind = Literal["default", "managed", "workload"]
#: Of every storage account, in every cloud that has Microsoft's own sign-in.
SCOPE: Final = "https://storage.azure.com/.default"


class TokenCredential(Protocol):
    """What gives tokens; azure-identity's asynchronous credentials do."""

    async def get_token(self, *scopes: str, **options: Any) -> AccessToken: ...

    async def close(self) -> None: ...


def credential(kind: Kind, client_id: str | None) -> TokenCredential:
    """The identity's credential; nobody is asked yet.

    Args:
        client_id: which of several identities; None for the only or default one.

    Raises:
        PermanentError: azure-identity is not installed, or a workload identity is asked for where there is none.
    """
    try:
        from azure.identity import aio
    except ImportError:
        raise PermanentError(
            "storage: an Azure identity is asked for, but the libraries for that are not installed",
            hint="pip install 'replicar[azure]'",
        ) from None
    made: TokenCredential
    try:
        if kind == "managed":
            made = aio.ManagedIdentityCredential(client_id=client_id)
        elif kind == "workload":
            made = aio.WorkloadIdentityCredential(client_id=client_id)
        else:
            made = aio.DefaultAzureCredential(
                managed_identity_client_id=client_id, workload_identity_client_id=client_id
            )
    except ValueError:  # names variables of the environment; what is in them stays out of this
        raise PermanentError(
            f"storage: this host has no {kind} identity",
            hint="AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_FEDERATED_TOKEN_FILE have to be set, as AKS sets them",
        ) from None
    return Told(made, kind)


class Told:
    """A credential whose refusals are errors of our tree, without the library's, which may carry requests."""

    def __init__(self, inner: TokenCredential, kind: str) -> None:
        self._inner, self._kind = inner, kind

    async def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        """Raises:
        TransientError: nobody gives this host a token now; nothing was sent to storage.
        """
        try:
            return await self._inner.get_token(*scopes, **options)
        except AzureError as error:
            cause = type(error).__name__
        raise TransientError(
            f"storage: this host's {self._kind} identity was given no token ({cause})",
            hint="see that it has one (managed identity, AZURE_CLIENT_ID and the like), and reaches the sign-in "
            "service (169.254.169.254 for a managed identity)",
            outcome_certain=True,
        )

    async def close(self) -> None:
        await self._inner.close()
