"""The threads that compress and encrypt: zstd and AES-GCM release the interpreter's lock, so all cores are used.

Each thread keeps its compressor. What is sealed lies in buffers of a pool, one segment each, until it is uploaded; the
pool is the limit of what all machines together have between cache and storage, and the gate in front of it says who has
its turn.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, ParamSpec, TypeVar

import zstandard

from process_server.bandwidth import Pace
from process_server.buffers import BufferPool
from process_server.effort import Effort
from process_server.gate import Gate
from process_server.level import Drive
from process_server.load import Meter
from process_server.vitals import Host
from replicar.errors import CorruptionError
from replicar.formats import frame, segment
from replicar.formats.frame import Frame
from replicar.formats.segment import Position, SealedChunks

#: Large segments fill the gate's window first; this many small ones may be under way.
SEALED_BUFFERS: Final = 16
DEFAULT_UPLOADS: Final = 4
#: Segments sealed ahead of the uploads, so that a free upload never waits for a processor.
SEALED_AHEAD: Final = 2
#: So little is sealed where it is: handing it to a thread and back, the interpreter's lock with it, costs more than its
#: quarter of a millisecond. With a thousand modest machines that was a fifth of all that a server spent.
QUICK_BYTES: Final = 96 << 10
#: Above it zstd is several times slower.
QUICK_LEVEL: Final = 3

_T = TypeVar("_T")
_P = ParamSpec("_P")
Frames = list[tuple[int, Frame]]


class Sealer:
    """Seals segments for all machines.

    Args:
        level: zstd's, -7 to 19, where no narrow link asks for more; 0 stores as it is.
        salt: gives 32 fresh random bytes.
        uploads: of one machine at once; what all have under way is enough for that.
        pace: what may be uploaded; None for no limit.
        now: monotonic seconds.
    """

    def __init__(
        self,
        level: int,
        *,
        threads: int | None = None,
        salt: Callable[[], bytes] | None = None,
        uploads: int = DEFAULT_UPLOADS,
        pace: Pace | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        window_bytes = (uploads + SEALED_AHEAD) * segment.MAX_SEGMENT_BYTES
        buffers = max(SEALED_BUFFERS, uploads + SEALED_AHEAD + 1)
        self.gate = Gate(BufferPool(segment.MAX_SEGMENT_BYTES, buffers), window_bytes, pace)
        cores = os.cpu_count() or 1
        self.meter = Meter(now, cores)
        self._configured, self._drive = level, Drive()
        self._salt = salt or _random_salt
        self._local = threading.local()
        self._threads = ThreadPoolExecutor(threads or cores, thread_name_prefix="seal")

    @property
    def level(self) -> int:
        """zstd's, as it is used just now."""
        return self._drive.level(self._configured, self.gate.rate)

    def is_quick(self, raw_bytes: int) -> bool:
        """Whether so much is sealed sooner than it is handed over."""
        return raw_bytes <= QUICK_BYTES and self.level <= QUICK_LEVEL

    def look(self, host: Host) -> None:
        """Choose the level anew, by how things went since the last look."""
        load = self.meter.look(host)
        if load is not None:
            self._drive = self._drive.after(load)

    def close(self) -> None:
        self.gate.close()
        self._threads.shutdown(wait=True)

    async def run(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run `work` in a thread. Cancelled or not, it returns only when the thread is done with its buffers."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._threads, lambda: work(*args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                await asyncio.wait([future])
            future.exception()  # looked at, so that nobody reports it as forgotten
            raise

    def seal(
        self,
        raw: memoryview,
        position: Position,
        data_key: bytes,
        key_id: int,
        out: memoryview,
        effort: Effort,
        *,
        verify: bool,
    ) -> SealedChunks:
        """Compress and encrypt a run of frames into `out`, all but its place in the chain; in a thread (see `run`), but
        what `is_quick`.

        Args:
            effort: of the machine; asked, and told.
            verify: check every frame again, because the run was away from memory since it was received.

        Raises:
            CorruptionError: it is not what was received.
        """
        frames = list(frame.frames_in(raw)) if verify else _walk(raw)
        first, last = frames[0][1].header, frames[-1][1].header
        if first.first_sequence != position.first_sequence or last.last_sequence != position.last_sequence:
            raise CorruptionError(f"the cache holds another run than {position.first_sequence}")
        compressor = self._compressor(self.level)
        choose = partial(effort.choose, compress=compressor.compress) if compressor is not None else None
        chunks = segment.seal_chunks(
            raw, position, data_key, self._salt(), compressor, key_id=key_id, out=out, choose=choose
        )
        effort.learn(chunks.shrank)
        segment.add_table(chunks, frames)
        return chunks

    def _compressor(self, level: int) -> zstandard.ZstdCompressor | None:
        """This thread's for that level, of which there are few."""
        if not level:
            return None
        known: dict[int, zstandard.ZstdCompressor] = self._local.__dict__.setdefault("compressors", {})
        if level not in known:
            known[level] = zstandard.ZstdCompressor(level=level)
        return known[level]


def _walk(raw: memoryview) -> Frames:
    """The frames of a run that was verified as it came in and has not left memory since."""
    frames: Frames = []
    offset = 0
    while offset < len(raw):
        header = frame.read_header(raw, offset)
        assert header is not None, "a run consists of whole frames"
        frames.append((offset, Frame(header, raw[offset : offset + header.frame_bytes])))
        offset += header.frame_bytes
    return frames


def _random_salt() -> bytes:
    return os.urandom(segment.SALT_BYTES)
