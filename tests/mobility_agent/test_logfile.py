"""A change-log file is given back while another thread makes it durable."""

from __future__ import annotations

import errno
import os
import threading
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from mobility_agent.logfile import LogFile, unmap
from replicar.errors import CorruptionError, LimitError
from replicar.formats import changelog, frame
from replicar.formats.frame import Kind

FILE_BYTES = changelog.MIN_FILE_BYTES


def make(path: Path) -> LogFile:
    return LogFile.create(path, uuid.UUID(int=1), 1, FILE_BYTES, 0)


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("bit", range(64))
def test_a_header_that_is_damaged_while_the_file_is_open_leads_nowhere(tmp_path: Path, bit: int) -> None:
    file = make(tmp_path / "a.hrl")
    table = frame.describe(Kind.WRITE, offset=0, length=512, time_ns=1)
    data = b""
    for sequence in (1, 2, 3):
        data = frame.build_frame(file.header.machine_id, sequence, table, bytes(512))
        file.data[file.sealed_end : file.sealed_end + len(data)] = data
        file.sealed(len(data), sequence + 1)
    lengths = file.sealed_end - len(data) * 2 + 8  # of the second frame's payload and table
    file.data[lengths + bit // 8] ^= 1 << bit % 8
    try:
        with suppress(CorruptionError):
            found = file.frames_from(3, 1 << 20)
            assert found is not None
            frame.read_frame(found)
    finally:
        file.close()


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


@pytest.mark.parametrize("call", ["open", "posix_fallocate", "replace", "fsync"])
def test_whatever_keeps_a_file_from_being_made_is_a_full_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A full disk may show in any of these calls, by how its file system keeps room (seeds 20, 21 and 26 of that day).

    A mock stands for such a file system.
    """

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = open_descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(LimitError, match="No space left"):
            make(tmp_path / "a.hrl")
    assert not list(tmp_path.iterdir())
    assert open_descriptors() == before
    make(tmp_path / "a.hrl").close()
