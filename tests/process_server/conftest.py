"""What the stories of this folder are handed."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulator.azurite import Azurite


@pytest.fixture
def key_file(azurite: Azurite, tmp_path: Path) -> Path:
    path = tmp_path / "account.key"
    path.write_text(azurite.account_key)
    path.chmod(0o600)
    return path
