"""The agent's state directory: what it must find again after any death, and the lock that keeps it for one agent.

    identity/          who this machine is (key 0600, certificate, authority), made by `mobility-agent enrol`
    log/               the change log; belongs to `changelog`
    nbd/               sockets of disks whose settings name no other place
    assignment.json    the process server it was last told to send to; used while the config server is away
    marks.json         the recovery points it made, by command; see `marks`
    audit.json         how far the audits are; see `auditing`
    hooks/             what hooks keep between freeze and thaw, and whether something may be held; see `hooks`
    disks.json         which index each disk has in the stream, and the incarnation whose log was begun
    status.json        what `mobility-agent status` shows; rewritten every second, worth nothing after a restart
    lock               held, with the process id inside, while an agent runs

A disk keeps its index for good, since descriptors in storage name it by that. Which incarnation a log was begun for is
kept apart from the log, so that a log that went missing is noticed: its sequence numbers were used, and beginning at
them again would make two histories of one. Enrolling again raises the incarnation, which makes room above them.

Disks come and go with the settings, at a start or a reload: one that is new gets an index that no other had, one that
grew keeps its own, one that is gone is said to be removed, and its index is not used again.

Weak: a disk that shrank is refused, since nobody can tell what became of the end of it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from replicar.control.files import PUBLIC_MODE, make_directory, read_file, write_file
from replicar.control.identity import Identity
from replicar.control.messages import AgentAssignment
from replicar.errors import CorruptionError, PermanentError

BOOT_ID_PATH: Final = Path("/proc/sys/kernel/random/boot_id")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KnownDisk:
    """A disk as the stream knows it."""

    index: int
    name: str
    size_bytes: int
    removed: bool = False


@dataclass(frozen=True, slots=True)
class SettledDisks:
    """`present`: the disks of the settings, in their order; `gone`: whose removal the stream has not been told of."""

    present: tuple[KnownDisk, ...]
    gone: tuple[KnownDisk, ...] = ()


def boot_id() -> bytes:
    """16 bytes that differ after every restart of the operating system; zeros where it does not say."""
    try:
        return uuid.UUID(BOOT_ID_PATH.read_text().strip()).bytes
    except (OSError, ValueError):
        return bytes(16)


class StateDirectory:
    """The directory as paths and small files; `with` holds it for this process alone.

    Args:
        path: made when it is missing.

    Raises:
        PermanentError: it can't be made; or (on entering) another agent holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity = path / "identity"
        self.log = path / "log"
        self.sockets = path / "nbd"
        self.keepers = path / "files"
        self.assignment_file = path / "assignment.json"
        self.marks_file = path / "marks.json"
        self.audit_file = path / "audit.json"
        self.disks_file = path / "disks.json"
        self.hooks = path / "hooks"
        self.status_file = path / "status.json"
        self.lock_file = path / "lock"
        self._lock_fd: int | None = None
        make_directory(path)

    def __enter__(self) -> StateDirectory:
        try:
            fd = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise PermanentError(
                f"can't open {self.lock_file}: {error.strerror}",
                hint="run the agent as the user that owns its directory",
                path=str(self.lock_file),
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise PermanentError(f"can't lock {self.lock_file}: {error.strerror}", path=str(self.path)) from None
            raise PermanentError(
                f"another agent (process {holder}) runs on {self.path}",
                hint="stop it first, or give this one a directory and an enrolment of its own",
                path=str(self.path),
                process=holder,
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._lock_fd = fd
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)  # gives the lock back; the file stays, so that nobody locks a removed one
            self._lock_fd = None

    def is_running(self) -> bool:
        """Whether an agent holds the directory now."""
        try:
            fd = os.open(self.lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return False

    # --- the last assignment ---

    def load_assignment(self) -> AgentAssignment | None:
        """What `save_assignment` kept last; None when there is nothing, or nothing that can be read any more."""
        if not self.assignment_file.exists():
            return None
        try:
            data = read_file(self.assignment_file, what="the last assignment")
            return AgentAssignment.from_json(data)
        except PermanentError as error:
            _log.warning("the last assignment is not used: %s", error)  # the config server will give it again
            return None

    def save_assignment(self, assignment: AgentAssignment | None) -> None:
        """Remember where to send; blocks until it is durable."""
        if assignment is None:
            self.assignment_file.unlink(missing_ok=True)
            return
        write_file(self.assignment_file, assignment.to_json(), mode=PUBLIC_MODE)

    # --- disks and the incarnation ---

    def settle_disks(self, identity: Identity, disks: dict[str, int]) -> SettledDisks:
        """Give each disk its index, and make sure that the change log is the one that belongs to this incarnation.

        The log of an older incarnation is removed: enrolling again means that the machine is compared in full, and
        its new log must not go on with the old one's numbers.

        Args:
            disks: sizes in bytes by name, in the order of the settings.

        Raises:
            PermanentError: a disk has shrunk, or the change log of this incarnation is gone.
            CorruptionError: disks.json can't be read.
        """
        incarnation, known = self._load_disks()
        if incarnation is not None and incarnation != identity.incarnation:
            _log.warning("enrolled again: the change log of incarnation %d is removed", incarnation)
            if self.log.exists():
                shutil.rmtree(self.log)
            incarnation = None
        begun = incarnation is not None
        if begun and not self._log_exists():
            raise PermanentError(
                f"the change log in {self.log} is gone, but its sequence numbers were used",
                hint="put it back; or enrol this machine again under its name (`mobility-agent enrol`), after which it"
                " is compared in full",
                path=str(self.log),
            )
        indices = {disk.name: disk.index for disk in known if not disk.removed}
        following = max((disk.index for disk in known), default=-1) + 1
        if begun:
            _refuse_shrunk(known, disks)
        settled: list[KnownDisk] = []
        for name, size_bytes in disks.items():
            if name not in indices:
                indices[name], following = following, following + 1
            settled.append(KnownDisk(indices[name], name, size_bytes))
        used = {disk.index for disk in settled}
        kept = [disk for disk in known if disk.index not in used]  # their indices are never used again
        if not begun:
            kept = [replace(disk, removed=True) for disk in kept]  # the stream begins anew, and names its disks itself
        saved = [*kept, *settled]
        if not begun or saved != known:
            self._save_disks(incarnation, saved)
        return SettledDisks(tuple(settled), tuple(disk for disk in kept if not disk.removed))

    def disks_gone(self, gone: Sequence[KnownDisk]) -> None:
        """The stream says durably that these are removed: what was kept about them goes."""
        for disk in gone:
            for place in (regions_path, touched_path, digests_path, skipped_path):
                path = place(self, disk.index)
                for found in path.parent.glob(f"{path.stem}.*"):
                    found.unlink()
        indices = {disk.index for disk in gone}
        incarnation, known = self._load_disks()
        self._save_disks(incarnation, [replace(d, removed=True) if d.index in indices else d for d in known])

    def log_begun(self, identity: Identity) -> None:
        """The change log of this incarnation exists from now on; call it before anything is captured."""
        incarnation, known = self._load_disks()
        if incarnation != identity.incarnation:
            self._save_disks(identity.incarnation, known)

    def _log_exists(self) -> bool:
        return self.log.is_dir() and any(self.log.iterdir())

    def _load_disks(self) -> tuple[int | None, list[KnownDisk]]:
        if not self.disks_file.exists():
            return None, []
        data = read_file(self.disks_file, what="the list of disks")
        try:
            fields: dict[str, Any] = json.loads(data)
            incarnation = fields["incarnation"]
            known = [
                KnownDisk(
                    int(disk["index"]), str(disk["name"]), int(disk["size_bytes"]), bool(disk.get("removed", False))
                )
                for disk in fields["disks"]
            ]
            return (None if incarnation is None else int(incarnation)), known
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CorruptionError(
                f"the list of disks in {self.disks_file} is damaged",
                hint="remove it and enrol this machine again under its name; it is then compared in full",
                path=str(self.disks_file),
            ) from None

    def _save_disks(self, incarnation: int | None, disks: list[KnownDisk]) -> None:
        fields = {"incarnation": incarnation, "disks": [asdict(disk) for disk in disks]}
        write_file(self.disks_file, (json.dumps(fields, indent=2) + "\n").encode(), mode=PUBLIC_MODE)

    # --- what `mobility-agent status` shows ---

    def save_status(self, status: dict[str, Any]) -> None:
        """Replace status.json at once. Not made durable: it is rewritten every second and only its freshness counts."""
        temporary = self.status_file.with_suffix(".new")
        temporary.write_bytes((json.dumps(status, indent=2) + "\n").encode())
        os.replace(temporary, self.status_file)

    def load_status(self) -> dict[str, Any]:
        """Raises:
        PermanentError: no agent ever ran here, or the file is no status.
        """
        hint = "start the agent: `mobility-agent run`"
        data = read_file(self.status_file, what="the agent's status", hint=hint)
        try:
            status = json.loads(data)
        except ValueError:
            status = None
        if not isinstance(status, dict):
            raise PermanentError(f"{self.status_file} is no status", hint=hint, path=str(self.status_file))
        return status


def _refuse_shrunk(known: list[KnownDisk], disks: dict[str, int]) -> None:
    for disk in known:
        if not disk.removed and disks.get(disk.name, disk.size_bytes) < disk.size_bytes:
            raise PermanentError(
                f"disk {disk.name} has {disks[disk.name]} bytes now, but {disk.size_bytes} when it was last replicated",
                hint="put it back as it was; or give it another name in the settings: then it is a new disk of this"
                " machine, and points from before keep the old one",
                disk=disk.name,
                size_bytes=disks[disk.name],
            )


# What belongs to the change log lies beside it, and is removed with it.


def regions_path(state: StateDirectory, index: int) -> Path:
    """Where the map of a disk's dirty regions lies."""
    return state.log / f"disk-{index}.regions"


def touched_path(state: StateDirectory, index: int) -> Path:
    """Where the touched record of a disk lies."""
    return state.log / f"disk-{index}.touched"


def digests_path(state: StateDirectory, index: int) -> Path:
    """Where the digests of a disk's replica lie."""
    return state.log / f"disk-{index}.digests"


def skipped_path(state: StateDirectory, index: int) -> Path:
    """Where the map lies of what is left out of a disk: pages of free space."""
    return state.log / f"disk-{index}.free"


def extents_path(state: StateDirectory) -> Path:
    """Where the row of extents lies that were written while the log was full."""
    return state.log / "extents"
