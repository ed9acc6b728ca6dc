"""Folds a log by policy: gives up points, and frees what only they needed.

Two steps, far apart in time, so that neither a death at any instant nor a second folder can cost a kept point a byte:

- **Decide.** A new *fold* is written: from which checkpoint on the log is whole, and which states before it are kept
  (each as a checkpoint of its own, made and read back first). Nothing is freed. Of two who decide at once one can: a
  fold's blob has its generation for a name, and what its dead author might still write is refused by a lease.
- **Sweep.** What the newest fold gave up is freed, GRACE_SECONDS after it was written at the earliest, when everybody
  who opened a state by an older one has pinned it or was told (see `pins`). A sweep looks at what there is, so it is
  done again until it finds nothing; then the fold is marked as swept.

A run sweeps the fold that is there, then decides the next. What a fold gave up stays given up: each keeps only what the
one before it kept or what lies behind its floor, so a folder that works by an older fold frees nothing that a newer one
needs.

Reading, the log begins at the floor; the chain of digests goes on from the one that the floor's checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from recovery.blobwriter import Author, BlobWriter
from recovery.chunks import MachineLog
from recovery.index import Index
from recovery.indexing import write_checkpoint
from recovery.keeping import floor_of, opened
from recovery.live import Live, Sweep, plan_sweep, written_ranges
from recovery.lock import FoldLock
from recovery.pins import list_pins
from recovery.points import base_of, index_at
from recovery.requests import Latest
from recovery.retention import FoldPlan, Pin, Policy, aged_from, plan_fold
from replicar.clock import Clock
from replicar.errors import ConflictError, CorruptionError, FencedError
from replicar.formats import logblob
from replicar.formats.indexblob import BlobKind, IndexName
from replicar.log.index import Fold, LogIndex, open_index, read_fold, read_root

#: Between a fold and the sweep of what it gave up.
GRACE_SECONDS: Final = 600
#: Index blobs that nothing names are removed when they are so old: an indexer may be about to name them.
ORPHAN_SECONDS: Final = 3600
#: Room of a fold's blob; its root names a few hundred checkpoints.
FOLD_BYTES: Final = 4 << 20
SWEPT: Final = "swept"
_NO_TOKEN: Final = "0" * 8
_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Folded:
    """What a run came to."""

    generation: int
    floor_sequence: int
    kept: int
    decided: bool = False  # a new fold was written
    swept: bool = False  # what the fold before had given up is freed
    freed_bytes: int = 0
    deleted_blobs: int = 0
    held_bytes: int = 0  # dead, and in blobs that their writer still holds
    waiting_for_pins: bool = False


class Folder:
    """Folds one machine's log; clock, randomness and storage are handed in. Made for one `run`."""

    def __init__(
        self,
        log: MachineLog,
        policy: Policy,
        *,
        clock: Clock,
        random: Callable[[int], bytes],
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._log, self._policy, self._clock, self._random = log, policy, clock, random
        self._grace_ns = int(grace_seconds * _NS)
        self._lock = FoldLock(log.store, log.machine_id, clock, random)

    async def run(self) -> Folded:
        """Sweep, then decide; see the module.

        Raises:
            FencedError: somebody else is at it.
            CorruptionError: the index is damaged; nothing was given up.
            PermanentError: there is no log of this machine.
        """
        await self._lock.take()
        try:
            known = await self._settled()
            done = await self._sweep(known)
            fold = known.fold
            plan = await self._plan(known)
            if plan is not None:
                fold = await self._decide(known, plan)
        finally:
            await self._lock.release()
        return replace(
            done,
            generation=fold.generation,
            floor_sequence=fold.floor_sequence,
            kept=len(fold.kept),
            decided=plan is not None,
        )

    async def _settled(self) -> LogIndex:
        """The index, when no dead author holds a fold any more.

        One that was never finished could still be; one that was could be neither marked as swept nor removed, and
        nothing would ever be given up again.
        """
        log = self._log
        known = await open_index(log.store, log.machine_id, log.keys)
        leased = {info.name for info in await log.store.list(_index_prefix(log)) if info.leased}
        held = [name for name in known.listing.folds if name.first > known.fold.generation or str(name) in leased]
        for name in held:
            await log.store.break_lease(str(name))
        return await open_index(log.store, log.machine_id, log.keys) if held else known

    # --- deciding ---

    async def _plan(self, known: LogIndex) -> FoldPlan | None:
        newest = await base_of(known, Latest())
        if newest is None:
            return None
        whole = [name for name in known.listing.checkpoints if name.first >= known.fold.floor_sequence]
        until_ns = aged_from(self._clock.now_ns(), newest.history) - self._policy.window_ns
        whole = [name for name in whole if name == known.fold.floor or await self._is_whole(known, name, until_ns)]
        pins = (await list_pins(self._log.store, self._log.machine_id)).values()
        return plan_fold(self._policy, self._clock.now_ns(), known.fold, whole, newest.history, pins)

    async def _is_whole(self, known: LogIndex, name: IndexName, until_ns: int) -> bool:
        """Whether a checkpoint is sound and the log can go on from it."""
        if name.last > until_ns:
            return False  # it can't be the floor yet
        try:
            found = await opened(known, name)
        except CorruptionError:
            return False
        return found is not None and found.start is not None and await known.stands(found.start)

    async def _decide(self, known: LogIndex, plan: FoldPlan) -> Fold:
        log = self._log
        author = await Author.of(log, self._clock, self._random)
        kept = []
        for item in plan.keep:
            await self._lock.beat()
            name = item.checkpoint
            if name is None:
                index = await index_at(log, known, item.place.sequence)
                name, _ = await write_checkpoint(author, index, None, self._lock.beat)
            kept.append({"checkpoint": str(name), "reason": item.reason})
        values = {"floor": str(plan.floor), "kept": kept, "folded_ns": self._clock.now_ns()}
        for text in (str(plan.floor), *(item["checkpoint"] for item in kept)):
            await self._check(text)
        now = await open_index(log.store, log.machine_id, log.keys)
        if now.fold.generation != known.fold.generation:
            raise self._fenced(now.fold.generation)
        generation = 1 + max((name.first for name in now.listing.folds), default=0)
        name = IndexName(log.machine_id, BlobKind.FOLD, generation, 0, _NO_TOKEN)
        await self._lock.beat()
        writer = BlobWriter(author, name)
        try:
            await writer.begin(FOLD_BYTES)
        except ConflictError as error:
            raise self._fenced(generation) from error
        lease_id = await log.store.acquire_lease(str(name))
        await writer.finish(values, lease_id=lease_id)
        with suppress(FencedError):  # it is finished: whoever took us for dead has let it go
            await log.store.release_lease(str(name), lease_id)
        root = await read_root(log.store, log.keys, name, FOLD_BYTES)
        if root is None:
            raise CorruptionError(f"the fold that was just written is not there: {name}", blob=str(name))
        return read_fold(root)

    def _fenced(self, generation: int) -> FencedError:
        return FencedError(
            f"somebody else made fold {generation} of the log of machine {self._log.machine_id}",
            hint="nothing to do; the next run goes on from it",
            generation=generation,
        )

    async def _check(self, text: str) -> None:
        """What a fold keeps must open: checkpoint and tiers."""
        log = self._log
        known = await open_index(log.store, log.machine_id, log.keys)
        found = next((name for name in known.listing.checkpoints if str(name) == text), None)
        checkpoint = await opened(known, found) if found is not None else None
        if checkpoint is None:
            raise CorruptionError(f"the checkpoint that is to be kept is not there: {text}", blob=text)
        await Index.on(log, checkpoint)

    # --- sweeping ---

    async def _sweep(self, known: LogIndex) -> Folded:
        log, fold = self._log, known.fold
        done = Folded(fold.generation, fold.floor_sequence, len(fold.kept))
        if fold.floor is None or self._clock.now_ns() - fold.folded_ns < self._grace_ns:
            return done
        blob = str(IndexName(log.machine_id, BlobKind.FOLD, fold.generation, 0, _NO_TOKEN))
        if (await log.store.properties(blob)).metadata.get(SWEPT):
            return done
        now_ns = self._clock.now_ns()
        pins = await list_pins(log.store, log.machine_id)
        holding = {name: pin for name, pin in pins.items() if pin.until_ns > now_ns}
        kept_sequences = {item.checkpoint.first for item in fold.kept}
        if any(pin.sequence < fold.floor_sequence and pin.sequence not in kept_sequences for pin in holding.values()):
            return replace(done, waiting_for_pins=True)  # made while the fold was decided; it is swept when they end
        live = Live()
        floor = await floor_of(log, known)
        await live.add(floor.index.state())
        for item in fold.kept:
            await self._lock.beat()
            kept = await opened(known, item.checkpoint)
            if kept is None:
                raise CorruptionError(f"a kept checkpoint is not there: {item.checkpoint}", blob=str(item.checkpoint))
            await live.add((await Index.on(log, kept)).state())
        blobs = await log.store.list(logblob.log_prefix(log.machine_id))
        written = await written_ranges(log.store, blobs, floor.start)
        sweep = plan_sweep(blobs, written, await live.ranges(log), floor.start)
        await self._free(sweep)
        removed = await self._tidy(known, holding)
        for name in pins.keys() - holding.keys():
            await log.store.delete(name)
        if not holding and not sweep.held_bytes:
            await log.store.set_metadata(blob, {SWEPT: "1"})
        freed = sum(length for _, _, length in sweep.clear)
        freed += sum(length for name in sweep.delete for _, length in written.get(name, []))
        return replace(
            done,
            swept=True,
            freed_bytes=freed,
            deleted_blobs=len(sweep.delete) + removed,
            held_bytes=sweep.held_bytes,
        )

    async def _free(self, sweep: Sweep) -> None:
        for blob, offset, length in sweep.clear:
            await self._lock.beat()
            await self._log.store.clear_pages(blob, offset, length)
        for blob in sweep.delete:
            await self._lock.beat()
            await self._log.store.delete(blob)

    async def _tidy(self, known: LogIndex, pins: dict[str, Pin]) -> int:
        """Remove index blobs that nothing needs: checkpoints given up, tiers that none names, what was not finished."""
        log, fold = self._log, known.fold
        held = {pin.checkpoint for pin in pins.values()}
        modified = {info.name: info.last_modified_ns for info in await log.store.list(_index_prefix(log))}
        old_ns = self._clock.now_ns() - ORPHAN_SECONDS * _NS
        gone = [name for name in known.listing.checkpoints if not fold.offers(name) and str(name) not in held]
        named: set[str] = set()
        for name in set(known.listing.checkpoints) - set(gone):
            try:
                found = await opened(known, name)
            except CorruptionError:
                return 0  # nobody knows which tiers it names
            if found is None and (modified.get(str(name)) or old_ns) < old_ns:
                gone.append(name)
            named |= {str(header.name) for header in found.tiers} if found is not None else set()
        loose = [name for name in known.listing.tiers if str(name) not in named]
        gone += [name for name in loose if (modified.get(str(name)) or old_ns) < old_ns]
        gone += [name for name in known.listing.folds if name.first < fold.generation]
        for blob in gone:
            await self._lock.beat()
            await log.store.delete(str(blob))
        return len(gone)


def _index_prefix(log: MachineLog) -> str:
    return f"machines/{log.machine_id}/index/"
