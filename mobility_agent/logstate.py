"""What the agent must remember about its change log besides the frames: one mapped page, changed in place.

`reserved_sequence`: every sequence number ever given out is below it, durably. After a power cut the log's tail may be
gone although its frames were sent; going on at the reserved number, with a gap, never gives a number twice. Reserved
numbers are whole steps of 2^32 plus one, so that a process server knows one when it sees it.
`anew_sequence`: where the log last began anew. Until something was captured there, it still has to.
`gap_open`: order is not known just now. Set before the gap begins and cleared after it ended, so that a process that
dies in between opens the gap again, which is always allowed.
`retired_sequence`: everything before it was durable in the log when regions were retired from the touched record, or
when the agent stopped in good order; a log that has less after that has lost what no record covers. (It can: when a
sync has failed, the next one succeeds, and what the kernel dropped is on no disk.)
`boot_id` and `clean`: whether the operating system restarted since, and whether the agent had stopped in good order.
"""

from __future__ import annotations

import mmap
import os
import struct
from enum import Enum, auto
from pathlib import Path
from typing import Final

import xxhash

from mobility_agent.logfiles import Recovered
from replicar.errors import CorruptionError
from replicar.formats import frame

_MAGIC: Final = b"RPSTATE\x01"
_PAGE: Final = 4096
_STATE = struct.Struct("<8sQQQBB6x16s")


class Past(Enum):
    """What a log that was opened tells of the time before."""

    KNOWN = auto()  # everything acknowledged is in it: the process ended, in whatever way, and the machine did not
    TOUCHED = auto()  # a power cut: disk and log may differ, but only in regions of the touched record
    UNKNOWN = auto()  # a new log, or a damaged one: disk and log may differ anywhere


class LogState:
    """The page, read at the start and written through on every change."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.is_new = os.fstat(self._fd).st_size < _PAGE
        if self.is_new:
            os.ftruncate(self._fd, _PAGE)
        self._page = mmap.mmap(self._fd, _PAGE)
        self.reserved_sequence = self.anew_sequence = self.retired_sequence = 0
        self.gap_open, self.clean, self.boot_id = False, False, bytes(16)
        self.was_clean = False  # when it was written last; known once it has begun
        self.same_boot = False  # as when it was written last; known once it has begun
        if not self.is_new:
            self._load(path)

    def begin(self, found: Recovered, first_sequence: int, boot_id: bytes) -> tuple[Past, int]:
        """What of the past can be relied on, and the number to go on with; durably noted.

        Where something can be missing, numbers go on where none was ever given out, and the ladder has the disks
        compared.

        Args:
            found: what the log's files hold.
            first_sequence: where numbering begins if they hold nothing.
            boot_id: of the operating system that runs now.
        """
        same_boot = self.same_boot = self.boot_id == boot_id
        next_sequence = max(first_sequence, found.next_sequence, self.anew_sequence)
        began = next_sequence > self.anew_sequence  # else the process died before it could say so
        sound = found.damaged_from is None
        past = Past.UNKNOWN
        # What was retired rests on the log's having been durable up to there: pages that the kernel could not write it
        # may have dropped, and read anew from the disk, without any restart.
        is_whole = same_boot or self.clean
        reached = next_sequence if same_boot else found.next_sequence
        whole = is_whole and reached >= self.retired_sequence
        if not self.is_new and sound and began and whole:
            past = Past.KNOWN
        elif not self.is_new and not same_boot and found.sound_until >= self.retired_sequence > 0:
            past = Past.TOUCHED
        if past is not Past.KNOWN:
            if (began or not same_boot or not sound) and not self.is_new:
                next_sequence = max(next_sequence, self.reserved_sequence)
            self.anew_sequence = next_sequence
        if past is Past.UNKNOWN:
            self.retired_sequence = 0  # the next power cut may come before everything dirty is marked durably
        self.reserved_sequence = max(self.reserved_sequence, frame.anew_after(next_sequence + frame.ANEW_STEP))
        self.was_clean = self.clean
        self.boot_id, self.clean = boot_id, False
        self.gap_open = self.gap_open or past is not Past.KNOWN
        self.save(durable=True)
        return past, next_sequence

    def save(self, *, durable: bool = False) -> None:
        """Write the fields into the page; with `durable`, return only when the disk has them.

        One store of 72 bytes; torn by a power cut it fails its checksum and the agent starts as after a lost log.
        """
        body = _STATE.pack(
            *(_MAGIC, self.reserved_sequence, self.anew_sequence, self.retired_sequence),
            *(self.gap_open, self.clean, self.boot_id),
        )
        self._page[: len(body) + 8] = body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
        if durable:
            os.fdatasync(self._fd)

    def close(self) -> None:
        self._page.close()
        os.close(self._fd)

    def _load(self, path: Path) -> None:
        body = self._page[: _STATE.size]
        (checksum,) = struct.unpack_from("<Q", self._page, _STATE.size)
        magic, reserved, anew, retired, gap_open, clean, boot_id = _STATE.unpack(body)
        if magic != _MAGIC or checksum != xxhash.xxh3_64_intdigest(body):
            self.close()
            raise CorruptionError(
                f"the agent's log state {path} is damaged",
                hint="enrol this machine again under its name: it keeps its identity and is compared in full",
                path=str(path),
            )
        self.reserved_sequence, self.anew_sequence, self.retired_sequence = reserved, anew, retired
        self.gap_open, self.clean, self.boot_id = bool(gap_open), bool(clean), boot_id
