"""A change-log file is given back while another thread makes it durable."""

from __future__ import annotations

import os
import threading
import uuid
from pathlib import Path

import pytest

from mobility_agent.logfile import LogFile, unmap
from replicar.formats import changelog

FILE_BYTES = changelog.MIN_FILE_BYTES


def make(path: Path) -> LogFile:
    return LogFile.create(path, uuid.UUID(int=1), 1, FILE_BYTES, 0)


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_a_file_retired_before_its_sync_began_needs_none(tmp_path: Path) -> None:
    before = open_descriptors()
    file = make(tmp_path / "a.hrl")
    unmap(file.retire())
    file.sync()
    assert open_descriptors() == before


def test_a_file_retired_during_its_sync_keeps_its_descriptor_until_the_sync_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_descriptors()
    file = make(tmp_path / "a.hrl")
    began, may_go_on = threading.Event(), threading.Event()
    failures: list[BaseException] = []
    real = os.fdatasync

    def slowly(fd: int) -> None:
        began.set()
        assert may_go_on.wait(10)
        real(fd)

    def sync() -> None:
        try:
            file.sync()
        except BaseException as error:
            failures.append(error)

    monkeypatch.setattr(os, "fdatasync", slowly)
    syncing = threading.Thread(target=sync)
    syncing.start()
    assert began.wait(10)
    unmap(file.retire())
    may_go_on.set()
    syncing.join(10)
    assert not failures, failures
    assert open_descriptors() == before
