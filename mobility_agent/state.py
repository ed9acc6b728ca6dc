"""The agent's state directory: what it must find again after any death, and the lock that keeps it for one agent.

    identity/          who this machine is (key 0600, certificate, authority), made by `mobility-agent enrol`
    log/               the change log; belongs to `changelog`
    nbd/               sockets of disks whose settings name no other place
    assignment.json    the process server it was last told to send to; used while the config server is away
    marks.json         the recovery points it made, by command; see `marks`
    audit.json         how far the audits are; see `auditing`
    disks.json         which index each disk has in the stream, and the incarnation whose log was begun
    status.json        what `mobility-agent status` shows; rewritten every second, worth nothing after a restart
    lock               held, with the process id inside, while an agent runs

A disk keeps its index for good, since descriptors in storage name it by that. Which incarnation a log was begun for is
kept apart from the log, so that a log that went missing is noticed: its sequence numbers were used, and beginning at
them again would make two histories of one. Enrolling again raises the incarnation, which makes room above them.

Weak: a disk that changed its size, or is not in the settings any more, is refused rather than followed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import uuid
from dataclasses import asdict, dataclass
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
        self.assignment_file = path / "assignment.json"
        self.marks_file = path / "marks.json"
        self.audit_file = path / "audit.json"
        self.disks_file = path / "disks.json"
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

    def settle_disks(self, identity: Identity, disks: dict[str, int]) -> tuple[KnownDisk, ...]:
        """Give each disk its index, and make sure that the change log is the one that belongs to this incarnation.

        The log of an older incarnation is removed: enrolling again means that the machine is compared in full, and
        its new log must not go on with the old one's numbers.

        Args:
            disks: sizes in bytes by name, in the order of the settings.

        Returns:
            The disks in that order.

        Raises:
            PermanentError: a disk has another size than the stream says, is missing from the settings, or the change
                log of this incarnation is gone.
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
        if begun:
            _refuse_changes(known, disks)
        indices = {disk.name: disk.index for disk in known}
        following = max(indices.values(), default=-1) + 1
        settled: list[KnownDisk] = []
        for name, size_bytes in disks.items():
            if name not in indices:
                indices[name], following = following, following + 1
            settled.append(KnownDisk(indices[name], name, size_bytes))
        if not begun:
            kept = [disk for disk in known if disk.name not in disks]  # their indices are never used again
            self._save_disks(None, [*kept, *settled])
        return tuple(settled)

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
                KnownDisk(int(disk["index"]), str(disk["name"]), int(disk["size_bytes"])) for disk in fields["disks"]
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


def _refuse_changes(known: list[KnownDisk], disks: dict[str, int]) -> None:
    again = "put it back as it was; or enrol this machine again under its name, after which it is compared in full"
    for disk in known:
        if disk.name in disks and disks[disk.name] != disk.size_bytes:
            raise PermanentError(
                f"disk {disk.name} has {disks[disk.name]} bytes now, but {disk.size_bytes} when its replication began",
                hint=again,
                disk=disk.name,
                size_bytes=disks[disk.name],
            )
        if disk.name not in disks:
            raise PermanentError(
                f"disk {disk.name} is part of this machine's replication, but not of the settings",
                hint=again,
                disk=disk.name,
            )
    names = {disk.name for disk in known}
    for name in disks:
        if name not in names:
            raise PermanentError(
                f"disk {name} was not there when this machine's replication began",
                hint="take it out of the settings; or enrol this machine again under its name, after which all of its"
                " disks are compared in full",
                disk=name,
            )
