"""Fixtures that every test may use, and the rule for tests that need root."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from simulator.azurite import Azurite
from tests.support.azurite import session_azurite, unique_container_name


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """A real Azurite over HTTPS: `blob_endpoint`, `account_name`, `account_key`, `authority_file`."""
    yield from session_azurite(tmp_path_factory.mktemp("azurite"))


@pytest.fixture
def container_name() -> str:
    """The name of a container that is this test's own; making it is up to the test."""
    return unique_container_name()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs root for anybody else, and say so."""
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs root; run: sudo make test")
    for item in items:
        if item.get_closest_marker("needs_root") is not None:
            item.add_marker(skip)
