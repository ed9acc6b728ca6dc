"""The row of files that a change log is: oldest first, the last one active, all of one size, bounded in number.

A file whose frames are all in storage is kept as a spare: its blocks are allocated already, and the next file is made
of it. Files and spares together stay within the limit. The spares that are used next stay mapped.
"""

from __future__ import annotations

import logging
import mmap
import os
import uuid
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mobility_agent.logfile import LogFile, making, unmap
from replicar.clock import Clock
from replicar.errors import ConflictError, CorruptionError, LimitError
from replicar.formats import changelog, frame

#: Spares that stay mapped.
_MAPPED_SPARES: Final = 4
#: What `take` returns at most, unless one frame alone is more.
TAKE_BYTES: Final = 1 << 20

_PREFIX: Final = "changes-"
#: No sequence: nothing follows a file that was set aside.
_NOTHING: Final = -1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a directory's files hold: the sequence that follows the last frame (0 without any), the first one that may
    be missing before it because something was damaged (None if nothing was), and the last frame's time."""

    next_sequence: int
    damaged_from: int | None
    last_time_ns: int

    @property
    def sound_until(self) -> int:
        """Everything before this sequence that was not trimmed is there."""
        if self.damaged_from is None:
            return self.next_sequence
        # Where nothing else is left, all that lay in front of the damage was trimmed.
        return min(self.damaged_from, self.next_sequence) if self.next_sequence else self.damaged_from


class LogFiles:
    """The files of one directory.

    Args:
        limit_bytes: of all files together; at least two files.

    Raises:
        LimitError: the limit can't be honoured.
    """

    def __init__(
        self, directory: Path, machine_id: uuid.UUID, *, file_bytes: int, limit_bytes: int, clock: Clock
    ) -> None:
        if file_bytes < changelog.MIN_FILE_BYTES or limit_bytes < 2 * file_bytes:
            raise LimitError(
                f"a change log of {limit_bytes} bytes in files of {file_bytes}",
                hint=f"journal_bytes must hold two files, and a file {changelog.MIN_FILE_BYTES} bytes",
            )
        self._directory = directory
        self._machine_id = machine_id
        self._file_bytes = file_bytes
        self._max_files = limit_bytes // file_bytes
        self._clock = clock
        self._files: deque[LogFile] = deque()
        self._spares: list[tuple[Path, mmap.mmap | None]] = []
        self._torn: list[LogFile] = []

    @property
    def active(self) -> LogFile:
        """The file that is filled. There is one once `make_room` said so."""
        return self._files[-1]

    @property
    def used_bytes(self) -> int:
        return sum(file.sealed_end - changelog.FRAMES_OFFSET for file in self._files)

    @property
    def limit_bytes(self) -> int:
        return self._max_files * (self._file_bytes - changelog.FRAMES_OFFSET)

    @property
    def first_sequence(self) -> int | None:
        """The oldest sequence held; None without files."""
        return self._files[0].first_sequence if self._files else None

    def recover(self, *, trust_staging: bool) -> Recovered:
        """Open what is in the directory.

        A file without a sound header is set aside, a frame that is damaged is passed over; it is for the caller to see
        that the disks are compared. A file's name says what its first sequence is, also where the power was cut before
        its header was durable: then the file is empty, or still has what an earlier use left there, header and all.

        Raises:
            ConflictError: a file is another machine's.
        """
        for pattern in ("*.spare", "*.new", "*.damaged"):
            for path in self._directory.glob(pattern):
                path.unlink()
        damaged: list[int] = []
        for path in sorted(self._directory.glob("*.hrl")):
            named = _first_of(path)
            try:
                file, found = LogFile.open(path, trust_staging=trust_staging)
                if named and file.first_sequence != named:
                    file.close()
                    raise CorruptionError("its header is that of an earlier use")
            except CorruptionError as error:
                _log.error("the change log %s is set aside: %s", path, error.message)
                os.replace(path, path.with_suffix(".damaged"))
                damaged.append(named)
                continue
            if file.header.machine_id != self._machine_id:
                raise ConflictError(
                    f"the change log {path} is machine {file.header.machine_id}'s, not {self._machine_id}'s",
                    hint="give each machine a state directory of its own",
                    ours=str(self._machine_id),
                    theirs=str(file.header.machine_id),
                )
            if found.torn is not None:
                _log.error("the change log %s is damaged at byte %d: %s", path, found.end_offset, found.torn)
                self._torn.append(file)
                damaged.append(found.next_sequence)
            self._files.append(file)
        self._files = deque(sorted(self._files, key=lambda file: file.first_sequence))
        reached = max((file.next_sequence for file in self._files), default=0)
        damaged += self._set_aside_behind_holes(damaged)
        return Recovered(reached, min(damaged, default=None), self._last_time_ns())

    def _set_aside_behind_holes(self, damaged: list[int]) -> list[int]:
        """Set aside the files that do not follow what is left before them: nobody could take them.

        A power cut may leave a later file and not the end of the one before. No sync was over since that end was
        captured, so what the later one holds lies in regions that are touched still.

        Returns:
            Where something is missing.
        """
        kept, missing, wanted = deque[LogFile](), list[int](), None
        for file in self._files:
            lost = [at for at in damaged if (kept[-1].next_sequence if kept else 0) <= at < file.first_sequence]
            follows = not lost and (wanted is None or file.first_sequence == wanted)
            if follows or file.is_empty or frame.may_begin_anew(file.first_sequence):
                kept.append(file)
                wanted = file.next_sequence
                continue
            _log.error("the change log %s is set aside: what comes before it is not there", file.path)
            if wanted is not None and wanted != _NOTHING:  # else that is known already
                missing.append(wanted)
            if file in self._torn:
                self._torn.remove(file)
            file.close()
            os.replace(file.path, file.path.with_suffix(".damaged"))
            wanted = _NOTHING
        self._files = kept
        return missing

    def forget_damage(self) -> None:
        """The damage that `recover` found was taken note of, durably: do not find it again."""
        for file in self._torn:
            changelog.forget_tail(file.data, file.sealed_end)
        self._torn.clear()

    def take(self, sequence: int, most_bytes: int = TAKE_BYTES) -> memoryview | None:
        """Sealed frames, back to back, from the one that holds `sequence` on; None if it is not sealed yet.

        Where numbers were skipped (after a power cut), the next frame there is.
        """
        for file in self._files:
            if sequence < file.next_sequence and not file.is_empty:
                return file.frames_from(max(sequence, file.first_sequence), most_bytes)
        return None

    def make_room(self, next_sequence: int, wanted: int) -> bool:
        """Have an active file with room for a frame of `wanted` bytes; False when the limit (or the disk) is full."""
        if self._files:
            active = self._files[-1]
            follows = active.next_sequence == next_sequence
            if follows and len(active.data) - active.sealed_end >= wanted:
                return True
            # A log that begins anew does so in a file of its own, even behind a full log: it has to say so.
            if len(self._files) >= self._max_files + (not follows):
                return False
        path = self._directory / f"{_PREFIX}{next_sequence:016x}.hrl"
        mapping = None
        if self._spares:
            spare, mapping = self._spares[-1]
            try:
                os.replace(spare, making(path))
            except OSError:
                return False  # a file system that fails is no more room than one that is full
            self._spares.pop()
        now_ns = self._clock.now_ns()
        try:
            created = LogFile.create(path, self._machine_id, next_sequence, self._file_bytes, now_ns, mapping=mapping)
        except LimitError:
            return False  # the file system is full: the same as a full log, and the ladder says so
        self._files.append(created)
        return True

    def trim(self, stored_sequence: int) -> None:
        """Give back the files that hold nothing behind `stored_sequence`; the active one stays."""
        while len(self._files) > 1 and self._files[0].next_sequence <= stored_sequence + 1:
            file = self._files.popleft()
            if len(self._files) + len(self._spares) >= self._max_files:
                file.close()
                os.unlink(file.path)
                continue
            spare, mapping = file.path.with_suffix(".spare"), file.retire()
            os.replace(file.path, spare)
            mapped = sum(kept is not None for _, kept in self._spares)
            if mapped < _MAPPED_SPARES and len(mapping) == self._file_bytes:  # others are an earlier setting's
                self._spares.append((spare, mapping))
            else:
                unmap(mapping)
                self._spares.insert(0, (spare, None))  # the mapped ones are used first

    def dirty(self) -> list[LogFile]:
        """The files that something was sealed in since they were last synced."""
        return [file for file in self._files if file.dirty]

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files.clear()
        for _, mapping in self._spares:
            if mapping is not None:
                unmap(mapping)
        self._spares.clear()

    def _last_time_ns(self) -> int:
        for file in reversed(self._files):
            if file.next_sequence > file.first_sequence:
                last = file.frames_from(file.next_sequence - 1, 0)
                found = frame.read_frame(last) if last is not None else None
                return int(found.table["time_ns"][-1]) if found is not None else 0
        return 0


def _first_of(path: Path) -> int:
    """The first sequence of a file, by its name; 0, before any, where that does not say."""
    try:
        return int(path.stem.removeprefix(_PREFIX), 16)
    except ValueError:
        return 0
