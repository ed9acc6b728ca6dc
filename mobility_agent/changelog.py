"""The change log: what was captured and is not in storage yet, in order, in a row of mapped files of bounded size.

Theory. A capture connection receives straight into the free end of the *open frame* (`buffer`), then says what the
bytes are (`describe`), then does the write to the disk, then acknowledges. The descriptor is in the file's staging
area before the disk is touched, so a killed process loses nothing that was acknowledged. `seal` turns the open frame
into a frame; only sealed frames are sent, and `sync` makes them durable.

One open frame at a time, whoever fills it, is what puts the writes of several connections and disks into one order. A
connection owns the open frame while it fills it; when another one needs it, or a record comes between, the frame is
sealed and what the owner had received of an unfinished request is given back to it (`Owner.release`).

When the files are full, `claim` gives a scratch area instead: writes go to the disk undescribed, and the ladder notes
which regions they touched. A little room is kept back, so that the record that says so mostly fits; what a stream must
say and has no room for is kept, and said before anything else (`say`), so a full log keeps nobody from starting.

Weak: a page of the log is faulted in when it is first touched, and a file is made when it is first needed, both on the
path of a write.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from mobility_agent.logfile import LogFile
from mobility_agent.logfiles import LogFiles
from mobility_agent.logstate import LogState, Past
from mobility_agent.owner import Owner
from replicar.clock import Clock
from replicar.errors import LimitError
from replicar.formats import changelog, frame, record
from replicar.formats.changelog import PACK_STAGED_COUNT, STAGED_COUNT, STAGING_CAPACITY
from replicar.formats.frame import (
    DESCRIPTOR_BYTES,
    HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    PACK_DESCRIPTOR,
    Buffer,
    Flag,
    Kind,
)

#: Room for the largest frame that may be opened; less than that at a file's end is left unused.
FRAME_ROOM: Final = HEADER_BYTES + MAX_PAYLOAD_BYTES + STAGING_CAPACITY * DESCRIPTOR_BYTES
#: Kept back in the last file for records (marks, the gap itself) when the log is full.
RECORD_ROOM: Final = 64 << 10
#: An open frame this large is sealed at the end of a batch, so that the sender gets it while more comes in.
SEAL_BYTES: Final = 512 << 10
#: Of an unfinished request, more than this is not worth being copied to another frame: its end is waited for.
MOVED_BYTES: Final = 4096
#: A connection is given at least this much room to receive into.
MIN_BUFFER_BYTES: Final = 64 << 10
DEFAULT_FILE_BYTES: Final = 64 << 20
_TABLE_START = changelog.STAGING_OFFSET + changelog.STAGING_TABLE


class ChangeLog:
    """See the module. All methods run on one thread (the event loop's), but the file syncs that `sync` hands out.

    Args:
        directory: where the files are; made if it is not there.
        first_sequence: where numbering begins if the directory is empty.
        limit_bytes: of all files together.
        boot_id: of the running operating system; staging is trusted only if it is the one that wrote it.

    Raises:
        LimitError: `limit_bytes` can't be honoured.
        ConflictError: the files are another machine's.
        CorruptionError: a file's header or the state page is damaged.
    """

    def __init__(
        self,
        directory: Path,
        machine_id: uuid.UUID,
        *,
        first_sequence: int,
        limit_bytes: int,
        boot_id: bytes,
        clock: Clock,
        file_bytes: int = DEFAULT_FILE_BYTES,
    ) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._machine_id = machine_id
        self._clock = clock
        self._files = LogFiles(directory, machine_id, file_bytes=file_bytes, limit_bytes=limit_bytes, clock=clock)
        self._waiters: list[asyncio.Future[None]] = []
        self._scratch = memoryview(bytearray(HEADER_BYTES + MAX_PAYLOAD_BYTES))
        self._owner: Owner | None = None
        self._unsaid: deque[tuple[Kind, record.Item, Flag]] = deque()  # few: what a start says, and one gap
        self._sync_lock = asyncio.Lock()
        self.state = LogState(directory / "state")
        self.stored_sequence = first_sequence - 1
        self.last_time_ns = 0
        self.bytes_captured = 0
        #: Each is called with the table of every frame that is finished, before the frame can be sent.
        self.on_sealed: list[Callable[[npt.NDArray[np.void]], None]] = []
        self.ordered = True  # False: writes are not described (the log is full)
        # The open frame: payload from `start`, filled up to `free`, room up to `limit`, in `data`.
        self.data = self._scratch
        self.start = self.free = self.limit = 0
        self._count = 0
        self._open_time_ns = 0  # of the open frame's first descriptor
        self._first_audit = self._last_audit = 0  # the last run of audits with nothing between them
        self.next_sequence = self.first_sequence = first_sequence
        self.past = self._recover(first_sequence, boot_id)

    # -- what there is ------------------------------------------------------------------------------------------

    @property
    def survived(self) -> bool:
        """Whether everything acknowledged before is in the log."""
        return self.past is Past.KNOWN

    @property
    def used_bytes(self) -> int:
        """Bytes of frames held, the open one included."""
        return self._files.used_bytes + (self.free - self.start if self._count else 0)

    @property
    def limit_bytes(self) -> int:
        return self._files.limit_bytes

    def take(self, sequence: int) -> memoryview | None:
        """Sealed frames, back to back, from the one that holds `sequence` on; None if it is not sealed yet.

        At most 1 MiB, unless one frame alone is more. Where numbers were skipped (after a power cut), the next frame
        there is. The view is good until `trim` passes it.
        """
        return self._files.take(sequence)

    async def wait_for(self, sequence: int) -> None:
        """Return when something with this sequence (or a later one) was captured."""
        while self.next_sequence <= sequence:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

    def oldest_unstored_time_ns(self) -> int | None:
        """Capture time of the first change that is not stored; None when all is, but for audits at the end: nothing
        would be missing without those."""
        if self.next_sequence <= self.stored_sequence + 1:
            return None
        if self.next_sequence == self._last_audit + 1 and self.stored_sequence + 1 >= self._first_audit:
            return None
        held = self._files.take(self.stored_sequence + 1, most_bytes=0)  # one frame: this is asked ten times a second
        if held is None:
            return self._open_time_ns if self._count else None
        head = frame.read_header(held)
        return None if head is None else int(frame.table_view(held[head.table_offset : head.frame_bytes])["time_ns"][0])

    # -- capture ------------------------------------------------------------------------------------------------

    def claim(self, owner: Owner, unparsed: bytes) -> bool:
        """Make `owner` the one that fills the open frame, beginning with what it had received before.

        Returns:
            False when the log is full; then nothing changed, but that the open frame is sealed.
        """
        self.seal()
        if not self.say_rest() or not self._files.make_room(self.next_sequence, FRAME_ROOM + RECORD_ROOM):
            return False
        file = self._files.active
        changelog.stage_frame(file.data, file.sealed_end, self.next_sequence)
        self._open(owner, file.data, file.sealed_end + HEADER_BYTES, unparsed)
        return True

    def claim_scratch(self, owner: Owner, unparsed: bytes) -> None:
        """The same with a scratch area, whose bytes go nowhere but to the disk."""
        self.seal()
        self._open(owner, self._scratch, HEADER_BYTES, unparsed)

    def buffer(self, owner: Owner, needed: int) -> memoryview | None:
        """Where `owner` receives next: room for `needed` bytes (0: whatever comes). None: claim first."""
        if self._owner is not owner or self.limit - self.free < (needed or MIN_BUFFER_BYTES):
            return None
        if needed and self.free - self.start >= SEAL_BYTES:
            # To the request's end and no further: then the frame is sealed without anything to be moved to the next.
            return self.data[self.free : self.free + needed]
        return self.data[self.free : self.limit]

    def disown(self, owner: Owner) -> None:
        """`owner` goes away: seal what it filled."""
        if self._owner is owner:
            self.seal()

    @property
    def descriptors_left(self) -> int:
        """How often `describe` may be called before the open frame has to be sealed."""
        return STAGING_CAPACITY - self._count

    def now_ns(self) -> int:
        """The wall clock, kept from falling: the time of a stream never does."""
        now = self._clock.now_ns()
        if now > self.last_time_ns:
            self.last_time_ns = now
        return self.last_time_ns

    def describe(self, kind: int, disk: int, offset: int, length: int, place: int, time_ns: int) -> None:
        """Say what the owner's bytes at `place` (an index into `data`, 0 for none) are.

        The descriptor is stored before the count that makes it valid: killed in between, it was never there.
        The caller minds `descriptors_left`.
        """
        count = self._count
        relative = place - self.start if place else 0
        PACK_DESCRIPTOR.pack_into(
            self.data, _TABLE_START + count * DESCRIPTOR_BYTES, offset, length, time_ns, relative, disk, kind, 0
        )
        if not count:
            self._open_time_ns = time_ns
        self._count = count = count + 1
        self.data[STAGED_COUNT] = PACK_STAGED_COUNT.pack(count)
        self.next_sequence += 1
        self.bytes_captured += length

    def batch_done(self) -> None:
        """The owner has parsed what it received: wake the sender, seal what is large, take back bytes of no meaning."""
        if not self._count:
            owner = self._owner
            if owner is not None and owner.parsed > self.start:  # only reads and the like: begin again
                rest = bytes(self.data[owner.parsed : self.free])
                self.data[self.start : self.start + len(rest)] = rest
                owner.parsed, self.free = self.start, self.start + len(rest)
            return
        unparsed = self.free - self._owner.parsed if self._owner is not None else 0
        large = self.free - self.start >= SEAL_BYTES and unparsed < MOVED_BYTES
        if large or self._count == STAGING_CAPACITY:
            self.seal()
        self._wake()

    # -- records, background copies, audits ---------------------------------------------------------------------

    def append_record(self, kind: Kind, item: record.Item, *, flags: Flag = Flag.NONE) -> int:
        """Put a record into the stream; its sequence.

        Raises:
            LimitError: not even the room kept back is left.
        """
        sequence = self._put_record(kind, item, flags) if self.say_rest() else None
        if sequence is None:
            raise LimitError("the change log has no room left even for a record", hint="raise journal_bytes")
        return sequence

    def say(self, kind: Kind, item: record.Item, *, flags: Flag = Flag.NONE) -> None:
        """Put a record into the stream that must not be missing there. Without room for it now, it comes as soon as
        there is some, and nothing comes before it."""
        self._unsaid.append((kind, item, flags))
        self.say_rest()

    def say_rest(self) -> bool:
        """Put into the stream what `say` had no room for; whether nothing is left unsaid."""
        while self._unsaid and self._put_record(*self._unsaid[0]) is not None:
            self._unsaid.popleft()
        return not self._unsaid

    def append_copy(self, kind: Kind, disk: int, offset: int, length: int, content: Buffer = b"") -> bool:
        """Put a background copy (Flag.SEED) into the stream: a WRITE with `content`, or a ZERO. False: no room now."""
        table = frame.describe(kind, disk=disk, offset=offset, length=length, time_ns=self.now_ns(), flags=Flag.SEED)
        return self._append(table, content, room=FRAME_ROOM + RECORD_ROOM) is not None

    def append_audit(self, disk: int, offset: int, length: int, digest: bytes) -> int | None:
        """Say what the disk holds there now: `digest` is the XXH3-128 of those bytes, canonical (big-endian).

        Returns:
            Its sequence: the disk is as the stream says up to before it. None: no room now.
        """
        table = frame.describe(Kind.AUDIT, disk=disk, offset=offset, length=length, time_ns=self.now_ns())
        sequence = self._append(table, digest, room=FRAME_ROOM + RECORD_ROOM)
        if sequence is not None:
            if sequence != self._last_audit + 1:
                self._first_audit = sequence
            self._last_audit = sequence
        return sequence

    # -- towards the server -------------------------------------------------------------------------------------

    def seal(self) -> None:
        """Finish the open frame; whoever owned it gets back what it had received of an unfinished request."""
        owner, count = self._owner, self._count
        payload_end = self.free
        if owner is not None:
            payload_end = owner.parsed
            self._owner = None
            owner.release(bytes(self.data[payload_end : self.free]))
        if count:
            file = self._files.active
            table = bytes(changelog.staged_table(self.data, count))
            region = self.data[self.start - HEADER_BYTES :]
            first = self.next_sequence - count
            length = frame.seal_in_place(region, payload_end - self.start, table, self._machine_id, first)
            self._sealed(file, length, table)
            self.data[STAGED_COUNT] = PACK_STAGED_COUNT.pack(0)
        self._count = 0
        self.start = self.free = self.limit = 0

    def trim(self, stored_sequence: int) -> None:
        """Everything up to `stored_sequence` is in storage: files that hold nothing else are given back."""
        self.stored_sequence = max(self.stored_sequence, min(stored_sequence, self.next_sequence - 1))
        self._files.trim(self.stored_sequence)
        self.first_sequence = self._files.first_sequence or self.next_sequence

    async def sync(self) -> None:
        """Return when everything captured before the call is durable."""
        self.seal()
        async with self._sync_lock:
            dirty = self._files.dirty()
            for file in dirty:
                file.dirty = False
            try:
                for file in dirty:
                    await asyncio.to_thread(file.sync)
            except BaseException:
                for file in dirty:
                    file.dirty = True
                raise

    async def close(self) -> None:
        """Sync, and remember that the end was in good order."""
        await self.sync()
        self.state.clean, self.state.retired_sequence = True, self.next_sequence
        self.state.save(durable=True)
        self._close_files()

    def abandon(self) -> None:
        """Close without any care, as if the process had died (for tests of exactly that)."""
        self._close_files()

    # -- inside -------------------------------------------------------------------------------------------------

    def _open(self, owner: Owner, data: memoryview, start: int, unparsed: bytes) -> None:
        self.data, self.start, self.limit = data, start, start + MAX_PAYLOAD_BYTES
        self.free = start + len(unparsed)
        data[start : self.free] = unparsed
        self._owner = owner
        owner.parsed = start

    def _recover(self, first_sequence: int, boot_id: bytes) -> Past:
        """Open what is there, and say what of the past can be relied on (see `LogState.begin`)."""
        found = self._files.recover(trust_staging=self.state.boot_id == boot_id)
        self.last_time_ns = found.last_time_ns
        past, self.next_sequence = self.state.begin(found, first_sequence, boot_id)
        self._files.forget_damage()
        self.first_sequence = self._files.first_sequence or self.next_sequence
        self.stored_sequence = self.first_sequence - 1
        return past

    def _append(self, table: bytes, payload: Buffer, *, room: int) -> int | None:
        return self._put(table, payload, room) if self.say_rest() else None

    def _put_record(self, kind: Kind, item: record.Item, flags: Flag) -> int | None:
        payload = record.pack_record(item)
        disk = item.index if isinstance(item, record.Disk) else 0
        table = frame.describe(kind, disk=disk, length=len(payload), time_ns=self.now_ns(), flags=flags)
        return self._put(table, payload, HEADER_BYTES + len(payload) + len(table) + frame.ALIGNMENT)

    def _put(self, table: bytes, payload: Buffer, room: int) -> int | None:
        self.seal()
        if not self._files.make_room(self.next_sequence, room):
            return None
        file = self._files.active
        region = file.data[file.sealed_end :]
        region[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
        sequence = self.next_sequence
        length = frame.seal_in_place(region, len(payload), table, self._machine_id, sequence)
        self.next_sequence += 1
        self._sealed(file, length, table)
        self._wake()
        return sequence

    def _sealed(self, file: LogFile, length: int, table: bytes) -> None:
        for observe in self.on_sealed:
            observe(frame.table_view(table))
        file.sealed(length, self.next_sequence)
        if self.next_sequence + frame.ANEW_STEP // 2 > self.state.reserved_sequence:
            self.state.reserved_sequence = frame.anew_after(self.next_sequence + frame.ANEW_STEP)
            self.state.save(durable=True)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _close_files(self) -> None:
        self.data = self._scratch
        self._files.close()
        self.state.close()
