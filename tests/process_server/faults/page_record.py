"""What storage ever took into the logs, page range by page range: the witness of two promises.

    written once      a range that was written is never written with other bytes, nor cut in another way
    one writer        once a run has its header, nothing is written into an older run of that machine any more

Told of every Put Page that the real service acknowledged, in the order in which it did.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass, field

from replicar.formats import logblob
from replicar.formats.logblob import BlobName


@dataclass
class PageRecord:
    """`faults` says, in words, what must not have been."""

    faults: list[str] = field(default_factory=list)
    repeats: int = 0
    _ranges: dict[str, dict[int, tuple[int, bytes]]] = field(default_factory=dict)
    _newest: dict[uuid.UUID, BlobName] = field(default_factory=dict)

    @property
    def ranges(self) -> int:
        return sum(map(len, self._ranges.values()))

    def wrote(self, name: str, offset: int, data: bytes) -> None:
        """The service says that these bytes are in the blob now."""
        blob = logblob.read_name(name)
        assert blob is not None, f"somebody writes {name}, which is no log"
        newest = self._newest.get(blob.machine_id)
        if newest is not None and (blob.epoch, blob.run) < (newest.epoch, newest.run):
            self.faults.append(f"{name} was written at {offset} though {newest} had begun")
        if offset == 0 and (newest is None or (blob.epoch, blob.run) > (newest.epoch, newest.run)):
            self._newest[blob.machine_id] = blob
        self._once(name, offset, len(data), hashlib.blake2b(data, digest_size=16).digest())

    def _once(self, name: str, offset: int, length: int, digest: bytes) -> None:
        there = self._ranges.setdefault(name, {})
        before = there.get(offset)
        if before is not None and before == (length, digest):
            self.repeats += 1
            return
        overlapping = [
            (start, size) for start, (size, _) in there.items() if start < offset + length and offset < start + size
        ]
        if overlapping:
            self.faults.append(f"{name}: {length} bytes at {offset} were written over {overlapping}")
        there[offset] = length, digest
