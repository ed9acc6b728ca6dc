"""A flush that the agent makes for itself and that fails is told to whoever asks for the next one."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from mobility_agent.capture.disk import Disk

LIMIT_SECONDS = 60


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


def test_a_flush_beside_a_settle_that_fails_fails_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells one of the two; a mock stands for a disk that fails at the wrong moment."""
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    began, go_on, calls = threading.Event(), threading.Event(), []

    def fdatasync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            began.set()
            assert go_on.wait(LIMIT_SECONDS)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Disk(0, "root", tmp_path / "disk.img") as disk, ThreadPoolExecutor(2) as threads:
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        settling = threads.submit(disk.settle)
        assert began.wait(LIMIT_SECONDS)
        flushing = threads.submit(disk.flush)
        with suppress(TimeoutError):
            flushing.exception(0.2)  # one that did not wait would be through by then, and have been told nothing
        with suppress(TimeoutError):
            flushing.result(0.2)  # one that did not wait would be through by then, and have been told nothing
        go_on.set()
        assert isinstance(settling.exception(LIMIT_SECONDS), OSError)
        assert isinstance(flushing.exception(LIMIT_SECONDS), OSError)
        disk.flush()  # it was told once
