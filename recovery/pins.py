"""Pins: somebody reads from a state that retention might give up, and says so.

A pin is a small blob beside the index whose metadata say which state, and until when. It is made *before* its owner
looks whether the state is still offered; a fold takes effect long after it was written, and looks at the pins then. So
one of the two sees the other: either the owner is told that the state was given up, or its bytes stay until the pin
ends. Whoever reads for longer makes it again (`renew`) in time; whoever dies needs to do nothing.

Weak: hosts whose clocks differ by more than LIFE_SECONDS may let a pin end early.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from recovery.chunks import MachineLog
from recovery.history import Place
from recovery.index import State
from recovery.retention import Pin
from replicar.clock import Clock
from replicar.errors import PermanentError, ReplicarError
from replicar.formats import indexblob
from replicar.log.index import open_index
from replicar.storage.store import PAGE_BYTES, PageBlobStore

#: How long a pin holds; renewed every third of it.
LIFE_SECONDS: Final = 3600
_NS: Final = 1_000_000_000


def pin_prefix(machine_id: uuid.UUID) -> str:
    return f"{indexblob.index_prefix(machine_id)}pins/"


@dataclass(frozen=True, slots=True)
class Pinned:
    """A pin that is ours."""

    log: MachineLog
    name: str
    place: Place
    checkpoint: str
    clock: Clock

    async def renew(self) -> None:
        """Let it hold for LIFE_SECONDS from now on."""
        await self.log.store.set_metadata(self.name, _metadata(self.place, self.checkpoint, self.clock))

    async def release(self) -> None:
        await self.log.store.delete(self.name)


async def pin(log: MachineLog, state: State, *, clock: Clock, random: Callable[[int], bytes]) -> Pinned:
    """Pin a state that `locate` gave.

    Raises:
        PermanentError: it was given up meanwhile.
    """
    name = f"{pin_prefix(log.machine_id)}{random(8).hex()}"
    await log.store.create(name, PAGE_BYTES, metadata=_metadata(state.place, state.checkpoint, clock))
    made = Pinned(log, name, state.place, state.checkpoint, clock)
    fold = (await open_index(log.store, log.machine_id, log.keys)).fold
    kept = {item.checkpoint.first for item in fold.kept}
    if state.place.sequence < fold.floor_sequence and state.place.sequence not in kept:
        await made.release()
        raise PermanentError(
            f"the state at sequence {state.place.sequence} was given up by retention just now",
            hint="choose a point that is kept; `replicar storage MACHINE` lists them",
            sequence=state.place.sequence,
        )
    return made


@asynccontextmanager
async def holding(
    log: MachineLog, state: State, *, clock: Clock, random: Callable[[int], bytes]
) -> AsyncIterator[None]:
    """Hold a pin on a state for as long as the block lasts.

    Whoever may only read the container reads without: retention may then give the state up, which is met as a
    CorruptionError that says so, and costs nobody a byte.

    Raises:
        PermanentError: the state was given up meanwhile.
    """
    try:
        held = await pin(log, state, clock=clock, random=random)
    except PermanentError as error:
        if "sequence" in error.fields:
            raise
        yield
        return

    async def renew() -> None:
        while True:
            await clock.sleep(LIFE_SECONDS / 3)
            with suppress(ReplicarError):  # it may pass, whatever it is: two more are due before the pin ends
                await held.renew()

    renewing = asyncio.create_task(renew())
    try:
        yield
    finally:
        renewing.cancel()
        with suppress(asyncio.CancelledError, ReplicarError):
            await renewing
        with suppress(ReplicarError):  # it ends by itself
            await held.release()


async def list_pins(store: PageBlobStore, machine_id: uuid.UUID) -> dict[str, Pin]:
    """All pins by their blobs' names; what can't be read as one holds nothing."""
    found = {}
    for info in await store.list(pin_prefix(machine_id)):
        pinned = _read(info.metadata)
        if pinned is not None:
            found[info.name] = pinned
    return found


async def pinned_sequences(log: MachineLog, clock: Clock) -> frozenset[int]:
    """The sequences of the states that are pinned now; points of a replica that have one of them are held with it."""
    now_ns = clock.now_ns()
    return frozenset(
        each.sequence for each in (await list_pins(log.store, log.machine_id)).values() if each.until_ns > now_ns
    )


def _metadata(place: Place, checkpoint: str, clock: Clock) -> dict[str, str]:
    until_ns = clock.now_ns() + LIFE_SECONDS * _NS
    named = {"checkpoint": checkpoint} if checkpoint else {}  # the service takes no empty value
    return {"sequence": str(place.sequence), "until_ns": str(until_ns), **named}


def _read(metadata: Mapping[str, str]) -> Pin | None:
    try:
        return Pin(int(metadata["sequence"]), int(metadata["until_ns"]), metadata.get("checkpoint", ""))
    except (KeyError, ValueError):
        return None
