"""Logs in memory, which is quick, and in a real Azurite, which is nearer to the truth."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from replicar.storage import MemoryStore, PageBlobStore, StorageTarget, open_store
from simulator.azurite import Azurite
from tests.recovery.log_builder import LogBuilder


@pytest.fixture
async def store() -> PageBlobStore:
    memory = MemoryStore()
    await memory.ensure_container()
    return memory


@pytest.fixture
def builder(store: PageBlobStore) -> LogBuilder:
    return LogBuilder(store)


@pytest.fixture
def target(azurite: Azurite, container_name: str) -> StorageTarget:
    """A container (not made yet) in a real Azurite."""
    return StorageTarget.model_validate(
        {
            "endpoint": azurite.blob_endpoint,
            "account_name": azurite.account_name,
            "account_key": azurite.account_key,
            "authority_file": azurite.authority_file,
            "container": container_name,
        }
    )


@pytest.fixture
async def azurite_store(target: StorageTarget) -> AsyncIterator[PageBlobStore]:
    async with open_store(target) as opened:
        await opened.ensure_container()
        yield opened
