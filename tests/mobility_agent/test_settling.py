"""A flush that the agent makes for itself and that fails is told to whoever asks for the next one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mobility_agent.capture.disk import Disk


def test_what_the_kernel_told_the_agent_alone_is_told_to_the_next_flush_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    with Disk(0, "data", path) as disk:
        sync = os.fdatasync

        def fail(_: int) -> None:  # as the kernel does once, having dropped what it could not write
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            disk.settle()
        monkeypatch.setattr(os, "fdatasync", sync)
        with pytest.raises(OSError, match="Input/output error"):
            disk.flush()
        disk.flush()
