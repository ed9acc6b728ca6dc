"""The registry: one SQLite database, one writer thread, and transactions that are whole or did not happen.

`Registry` is the database for one thread. `RegistryThread` owns one of those and runs functions on it away from the
event loop, one at a time and in order, so that there is no locking to think about: a function is a transaction. The
journal is a write-ahead log with `synchronous=FULL`: what was answered survives a power cut. The command line may open
the same file beside a running server (`config-server registration-key`); SQLite's own lock keeps them apart.

What is kept, table by table, is said in the schema below, and in `schema_circle` for jobs and what belongs to them.
Rules live elsewhere: who may enter in `parties`, what machines do in `machines`, what can be recovered in `points`.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from config_server import schema_circle as circle
from config_server.changes import Change, Changes
from replicar.errors import CorruptionError, PermanentError, TransientError

SCHEMA_VERSION: Final = 9
BUSY_SECONDS: Final = 5.0
#: Transactions waiting for the writer; at some 2,000 a second that is half a second of work.
MAX_WAITING: Final = 1024

_TRANSIENT_CODES: Final = frozenset(
    (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
    )
)
_DAMAGED_CODES: Final = frozenset((sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB))

_SCHEMA: Final = """
-- everyone with a certificate, known by id, or by role and name
CREATE TABLE parties (
    id TEXT PRIMARY KEY, role TEXT NOT NULL, name TEXT NOT NULL, incarnation INTEGER NOT NULL,
    enrolled_ns INTEGER NOT NULL, removed_ns INTEGER, UNIQUE (role, name)) STRICT;
-- every certificate issued, so that one that was replaced can be refused
CREATE TABLE certificates (
    serial TEXT PRIMARY KEY, party_id TEXT NOT NULL REFERENCES parties (id),
    issued_ns INTEGER NOT NULL, expires_ns INTEGER NOT NULL, revoked_ns INTEGER) STRICT;
CREATE INDEX certificates_of ON certificates (party_id);
-- hashes of keys that admit process servers
CREATE TABLE registration_keys (
    id TEXT PRIMARY KEY, digest BLOB NOT NULL, created_ns INTEGER NOT NULL, expires_ns INTEGER NOT NULL) STRICT;
-- nonces of recent enrolments, so that none is used twice
CREATE TABLE nonces (nonce TEXT PRIMARY KEY, time_ns INTEGER NOT NULL) STRICT;
CREATE TABLE process_servers (
    id TEXT PRIMARY KEY REFERENCES parties (id), host TEXT NOT NULL, port INTEGER NOT NULL,
    cache_bytes INTEGER NOT NULL, cache_bytes_free INTEGER NOT NULL, heartbeat_ns INTEGER NOT NULL) STRICT;
-- a machine: who serves it, its wrapped key, what its agent (JSON) and its process server last said. The bytes are
-- totals over all process servers; counted_* is what the present one counted since counted_since
CREATE TABLE machines (
    id TEXT PRIMARY KEY REFERENCES parties (id), process_server_id TEXT REFERENCES parties (id),
    epoch INTEGER NOT NULL DEFAULT 0, key_id TEXT, wrapped_key BLOB, report TEXT, heartbeat_ns INTEGER,
    received_sequence INTEGER NOT NULL DEFAULT 0, stored_sequence INTEGER NOT NULL DEFAULT 0,
    stored_segment INTEGER, stored_digest TEXT NOT NULL DEFAULT '',
    bytes_received INTEGER NOT NULL DEFAULT 0, bytes_stored INTEGER NOT NULL DEFAULT 0,
    counted_since TEXT NOT NULL DEFAULT '', counted_received INTEGER NOT NULL DEFAULT 0,
    counted_stored INTEGER NOT NULL DEFAULT 0, destroyed_ns INTEGER) STRICT;
-- data keys that a machine sealed with before its present one; destroyed_ns above is when all of them were destroyed
CREATE TABLE former_keys (
    machine_id TEXT NOT NULL REFERENCES machines (id), key_id TEXT NOT NULL, wrapped_key BLOB NOT NULL,
    retired_ns INTEGER NOT NULL, PRIMARY KEY (machine_id, key_id)) STRICT;
CREATE INDEX machines_of ON machines (process_server_id);
CREATE TABLE marks (
    machine_id TEXT NOT NULL REFERENCES machines (id), sequence INTEGER NOT NULL, name TEXT NOT NULL,
    kind TEXT NOT NULL, time_ns INTEGER NOT NULL, command_id TEXT, stored INTEGER NOT NULL, in_gap INTEGER NOT NULL,
    pause_seconds REAL,
    PRIMARY KEY (machine_id, sequence, name)) STRICT, WITHOUT ROWID;
CREATE INDEX marks_waiting ON marks (machine_id, sequence) WHERE stored = 0;
CREATE UNIQUE INDEX marks_commanded ON marks (machine_id, command_id) WHERE command_id IS NOT NULL;
CREATE TABLE gaps (
    machine_id TEXT NOT NULL REFERENCES machines (id), first_sequence INTEGER NOT NULL, last_sequence INTEGER,
    reason TEXT NOT NULL, PRIMARY KEY (machine_id, first_sequence)) STRICT, WITHOUT ROWID;
-- what an agent is to do, or refused to (JSON); done is when a mark names it
CREATE TABLE commands (
    id TEXT PRIMARY KEY, machine_id TEXT NOT NULL REFERENCES machines (id), kind TEXT NOT NULL, name TEXT NOT NULL,
    consistency TEXT NOT NULL, created_ns INTEGER NOT NULL, refusal TEXT) STRICT;
CREATE INDEX commands_of ON commands (machine_id, created_ns);
-- points of several machines that all of them kept (JSON); their marks have the id as their command
CREATE TABLE group_points (
    id TEXT PRIMARY KEY, point TEXT NOT NULL, created_ns INTEGER NOT NULL) STRICT;
-- who was given a key, or changed something, and when
CREATE TABLE audit (
    number INTEGER PRIMARY KEY, time_ns INTEGER NOT NULL, party_id TEXT NOT NULL, action TEXT NOT NULL,
    subject TEXT NOT NULL) STRICT;
"""

#: What makes schema n of schema n - 1.
_STEPS: Final = {
    2: (
        "ALTER TABLE machines ADD COLUMN counted_since TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE machines ADD COLUMN counted_received INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE machines ADD COLUMN counted_stored INTEGER NOT NULL DEFAULT 0",
        "UPDATE machines SET counted_received = bytes_received, counted_stored = bytes_stored",
    ),
    3: ("ALTER TABLE marks ADD COLUMN pause_seconds REAL",),
    4: ("CREATE TABLE group_points (id TEXT PRIMARY KEY, point TEXT NOT NULL, created_ns INTEGER NOT NULL) STRICT",),
    5: (*circle.TABLES, circle.TAKE_OVER),
    6: (
        "ALTER TABLE machines ADD COLUMN destroyed_ns INTEGER",
        "CREATE TABLE former_keys (machine_id TEXT NOT NULL REFERENCES machines (id), key_id TEXT NOT NULL,"
        " wrapped_key BLOB NOT NULL, retired_ns INTEGER NOT NULL, PRIMARY KEY (machine_id, key_id)) STRICT",
    ),
    7: circle.ARRANGEMENTS,
    8: circle.TOKENS,
    9: circle.UPKEEP,
}

_T = TypeVar("_T")


class Registry:
    """The database, for use by one thread. `connection` returns rows by name.

    Args:
        tell: is told on that thread what each transaction has changed, once that is durable.
    """

    def __init__(self, path: Path, tell: Callable[[list[Change]], None] | None = None) -> None:
        """Open the registry, or make it when the file is missing.

        Raises:
            PermanentError: it can't be opened, or a newer version made it.
            CorruptionError: the file is no SQLite database.
        """
        self.path = path
        with _sqlite_errors(path):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self.connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self.connection.row_factory = sqlite3.Row
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA synchronous = FULL")
            self.connection.execute("PRAGMA foreign_keys = ON")
            self.connection.execute("PRAGMA secure_delete = ON")  # a key that is destroyed leaves no copy in the file
            # How healthy process servers say they are just now; what a new server does not know it is told in seconds.
            self.connection.execute("CREATE TEMP TABLE server_health (id TEXT PRIMARY KEY, level TEXT NOT NULL)")
            with self.transaction():
                self._migrate()
            self._tell, self._changes = tell, Changes(self.connection) if tell is not None else None

    def _migrate(self) -> None:
        version = int(self.connection.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise PermanentError(
                f"the registry {self.path} has schema {version}; this version knows {SCHEMA_VERSION}",
                hint="run the version of config-server that wrote it, or a newer one",
            )
        if version < SCHEMA_VERSION:
            # one by one: a script would end the transaction
            statements = [*_SCHEMA.split(";\n"), *circle.TABLES, *circle.ARRANGEMENTS, *circle.TOKENS, *circle.UPKEEP]
            if version:
                statements = [each for step in range(version, SCHEMA_VERSION) for each in _STEPS[step + 1]]
            for statement in statements:
                self.connection.execute(statement)
            self.connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of what is done inside, or nothing."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield self.connection
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:  # SQLite has rolled back by itself when the disk is full
                self.connection.execute("ROLLBACK")
            raise

    def run(self, function: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run a function as one transaction.

        Raises:
            TransientError: the database is locked or its disk full; nothing was changed.
            CorruptionError: the file is damaged.
        """
        with _sqlite_errors(self.path):
            try:
                with self.transaction() as connection:
                    result = function(connection)
            except BaseException:
                if self._changes is not None:
                    self._changes.taken()
                raise
        if self._tell is not None and self._changes is not None and (changes := self._changes.taken()):
            self._tell(changes)
        return result

    def checkpoint(self) -> None:
        """Bring the journal into the database and empty it, so that what was overwritten is in neither."""
        with _sqlite_errors(self.path):
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        self.connection.close()


class RegistryThread:
    """A registry on a thread of its own; an asynchronous context manager.

    Args:
        tell: is told on the event loop what each transaction has changed, before that one's caller goes on.
    """

    def __init__(self, path: Path, tell: Callable[[list[Change]], None] | None = None) -> None:
        self._path, self._tell = path, tell
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry")
        self._registry: Registry | None = None
        self._waiting = 0

    async def __aenter__(self) -> RegistryThread:
        loop, told = asyncio.get_running_loop(), self._tell

        def tell(changes: list[Change]) -> None:
            if told is not None:
                loop.call_soon_threadsafe(told, changes)

        opening = partial(Registry, self._path, tell if told is not None else None)
        self._registry = await loop.run_in_executor(self._executor, opening)
        return self

    async def __aexit__(self, *_: object) -> None:
        registry, self._registry = self._registry, None
        if registry is not None:
            await asyncio.get_running_loop().run_in_executor(self._executor, registry.close)
        self._executor.shutdown(wait=True)

    async def run(self, function: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run a function as one transaction on the registry's thread.

        Once begun it is carried out, even if the caller is cancelled.

        Raises:
            TransientError: too many are waiting, or the database is busy or full.
            CorruptionError: the file is damaged.
        """
        if self._registry is None:
            raise RuntimeError("the registry is closed")
        if self._waiting >= MAX_WAITING:
            raise TransientError(
                f"the config server is busy: {MAX_WAITING} transactions wait for its registry",
                hint="try again in a few seconds",
                retry_after_seconds=5,
            )
        self._waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._executor, self._registry.run, function)
        future.add_done_callback(self._one_less)
        return await future

    async def checkpoint(self) -> None:
        """`Registry.checkpoint`, on the registry's thread."""
        if self._registry is None:
            raise RuntimeError("the registry is closed")
        await asyncio.get_running_loop().run_in_executor(self._executor, self._registry.checkpoint)

    def _one_less(self, _: object) -> None:
        self._waiting -= 1


@contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    where = str(path)
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the lower byte is the primary code
        if code in _TRANSIENT_CODES:
            raise TransientError(
                f"the registry {path} can't be used now: {error}",
                hint="look at the space on its disk, its owner, and for another process that holds it",
                path=where,
            ) from error
        if code in _DAMAGED_CODES:
            hint = "restore the vault's directory from its backup"
            raise CorruptionError(f"the registry {path} is damaged: {error}", hint=hint, path=where) from error
        raise  # anything else is a programmer's error
    except OSError as error:
        raise PermanentError(
            f"can't open the registry {path}: {error.strerror}", hint="check the vault's directory", path=where
        ) from error
