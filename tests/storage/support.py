"""Stores on a given emulator, and a clock and stores that do as a test says."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Protocol

from azure.core.credentials import AzureNamedKeyCredential

from replicar.storage.azure import AzureBlobStore


class EmulatorPlace(Protocol):
    """What the `azurite` fixture gives."""

    @property
    def blob_endpoint(self) -> str: ...
    @property
    def account_name(self) -> str: ...
    @property
    def account_key(self) -> str: ...
    @property
    def authority_file(self) -> Path: ...


def bare_store(
    place: EmulatorPlace, container: str, *, api_version: str | None = None, list_page_size: int | None = None
) -> AzureBlobStore:
    """The real client with nothing around it."""
    return AzureBlobStore(
        place.blob_endpoint,
        container,
        AzureNamedKeyCredential(place.account_name, place.account_key),
        trust=ssl.create_default_context(cafile=place.authority_file),
        api_version=api_version,
        list_page_size=list_page_size,
    )


class HandClock:
    """A clock that moves only when somebody sleeps, and remembers for how long."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.slept: list[float] = []

    def now_ns(self) -> int:
        return int(self.seconds * 1e9)

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds
