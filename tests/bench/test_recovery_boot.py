"""The boots' benchmark measures what it says: a guest from a file and one from a view, in turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import recovery_boot
from simulator import guest


@pytest.mark.soak
@pytest.mark.needs_root
async def test_a_guest_boots_from_both(tmp_path: Path) -> None:
    if words := guest.missing():
        pytest.skip(words)
    figures = await recovery_boot.measure(tmp_path, rounds=1)
    assert len(figures["boot_seconds_file"]) == len(figures["boot_seconds_view"]) == 1
    assert figures["boot_seconds_ratio"] > 0
