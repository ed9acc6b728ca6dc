"""The Azurite of a test session: one process for all tests, each of which works in a container of its own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

from simulator.azurite import Azurite


def session_azurite(directory: Path) -> Iterator[Azurite]:
    """Azurite for as long as the generator lives; blobs in memory, so nothing stays."""
    with Azurite(directory, in_memory=True) as azurite:
        yield azurite


def unique_container_name() -> str:
    """A valid container name that no other test has, so that tests need not wait for each other's clean-up."""
    return f"test-{uuid.uuid4().hex}"
