"""Database servers of a test's own: real ones, in a directory of the test's, on a socket there, gone when it ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.tools import need

_SECONDS = 60.0


def _as_user(user: str) -> list[str]:
    return ["setpriv", "--reuid", user, "--regid", user, "--init-groups", "--"]


def _run(*command: str | Path, check: bool = True) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=_SECONDS, check=False, cwd="/"
    )
    assert not check or done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
    return done.stdout


@dataclass
class PostgreSQL:
    """A running server."""

    data: Path
    sockets: Path
    programs: Path

    def sql(self, text: str) -> str:
        return _run(*_as_user("postgres"), "psql", "-XqAt", "-h", self.sockets, "-d", "postgres", "-c", text).strip()


def postgresql_programs() -> Path:
    need("psql")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        pytest.skip("there is no PostgreSQL server here; as root: apt-get install postgresql")
    return found[-1].parent


@contextmanager
def postgresql(data: Path, sockets: Path) -> Iterator[PostgreSQL]:
    """A server on `data`, which is made if it is not there; `sockets` is a short path. As root only."""
    programs = postgresql_programs()
    sockets.mkdir(exist_ok=True)
    shutil.chown(sockets, "postgres", "postgres")
    if not data.exists():
        data.mkdir(mode=0o700)
        shutil.chown(data, "postgres", "postgres")
        _run(*_as_user("postgres"), programs / "initdb", "-D", data, "-A", "trust", "--no-locale", "-E", "UTF8")
    control: list[str | Path] = [*_as_user("postgres"), programs / "pg_ctl", "-D", data, "-w", "-t", "60"]
    log = sockets / "server.log"
    _run(*control, "-l", log, "-o", f"-h '' -k {sockets} -c shared_buffers=16MB", "start")
    try:
        yield PostgreSQL(data, sockets, programs)
    finally:
        _run(*control, "-m", "immediate", "stop", check=False)


@dataclass
class MariaDB:
    """A running server."""

    socket: Path

    def sql(self, text: str) -> str:
        return _run("mariadb", "--no-defaults", f"--socket={self.socket}", "-N", "-B", "-e", text).strip()


@contextmanager
def mariadb(directory: Path, socket: Path) -> Iterator[MariaDB]:
    """A server on `directory`, which is made; `socket` is a short path. As root only."""
    server = need("mariadbd")
    installer = shutil.which("mariadb-install-db")
    assert installer is not None
    _run(installer, "--no-defaults", f"--datadir={directory}", "--user=root", "--skip-test-db")
    command = [server, "--no-defaults", f"--datadir={directory}", f"--socket={socket}", "--skip-networking"]
    process = subprocess.Popen(
        [*command, "--user=root", "--innodb-buffer-pool-size=32M", f"--pid-file={socket}.pid"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ},
    )
    try:
        deadline = time.monotonic() + _SECONDS
        made = MariaDB(socket)
        while True:
            try:
                made.sql("SELECT 1")
                break
            except AssertionError:
                assert process.poll() is None, "MariaDB did not start"
                assert time.monotonic() < deadline, "MariaDB does not answer"
                time.sleep(0.1)
        yield made
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
