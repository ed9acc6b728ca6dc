"""A database on a mounted disk: a point made with its hook comes back, starts, and has all that was committed."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mobility_agent
from simulator import e2fsprogs
from tests.end_to_end.test_trace import machine, recover
from tests.mobility_agent.trace.rig import loop_disk, run
from tests.support.databases import PostgreSQL, postgresql, postgresql_programs

pytestmark = [pytest.mark.needs_root, pytest.mark.timeout(600)]

HOOK = Path(mobility_agent.__file__).parent / "hooks.d" / "postgresql"


class Commits:
    """A client that commits numbers one after the other; `acknowledged` is the last one that the server confirmed."""

    def __init__(self, server: PostgreSQL) -> None:
        self.acknowledged = 0
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._commit)
        server.sql("CREATE TABLE commits (n int PRIMARY KEY)")

    def __enter__(self) -> Commits:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _commit(self) -> None:
        while not self._stop.is_set():
            self._server.sql("INSERT INTO commits SELECT coalesce(max(n), 0) + 1 FROM commits")
            self.acknowledged += 1


@contextmanager
def mounted(image: Path, where: Path) -> Iterator[Path]:
    where.mkdir()
    run("mount", "-o", "loop", image, where)
    try:
        yield where
    finally:
        run("umount", where)


@pytest.fixture
def place() -> Iterator[Path]:
    """Where the server's own user gets through to, by a path short enough for sockets."""
    made = Path(tempfile.mkdtemp(prefix="replicar-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


async def test_postgresql_comes_back_with_every_commit_before_the_point_and_none_after(
    tmp_path: Path, place: Path
) -> None:
    postgresql_programs()
    hooks = tmp_path / "hooks.d"
    hooks.mkdir(mode=0o755)
    shutil.copy(HOOK, hooks)
    (hooks / "postgresql.conf").write_text(f"PGHOST={place}/run\n")
    application: dict[str, Any] = {"hooks": str(hooks)}
    with loop_disk(place, "a", filesystem="ext4") as disk:
        async with machine(tmp_path / "cluster", disk, application=application) as cluster:
            with postgresql(disk.mountpoint / "data", place / "run") as server, Commits(server) as commits:
                while commits.acknowledged < 20:
                    pass
                before = commits.acknowledged
                tagging = ["tag", cluster.machine, "quiet", "--application", "--wait-stored", "--json"]
                made = (await cluster.replicar(*tagging)).require().json()
                after = commits.acknowledged + 1  # one may have been under way
                assert made["kind"] == "application"
                assert 0 < made["pause_seconds"] < 30
            image = tmp_path / "recovered.raw"
            (await recover(cluster, image, "--point", "quiet")).require()
            listed = (await cluster.replicar("points", cluster.machine)).require().output
            assert " ms" in listed
    e2fsprogs.check(image)
    with mounted(image, place / "mounted") as where:
        (where / "data" / "postmaster.pid").unlink(missing_ok=True)
        with postgresql(where / "data", place / "again") as server:
            server.sql("CREATE EXTENSION amcheck")
            server.sql("SELECT bt_index_check('commits_pkey', true)")
            count, last = server.sql("SELECT count(*), max(n) FROM commits").split("|")
    assert count == last
    assert before <= int(last) <= after
