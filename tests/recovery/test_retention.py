"""Retention: what is planned to be kept, that no kept point loses a byte, and that folding may die at any instant."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from recovery.folding import ORPHAN_SECONDS
from recovery.history import History, NamedPoint, Place
from recovery.lock import STALE_SECONDS, FoldLock
from recovery.pins import LIFE_SECONDS, pin
from recovery.points import AtSequence, Instant, Named, locate
from recovery.retention import Policy, Rule, plan_fold
from recovery.view import View
from replicar.errors import CorruptionError, FencedError, PermanentError
from replicar.formats.indexblob import HEADER_BYTES, VERSION, BlobKind, IndexName, read_header
from replicar.formats.record import Consistency
from replicar.log.index import Fold, Kept, open_index
from replicar.storage import MemoryStore
from tests.recovery.faults import Stopped, StoppingStore
from tests.recovery.indexed import contents
from tests.recovery.log_builder import START_NS, LogBuilder
from tests.recovery.scene import MINUTE, NS, POLICY, Scene

# --- the plan ---


def _checkpoint(sequence: int, time_ns: int) -> IndexName:
    return IndexName(LogBuilder(MemoryStore()).machine_id, BlobKind.CHECKPOINT, sequence, time_ns, "00000000")


@given(st.lists(st.integers(0, 14_000), min_size=1, max_size=60, unique=True), st.integers(1, 6))
@settings(deadline=None)
def test_thinning_step_by_step_keeps_what_thinning_at_once_would(seconds: list[int], steps: int) -> None:
    """Points by the second, a checkpoint at each: however often it is folded on the way, the end is the same."""
    times = sorted(START_NS + second * NS for second in seconds)
    whole = [_checkpoint(sequence, time_ns) for sequence, time_ns in enumerate(times, 1)]
    history = History()
    history.marks = [
        NamedPoint(f"p{name.first}", list(Consistency)[name.first % 2], Place(name.first, name.last), in_gap=False)
        for name in whole
    ]
    end = times[-1] + 11 * MINUTE

    def folded(moments: list[int]) -> tuple[Fold, IndexName | None]:
        fold = Fold()
        for now in moments:
            there = [name for name in whole if name.last <= now and name.first >= fold.floor_sequence]
            plan = plan_fold(POLICY, now, fold, there, history)
            if plan is not None:
                kept = tuple(Kept(item.checkpoint, item.reason) for item in plan.keep if item.checkpoint is not None)
                fold = Fold(fold.generation + 1, plan.floor, kept)
        return fold, fold.floor

    at_once = folded([end])
    by_steps = folded([START_NS + (end - START_NS) * step // steps for step in range(1, steps + 1)])
    assert {item.checkpoint for item in at_once[0].kept} == {item.checkpoint for item in by_steps[0].kept}
    assert at_once[1] == by_steps[1]


def test_of_a_stretch_the_point_that_is_consistent_for_applications_is_kept() -> None:
    whole = [_checkpoint(sequence, START_NS + sequence * MINUTE) for sequence in range(1, 40)]
    history = History()
    for sequence, consistency in ((6, Consistency.APPLICATION), (8, Consistency.CRASH), (13, Consistency.CRASH)):
        place = Place(sequence, START_NS + sequence * MINUTE)
        history.marks.append(NamedPoint(f"m{sequence}", consistency, place, in_gap=False))
    plan = plan_fold(POLICY, START_NS + 41 * MINUTE, Fold(), whole, history)
    assert plan is not None
    by_stretch: dict[int, list[int]] = {}
    for item in plan.keep:
        by_stretch.setdefault(item.place.time_ns // (5 * MINUTE), []).append(item.place.sequence)
    assert all(len(items) == 1 for items in by_stretch.values())
    kept = {item.place.sequence for item in plan.keep}
    assert {6, 13} <= kept
    assert plan.floor.first == 31


def test_rules_that_would_miss_what_they_gave_up_are_refused() -> None:
    for rules in ((Rule(5 * MINUTE, MINUTE),), (Rule(60 * MINUTE, 7 * MINUTE), Rule(90 * MINUTE, 10 * MINUTE))):
        with pytest.raises(PermanentError, match="does not follow"):
            Policy(10 * MINUTE, rules)


def test_a_machine_that_is_silent_keeps_its_past_whatever_the_clock_says() -> None:
    whole = [_checkpoint(sequence, START_NS + sequence * MINUTE) for sequence in range(1, 40)]
    history = History()
    history.latest_ns = START_NS + 40 * MINUTE
    in_time = plan_fold(POLICY, history.latest_ns, Fold(), whole, history)
    years_later = plan_fold(POLICY, history.latest_ns + 10**18, Fold(), whole, history)
    assert in_time is not None
    assert years_later == in_time


# --- folding ---


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_folding_keeps_what_it_keeps_and_frees_the_rest(seed: int) -> None:
    scene = await Scene(seed).begin()
    before = await scene.written_bytes()
    first = await scene.fold()
    assert first.decided
    assert not first.swept
    assert await scene.written_bytes() == before, "nothing is freed before everybody can know"
    await scene.check()
    second = await scene.fold()
    assert second.swept
    assert second.freed_bytes > 0
    assert await scene.written_bytes() < before
    await scene.check()
    for _ in range(4):
        await scene.live(12)
        await scene.fold()
        await scene.check()
    names = [item.reason for item in (await scene.current()).kept if item.reason in scene.story.marks]
    for name in names[:3]:
        assert (await locate(scene.builder.log, Named(name))).place.sequence == scene.story.marks[name]


async def test_a_machine_that_is_folded_for_long_takes_no_more_and_more_room() -> None:
    scene = await Scene(8).begin(30)
    sizes = []
    for _ in range(12):
        await scene.live(15)
        await scene.fold()
        index = await scene.store.list(f"machines/{scene.builder.machine_id}/index/")
        sizes.append((await scene.written_bytes(), len(index)))
    assert max(size for size, _ in sizes[6:]) < 1.5 * max(size for size, _ in sizes[3:6])
    assert max(count for _, count in sizes) < 120
    await scene.check()


async def test_a_given_up_instant_and_a_name_are_refused_with_what_is_near() -> None:
    scene = await Scene(4).begin()
    for _ in range(2):
        await scene.fold()
    fold = await scene.current()
    kept = {item.checkpoint.first for item in fold.kept}
    lost = next(each for each in scene.story.offered if each < fold.floor_sequence and each not in kept)
    with pytest.raises(PermanentError, match="given up by retention") as refused:
        await locate(scene.builder.log, Instant(scene.builder.times[lost]))
    assert "--sequence" in refused.value.hint
    name = next((name for name, at in scene.story.marks.items() if at < fold.floor_sequence and at not in kept), None)
    if name is not None:
        with pytest.raises(PermanentError, match=r"no point named|given up"):
            await locate(scene.builder.log, Named(name))


async def test_a_pinned_state_stays_until_the_pin_ends() -> None:
    scene = await Scene(5).begin()
    plain = set(scene.story.offered) - set(scene.story.ends) - set(scene.story.marks.values())
    state = await locate(scene.builder.log, AtSequence(sorted(plain)[5]))  # nothing else would keep it
    held = await pin(scene.builder.log, state, clock=scene.clock, random=scene.bytes)
    view = View(scene.builder.log, state)
    for _ in range(3):
        await scene.fold()
        assert await contents(view) == scene.builder.expected[state.place.sequence]
        await held.renew()
    scene.clock.ns += (LIFE_SECONDS + 1) * NS
    for _ in range(2):
        await scene.fold()
    with pytest.raises(PermanentError, match="was given up by retention just now"):
        await pin(scene.builder.log, state, clock=scene.clock, random=scene.bytes)


async def test_a_pin_that_came_while_a_fold_was_decided_holds_up_the_sweep() -> None:
    scene = await Scene(6).begin()
    state = await locate(scene.builder.log, AtSequence(scene.story.offered[3]))
    await scene.fold()
    late = scene.bytes(8).hex()
    until = {"sequence": str(state.place.sequence), "until_ns": str(scene.clock.ns + LIFE_SECONDS * NS)}
    name = f"machines/{scene.builder.machine_id}/index/pins/{late}"
    await scene.store.create(name, 512, metadata={**until, "checkpoint": state.checkpoint})
    done = await scene.fold()
    assert done.waiting_for_pins
    assert not done.swept
    assert await contents(View(scene.builder.log, state)) == scene.builder.expected[state.place.sequence]
    with pytest.raises(PermanentError, match="was given up by retention just now"):
        await pin(scene.builder.log, state, clock=scene.clock, random=scene.bytes)
    scene.clock.ns += (LIFE_SECONDS + 1) * NS
    assert (await scene.fold()).swept


async def test_a_second_folder_goes_away_and_one_that_was_taken_over_stops() -> None:
    scene = await Scene(7).begin()
    first = FoldLock(scene.store, scene.builder.machine_id, scene.clock, scene.bytes)
    await first.take()
    with pytest.raises(FencedError, match="being folded by somebody else"):
        await scene.folder().run()
    scene.clock.ns += (STALE_SECONDS + 1) * NS
    assert (await scene.folder().run()).decided
    with pytest.raises(FencedError):
        await first.beat()


@pytest.mark.parametrize("in_force", [True, False])
async def test_a_folder_that_died_holding_its_finished_fold_is_in_nobodys_way(in_force: bool) -> None:
    scene = await Scene(8).begin()
    assert (await scene.folder().run()).decided
    fold = IndexName(scene.builder.machine_id, BlobKind.FOLD, (await scene.current()).generation, 0, "00000000")
    await scene.store.acquire_lease(str(fold))
    if in_force:
        scene.pause()
    await scene.live(10)  # then it is swept by its successor's first run, else removed in a later one
    assert (await scene.fold()).decided
    assert (await scene.fold()).swept
    assert fold not in (await open_index(scene.store, scene.builder.machine_id, {1: scene.builder.key})).listing.folds
    await scene.check()


async def test_a_fold_of_a_later_version_is_overruled_by_nobody() -> None:
    scene = await Scene(10).begin()
    await scene.fold()
    await scene.live(10)
    await scene.fold()
    generation = (await scene.current()).generation
    newest = IndexName(scene.builder.machine_id, BlobKind.FOLD, generation, 0, "00000000")
    header = read_header(await scene.store.read(str(newest), 0, HEADER_BYTES), newest)
    assert header is not None
    await scene.store.put_pages(str(newest), 0, replace(header, version=VERSION + 1).pack())
    before = await scene.store.list("")
    with pytest.raises(
        CorruptionError, match=f"is of version {VERSION + 1}, which is not known here; upgrade this part"
    ):
        await scene.folder().run()
    with pytest.raises(CorruptionError, match="not known here"):
        await locate(scene.builder.log, Named("any"))
    assert [info.name for info in await scene.store.list("")] == [info.name for info in before]


async def test_nothing_is_given_up_when_what_is_kept_does_not_open() -> None:
    scene = await Scene(9).begin()
    await scene.fold()
    before = await scene.written_bytes()
    fold = await scene.current()
    blob = str(fold.kept[0].checkpoint)
    page = bytearray(await scene.store.read(blob, 512, 512))
    page[40] ^= 1
    await scene.store.put_pages(blob, 512, bytes(page))
    with pytest.raises(CorruptionError):
        await scene.folder().run()
    assert await scene.written_bytes() == before


async def killed_at(seed: int, step: int, *, applied: bool) -> bool:
    """Fold a log that is due for sweeping and deciding, dead at operation `step`; whether it came so far."""
    scene = await Scene(seed).begin(24)
    await scene.fold()
    await scene.live(10)
    whole = scene.builder.store
    scene.builder.store = StoppingStore(whole, step, applied=applied)
    died = False
    try:
        await scene.folder().run()
    except Stopped:
        died = True
    scene.builder.store = whole
    await scene.check()  # with the dead one's work half done
    scene.clock.ns += (STALE_SECONDS + 1) * NS
    for _ in range(2):
        await scene.fold()
        scene.clock.ns += ORPHAN_SECONDS * NS
    await scene.live(4)
    before = await scene.current()
    await scene.fold()
    await scene.check()
    known = await open_index(scene.store, scene.builder.machine_id, {1: scene.builder.key})
    for name in known.listing.checkpoints:
        assert before.offers(name) or known.fold.offers(name), "what was given up is gone"
        assert await known.root(name) is not None, "what was never finished is gone"
    return died


@pytest.mark.parametrize("instant", range(15))
async def test_folding_killed_at_any_instant_ends_where_it_should_have(instant: int) -> None:
    picked = random.Random(instant)
    died = await killed_at(picked.randrange(1, 50), picked.randrange(5, 120), applied=bool(instant % 2))
    assert died or instant


@pytest.mark.soak
@pytest.mark.parametrize("instant", range(200))
async def test_folding_killed_at_200_instants_ends_where_it_should_have(instant: int) -> None:
    picked = random.Random(f"soak {instant}")
    await killed_at(picked.randrange(1, 1000), picked.randrange(0, 250), applied=bool(instant % 2))
