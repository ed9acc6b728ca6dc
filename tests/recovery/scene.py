"""A machine with a long past, whose log is indexed and folded under a clock that is moved by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, Final

import pytest

from process_server.logwriter import LogLimits
from recovery.folding import GRACE_SECONDS, Folded, Folder
from recovery.indexing import make_index
from recovery.points import AtSequence, Latest, locate
from recovery.retention import Policy, Rule
from recovery.verify import verify
from recovery.view import View
from replicar.errors import PermanentError
from replicar.log.index import Fold, open_index
from replicar.log.reader import LogReader
from replicar.log.tail import Stored, sound_tail
from replicar.storage import MemoryStore, PageBlobStore
from tests.recovery.indexed import Story, contents
from tests.recovery.log_builder import START_NS, LogBuilder

NS: Final = 1_000_000_000
MINUTE: Final = 60 * NS
#: Ten minutes whole, then one point of every five up to an hour, then of every fifteen up to three.
POLICY: Final = Policy(10 * MINUTE, (Rule(60 * MINUTE, 5 * MINUTE), Rule(180 * MINUTE, 15 * MINUTE)))


class HandClock:
    """A clock that is moved by hand."""

    def __init__(self, now_ns: int = START_NS) -> None:
        self.ns = now_ns

    def now_ns(self) -> int:
        return self.ns

    def monotonic(self) -> float:
        return self.ns / NS

    async def sleep(self, seconds: float) -> None:
        self.ns += int(seconds * NS)


class Scene:
    """A machine with a long past whose log is indexed and folded under a clock that is moved by hand."""

    def __init__(
        self,
        seed: int,
        *,
        store: PageBlobStore | None = None,
        begin_ns: int = START_NS,
        limits: LogLimits | None = None,
    ) -> None:
        self.clock = HandClock(begin_ns)
        self.store = store or MemoryStore(clock=self.clock)
        self.seed = seed
        self._limits = limits
        self.story: Story

    async def begin(self, segments: int = 40) -> Scene:
        await self.store.ensure_container()
        self.story = Story(self.store, self.seed, tick_ns=2 * MINUTE, limits=self._limits)
        await self.live(segments)
        return self

    @property
    def builder(self) -> LogBuilder:
        return self.story.builder

    async def live(self, segments: int, *, every: int = 2) -> None:
        """Time goes on, and the index with it."""
        await self.go_on(segments)
        stored = Stored(self.builder.number - 1, self.builder.sequence - 1, self.builder.previous)
        await make_index(self.builder.log, clock=self.clock, random=self.bytes, stored=stored, every=every)

    async def go_on(self, segments: int) -> None:
        """Time goes on, and nobody indexes."""
        self.builder.time_ns = max(self.builder.time_ns, self.clock.ns)
        await self.story.go_on(segments)
        await self.story.end_gap()
        self.clock.ns = self.builder.time_ns

    def bytes(self, count: int) -> bytes:
        self.seed += 1
        return random.Random(self.seed).randbytes(count)

    def folder(self, store: Any = None) -> Folder:
        log = self.builder.log if store is None else replace(self.builder.log, store=store)
        return Folder(log, POLICY, clock=self.clock, random=self.bytes)

    def pause(self) -> None:
        """Until the next run may sweep what the last one gave up."""
        self.clock.ns += GRACE_SECONDS * NS

    async def fold(self) -> Folded:
        """One run; the next one may sweep what this one gives up."""
        done = await self.folder().run()
        self.pause()
        return done

    async def current(self) -> Fold:
        return (await open_index(self.store, self.builder.machine_id, {1: self.builder.key})).fold

    async def written_bytes(self) -> int:
        blobs = await self.store.list(f"machines/{self.builder.machine_id}/log/")
        return sum([length for blob in blobs for _, length in await self.store.page_ranges(blob.name)])

    async def check(self, store: PageBlobStore | None = None) -> None:
        """Every point that is offered gives the bytes that the machine had; all else is refused, with what there is."""
        store, builder = store or self.store, self.builder
        log = replace(builder.log, store=store)
        fold = (await open_index(store, builder.machine_id, log.keys)).fold
        kept = {item.checkpoint.first for item in fold.kept}
        for sequence in {*kept, *[each for each in self.story.offered if each >= fold.floor_sequence][::3]}:
            state = await locate(log, AtSequence(sequence))
            assert await contents(View(log, state)) == builder.expected[sequence], sequence
        latest = await locate(log, Latest(), stored_number=builder.number - 1, stored_digest=builder.previous)
        assert latest.place.sequence == self.story.offered[-1]
        given_up = [each for each in self.story.offered if each < fold.floor_sequence and each not in kept]
        for sequence in given_up[:: max(len(given_up) // 5, 1)]:
            with pytest.raises(PermanentError, match=r"given up by retention|lies in a gap") as refused:
                await locate(log, AtSequence(sequence))
            assert "any instant from" in refused.value.hint
        report = await verify(log, stored_number=builder.number - 1, stored_digest=builder.previous)
        assert report.problems == []
        tail = await sound_tail(LogReader(store, builder.machine_id, log.keys), Stored())
        assert (tail.number, tail.digest) == (builder.number - 1, builder.previous)


async def copied(source: PageBlobStore, target: PageBlobStore) -> None:
    """Bring every blob of a container into an empty one: bytes and metadata, without leases."""
    await target.ensure_container()
    for info in await source.list(""):
        await target.create(info.name, info.size_bytes, metadata=dict(info.metadata))
        for offset, length in await source.page_ranges(info.name):
            await target.put_pages(info.name, offset, await source.read(info.name, offset, length))
