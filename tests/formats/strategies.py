"""What Hypothesis makes of formats: frames that a sane agent could write, and runs of them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from hypothesis import strategies as st

from replicar.formats import frame
from replicar.formats.frame import Kind

MACHINE = uuid.UUID("11111111-2222-4333-8444-555555555555")
SECTOR = frame.SECTOR_BYTES
#: Any text that can be encoded, control characters and all.
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)
SEQUENCES = st.integers(1, frame.MAX_SEQUENCE + 1)


@dataclass(frozen=True)
class Change:
    """One descriptor before it is packed; `data` are its bytes in the payload."""

    kind: Kind
    disk: int
    offset: int
    length: int
    data: bytes
    flags: int


@st.composite
def changes(draw: st.DrawFn) -> Change:
    kind = draw(st.sampled_from(list(Kind)))
    disk, flags = draw(st.integers(0, 65535)), draw(st.integers(0, 255))
    if kind in (Kind.MARK, Kind.GAP, Kind.DISK):
        data = draw(st.binary(min_size=1, max_size=40))
        return Change(kind, disk, 0, len(data), data, flags)
    most = 4 if kind == Kind.WRITE else frame.MAX_DISK_BYTES // SECTOR
    sectors = draw(st.integers(1, most))
    offset = draw(st.integers(0, frame.MAX_DISK_BYTES // SECTOR - sectors)) * SECTOR
    size = {Kind.WRITE: sectors * SECTOR, Kind.AUDIT: 16}.get(kind, 0)
    data = draw(st.binary(min_size=1, max_size=9))
    return Change(kind, disk, offset, sectors * SECTOR, (data * (size // len(data) + 1))[:size], flags)


def build(items: list[Change], first_sequence: int, *, gap: bytes = b"", time_ns: int = 1) -> bytes:
    """These changes as one frame; `gap` stands before each one's bytes, as request headers do."""
    table, payload = bytearray(), bytearray()
    for row, item in enumerate(items):
        payload += gap
        place = len(payload) if item.data else 0
        table += frame.describe(
            item.kind,
            disk=item.disk,
            offset=item.offset,
            length=item.length,
            time_ns=time_ns + row // 2,
            place=place,
            flags=item.flags,
        )
        payload += item.data
    return frame.build_frame(MACHINE, first_sequence, table, payload)


@st.composite
def runs(draw: st.DrawFn, most: int = 4) -> list[bytes]:
    """One to `most` frames that follow each other."""
    sequence = draw(st.integers(1, 1 << 60))
    made = []
    for _ in range(draw(st.integers(1, most))):
        items = draw(st.lists(changes(), min_size=1, max_size=5))
        made.append(build(items, sequence, gap=draw(st.binary(max_size=3)), time_ns=draw(st.integers(0, 1 << 62))))
        sequence += len(items)
    return made
