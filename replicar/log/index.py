"""A machine's index blobs in storage: which there are, their roots, and where they let a reader of the log begin.

A *checkpoint* was made when the log up to its sequence had been read and verified, and says with which digest the log
goes on. The newest sound *fold* says which checkpoint is the *floor*: behind it the log is whole, before it only the
checkpoints that the fold keeps are left. Every reader that does not know better begins at the floor.

Blobs without a header were never finished and are passed over. One that is damaged is passed over too where an older
one does as well: a checkpoint spares work, it vouches for nothing that the log itself could not be read for. Only when
none is left that a folded log can begin with is that an error. A fold of a version that is not known here is always
one: it is in force for whoever wrote it, and nobody's to overrule.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from replicar.errors import CorruptionError, PermanentError
from replicar.formats import indexblob
from replicar.formats.fields import Fields
from replicar.formats.indexblob import BlobKind, IndexHeader, IndexName, Root
from replicar.log.reader import LogReader, Start, Tail
from replicar.storage.store import PageBlobStore, is_gone

#: What the first request for a checkpoint or fold reads; most of them are smaller.
FIRST_READ_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Listing:
    """The index blobs that there are, each kind in ascending order, with their sizes."""

    sizes: Mapping[IndexName, int]
    tiers: tuple[IndexName, ...] = ()
    checkpoints: tuple[IndexName, ...] = ()
    folds: tuple[IndexName, ...] = ()


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint that a fold keeps, and why."""

    checkpoint: IndexName
    reason: str


@dataclass(frozen=True, slots=True)
class Fold:
    """What is left of the log: whole behind `floor`; before it, what the `kept` checkpoints need.

    A generation of 0 stands for a log that was never folded.
    """

    generation: int = 0
    floor: IndexName | None = None
    kept: tuple[Kept, ...] = ()
    folded_ns: int = 0

    @property
    def floor_sequence(self) -> int:
        """The first sequence that any instant from there on is offered at; 0: from the beginning."""
        return self.floor.first if self.floor is not None else 0

    def offers(self, checkpoint: IndexName) -> bool:
        """Whether a checkpoint's state is still to be had."""
        return checkpoint.first >= self.floor_sequence or any(item.checkpoint == checkpoint for item in self.kept)


@dataclass(frozen=True, slots=True)
class LogIndex:
    """What is known of the index: its blobs, and the newest sound fold."""

    store: PageBlobStore
    machine_id: uuid.UUID
    keys: Mapping[int, bytes] = field(repr=False)
    listing: Listing
    fold: Fold

    def offered(self, until: int | None = None) -> list[IndexName]:
        """The checkpoints that may be used, newest first, those after sequence `until` left out."""
        names = [name for name in self.listing.checkpoints if until is None or name.first <= until]
        return [name for name in reversed(names) if self.fold.offers(name)]

    async def root(self, name: IndexName) -> Root | None:
        """The opened root of a blob; None where it was never finished, or is not there."""
        return await read_root(self.store, self.keys, name, self.listing.sizes.get(name))

    async def start(self, *, before: int | None = None) -> Start:
        """Where to begin reading: at the newest checkpoint that ends a segment (before segment `before`), or the floor.

        Raises:
            CorruptionError: the log was folded, and the floor can't be read.
        """
        floor = self.fold.floor_sequence
        for name in self.offered():
            if name.first < floor:
                break
            try:
                root = await self.root(name)
            except CorruptionError:
                if name == self.fold.floor:
                    raise
                continue
            start = read_start(root.fields) if root is not None else None
            if start is None:
                continue
            if name != self.fold.floor and before is not None and start.tail.number >= before:
                continue
            if await self.stands(start):
                return start
        if self.fold.floor is not None:
            raise floor_missing(self.machine_id, self.fold)
        return Start()

    async def stands(self, start: Start) -> bool:
        """Whether no later run replaced what the checkpoint was made of."""
        runs = await LogReader(self.store, self.machine_id, self.keys).runs(since=start.run)
        later = (run for run in runs if (run.header.name.epoch, run.header.name.run) > start.run)
        return all(run.header.first_number > start.tail.number for run in later)


async def open_index(store: PageBlobStore, machine_id: uuid.UUID, keys: Mapping[int, bytes]) -> LogIndex:
    """Look at a machine's index blobs.

    Raises:
        CorruptionError: there are folds, and none of them can be read; or one was made by a later version of Replicar.
        PermanentError: a key is not at hand.
    """
    listing = await list_index(store, machine_id)
    damage: CorruptionError | None = None
    for name in reversed(listing.folds):
        try:
            root = await read_root(store, keys, name, listing.sizes[name])
        except CorruptionError as error:
            if "version" in error.fields:
                raise  # it is in force for whoever wrote it, and may have given up what an older one keeps
            damage = damage or error
            continue
        if root is not None:
            return LogIndex(store, machine_id, keys, listing, read_fold(root))
    if damage is not None:
        raise damage
    return LogIndex(store, machine_id, keys, listing, Fold())


async def read_root(
    store: PageBlobStore, keys: Mapping[int, bytes], name: IndexName, size_bytes: int | None
) -> Root | None:
    """The root of an index blob; None where it was never finished, or is not there (any more).

    Raises:
        CorruptionError: it is damaged.
    """
    if size_bytes is None:
        return None
    try:
        data = await store.read(str(name), 0, min(size_bytes, FIRST_READ_BYTES))
        header = indexblob.read_header(data, name)
        if header is None:
            return None
        return await open_root(store, keys, header, data)
    except PermanentError as error:
        if is_gone(error):
            return None
        raise


async def open_root(store: PageBlobStore, keys: Mapping[int, bytes], header: IndexHeader, head: bytes = b"") -> Root:
    """The root that belongs to a header; `head` is what was already read of the blob."""
    end = header.root_offset + header.root_bytes
    if end <= len(head):
        sealed = head[header.root_offset : end]
    else:
        sealed = await store.read(str(header.name), header.root_offset, header.root_bytes)
    return indexblob.open_root(header, sealed, key_of(keys, header))


def key_of(keys: Mapping[int, bytes], header: IndexHeader) -> bytes:
    """Raises PermanentError when the key is not at hand."""
    try:
        return keys[header.key_id]
    except KeyError:
        raise PermanentError(
            f"index blob {header.name} is under key {header.key_id}, which is not at hand",
            hint="fetch the machine's keys from the config server again",
            key_id=header.key_id,
        ) from None


def read_fold(root: Root) -> Fold:
    """What a fold says.

    Raises:
        CorruptionError: it says something that can't be.
    """
    machine, fields = root.header.name.machine_id, root.fields
    floor = checkpoint_name(fields.text("floor"), machine)
    items = fields.each("kept")
    kept = tuple(Kept(checkpoint_name(item.text("checkpoint"), machine), item.text("reason", "")) for item in items)
    return Fold(root.header.name.first, floor, kept, fields.integer("folded_ns"))


def read_start(fields: Fields) -> Start | None:
    """Where a checkpoint lets the log go on; None for one that was made in the middle of a segment.

    Raises:
        CorruptionError: it says something that can't be.
    """
    if not fields.has("tail"):
        return None
    tail = fields.inner("tail")
    digest = tail.binary("digest", indexblob.DIGEST_BYTES)
    places = tail.inner("offsets")
    offsets = {name: places.integer(name) for name in places.names()}
    found = Tail(tail.integer("number"), tail.integer("sequence"), digest, "a checkpoint")
    return Start(found, (tail.integer("epoch"), tail.integer("run")), offsets)


def start_fields(start: Start) -> dict[str, object]:
    """The counterpart of `read_start`."""
    tail = start.tail
    return {
        "number": tail.number,
        "sequence": tail.sequence,
        "digest": tail.digest.hex(),
        "epoch": start.run[0],
        "run": start.run[1],
        "offsets": dict(start.offsets),
    }


def checkpoint_name(text: str, machine_id: uuid.UUID) -> IndexName:
    """The checkpoint that is named.

    Raises:
        CorruptionError: it is none of this machine's.
    """
    name = indexblob.read_name(text)
    if name is None or name.kind is not BlobKind.CHECKPOINT or name.machine_id != machine_id:
        raise CorruptionError(f"{text[:200]!r} is no checkpoint of machine {machine_id}")
    return name


def floor_missing(machine_id: uuid.UUID, fold: Fold) -> CorruptionError:
    return CorruptionError(
        f"the log of machine {machine_id} was folded, and the checkpoint it begins with is not there: {fold.floor}",
        hint="put the index blobs back as they were (soft delete, snapshot); kept points may still be recovered",
        machine_id=str(machine_id),
        blob=str(fold.floor),
    )


async def read_index_header(store: PageBlobStore, name: IndexName) -> IndexHeader | None:
    """A blob's header; None where it was never finished, or is not there (any more). Raises as `read_root`."""
    try:
        return indexblob.read_header(await store.read(str(name), 0, indexblob.HEADER_BYTES), name)
    except PermanentError as error:
        if is_gone(error):
            return None
        raise


async def list_index(store: PageBlobStore, machine_id: uuid.UUID) -> Listing:
    """All index blobs of a machine by their names."""
    sizes: dict[IndexName, int] = {}
    for info in await store.list(indexblob.index_prefix(machine_id)):
        name = indexblob.read_name(info.name)
        if name is not None:
            sizes[name] = info.size_bytes
    by_kind = {kind: tuple(sorted(name for name in sizes if name.kind is kind)) for kind in BlobKind}
    return Listing(sizes, by_kind[BlobKind.TIER], by_kind[BlobKind.CHECKPOINT], by_kind[BlobKind.FOLD])
