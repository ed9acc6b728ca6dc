"""One machine's life in this server: its log taken over, its cache taken up, its connection, its errors.

    OPENING   taking the log over; a connection waits for its WELCOME
    RUNNING   receiving, sealing, storing
    WAITING   storage is in the way: what comes is still received into the cache, the log is opened again in a while
    REFUSING  going on would harm (the log in storage lost what it had acknowledged): connections are refused, nothing
              is held that others may need, the log is looked at again in a while, in case somebody brings it back
    FENCED    somebody newer owns the stream: nothing more is written, ever, under this assignment

Every error stands in `error` until it is over, and goes to the agent where the agent has to know.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from process_server.admission import admit
from process_server.agent import Agent
from process_server.cache import CacheFile, SlotHeader
from process_server.commit import Committer
from process_server.health import Counters, MachineHealth, Tallies, error_data, rpo_seconds
from process_server.logwriter import Claim, LogLimits, LogWriter, Writer, lease_lost
from process_server.pipeline import CacheDamage, Pipeline, end_if_cancelled
from process_server.recovery import take_up
from process_server.sealer import DEFAULT_UPLOADS, SEALED_AHEAD, Sealer
from process_server.slots import Slots
from process_server.stream import LOST_LOG_HINT, Cutting, Slot, Stream
from replicar.clock import Clock
from replicar.errors import ConflictError, CorruptionError, FencedError, ReplicarError, TransientError
from replicar.formats.wire import Hello
from replicar.log.reader import Tail
from replicar.log.tail import Stored
from replicar.storage.store import PageBlobStore

#: Until the log is opened again: at first, and at most.
REOPEN_SECONDS: Final = 1.0
LONGEST_REOPEN_SECONDS: Final = 60.0
RELEASE_SECONDS: Final = 5.0  # what giving leases back may take


class MachineState(StrEnum):
    OPENING = "opening"
    RUNNING = "running"
    WAITING = "waiting"
    REFUSING = "refusing"
    FENCED = "fenced"


@dataclass(frozen=True, slots=True)
class Assignment:
    """A machine that this server serves. `stored` is what the config server knows; news of it change no assignment.

    `former_keys`: data keys by id that older segments were sealed by; they change with the writer's only.
    """

    name: str
    writer: Writer
    incarnation: int = 0
    stored: Stored = field(default=Stored(), compare=False)
    former_keys: Mapping[int, bytes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def machine_id(self) -> uuid.UUID:
        return self.writer.machine_id


@dataclass(frozen=True, slots=True)
class Tuning:
    """What the settings say about machines' streams; `weights` by name, 1 for whoever is not named."""

    segment_age_seconds: float = 0.2
    uploads: int = DEFAULT_UPLOADS
    log: LogLimits = field(default_factory=LogLimits)
    reopen_seconds: float = REOPEN_SECONDS
    weights: Mapping[str, int] = field(default_factory=dict)

    def cutting(self) -> Cutting:
        age = self.segment_age_seconds
        return Cutting(age_seconds=age, idle_age_seconds=age / 4, in_flight=self.uploads + SEALED_AHEAD)


@dataclass(frozen=True, slots=True)
class Workshop:
    """What all machines of this server share."""

    store: PageBlobStore
    cache: CacheFile
    slots: Slots
    committer: Committer
    sealer: Sealer
    clock: Clock
    tuning: Tuning
    tallies: Tallies = field(default_factory=Tallies)


class Machine:
    """See the module.

    Args:
        leftovers: this machine's slots from an earlier life.
        stored: what this server knew to be in storage in an earlier life; a log that ends before it, or before what the
            assignment says, has lost something.
    """

    def __init__(
        self,
        assignment: Assignment,
        workshop: Workshop,
        leftovers: list[tuple[int, SlotHeader]] | None = None,
        *,
        stored: Stored = Stored(),  # noqa: B008 - a value that nobody can change
    ) -> None:
        self.assignment = assignment
        self.workshop = workshop
        self.state = MachineState.OPENING
        self.error: ReplicarError | None = None
        self.counters = Counters()
        self.stream: Stream | None = None
        self._agent: Agent | None = None
        self._hello: Hello | None = None  # of an agent that waits for its WELCOME
        self._pipeline: Pipeline | None = None
        self._log: LogWriter | None = None
        self._claim = Claim(assignment.writer.epoch)
        self._leftovers = leftovers or []
        self._damage: CacheDamage | None = None
        self._stored = _further(stored, assignment.stored)

    # --- the agent's side ---

    def attach(self, agent: Agent, hello: Hello) -> None:
        """A connection of this machine said HELLO; an older one has to go."""
        if self._agent is not None:
            older, self._agent = self._agent, None
            older.refuse(
                TransientError(f"a newer connection of machine {self.assignment.name} takes over from this one")
            )
        self.counters.connections += 1
        self._agent, self._hello = agent, hello
        if self.state in (MachineState.FENCED, MachineState.REFUSING):
            assert self.error is not None
            self._refuse(self.error)
        elif self.stream is not None and self._damage is None:  # else what is wanted next is about to go back
            self._welcome(self.stream)

    def detach(self, agent: Agent) -> None:
        """A connection is gone."""
        if self._agent is agent:
            self._agent = self._hello = None

    def waiting_error(self) -> ReplicarError:
        """What to tell an agent that has waited long enough for its WELCOME."""
        if self.error is not None:
            return self.error
        return TransientError(f"the log of machine {self.assignment.name} is still being opened", hint="it tries again")

    def received(self, *, news: bool) -> None:
        """Frames were appended to the stream; with `news`, the pipeline may have something to do."""
        assert self.stream is not None
        self.workshop.committer.mark(self.stream, self._progress)
        if news and self._pipeline is not None:
            self._pipeline.wake()

    # --- the config server's side ---

    def learn(self, stored: Stored) -> bool:
        """What the config server knows to be stored, for the next time the log is opened.

        False when the log was opened already and ends before that: then it lost something, and must be opened again.
        """
        self._stored = _further(self._stored, stored)
        return self._pipeline is None or self._pipeline.tail.number >= stored.number

    def reassign(self, assignment: Assignment) -> None:
        """Go on under this assignment. Of an earlier incarnation nothing has to be in storage any more."""
        if assignment.incarnation != self.assignment.incarnation:
            self._stored = assignment.stored
        self.assignment = assignment

    # --- life ---

    async def run(self) -> None:
        """Serve the machine until cancelled, or for good when it is fenced."""
        pause = self.workshop.tuning.reopen_seconds
        try:
            while True:
                began = self.workshop.clock.monotonic()
                try:
                    await self._serve()
                except FencedError as error:
                    self.counters.leases_lost += 1
                    self.state, self.error = MachineState.WAITING, lease_lost(error)
                    if self.error is error:
                        self._stop(error)
                        return
                except CacheDamage as damage:
                    self._damage = damage
                    self._refuse(TransientError(f"{damage.error.message}; send it again"))
                except (ConflictError, CorruptionError) as error:
                    self.state, self.error = MachineState.REFUSING, error
                    self._refuse(error)
                    self._let_go()
                except ReplicarError as error:
                    self.state, self.error = MachineState.WAITING, error
                end_if_cancelled()
                if self.workshop.clock.monotonic() - began > LONGEST_REOPEN_SECONDS:
                    pause = self.workshop.tuning.reopen_seconds  # it went well for a while
                await self.workshop.clock.sleep(pause)
                pause = min(2 * pause, LONGEST_REOPEN_SECONDS)
        finally:
            self._refuse(
                TransientError(
                    f"this process server stops serving machine {self.assignment.name}",
                    hint="the agent tries again by itself, here or where the config server sends it",
                )
            )
            self._let_go()

    async def drain(self) -> None:
        """Store everything that was received; returns when that is done (the caller bounds it)."""
        while self.stream is not None and self.state is not MachineState.FENCED:
            self.stream.flush()
            if self._pipeline is not None:
                self._pipeline.wake()
            if not self.stream.pending_bytes:
                break
            await self.workshop.clock.sleep(0.02)

    async def close(self) -> None:
        """After `run` has ended: give the log's leases back."""
        log, self._log = self._log, None
        if log is not None:
            with suppress(TimeoutError):  # the next writer breaks what is not given back
                async with asyncio.timeout(RELEASE_SECONDS):
                    await log.close()

    def health(self) -> MachineHealth:
        stream, known = self.stream, self._known()
        sealing, uploading = self._pipeline.under_way if self._pipeline is not None else (0, 0)
        return MachineHealth(
            machine_id=self.assignment.machine_id,
            name=self.assignment.name,
            state=str(self.state),
            epoch=self.assignment.writer.epoch,
            incarnation=self.assignment.incarnation,
            connected=self._agent is not None,
            received_sequence=stream.received_sequence if stream is not None else known.sequence,
            stored_sequence=stream.stored_sequence if stream is not None else known.sequence,
            stored_segment=known.number,
            stored_digest=known.digest.hex(),
            pending_bytes=stream.pending_bytes if stream is not None else 0,
            sealing_bytes=sealing,
            uploading_bytes=uploading,
            rpo_seconds=rpo_seconds(stream.oldest_ns, self.workshop.clock.now_ns()) if stream is not None else None,
            counters=self.counters,
            error=error_data(self.error),
        )

    async def _serve(self) -> None:
        shop, writer = self.workshop, self.assignment.writer
        log = await LogWriter.open(
            shop.store,
            writer,
            shop.tuning.log,
            shop.clock,
            keys={**self.assignment.former_keys, writer.key_id: writer.data_key},
            stored=self._known(),
            accept=self._accept,
            claim=self._claim,
        )
        self._log = log
        if self.stream is None:
            self.stream = await self._first_stream(log.tail.sequence)
        else:
            shop.slots.settle(self.stream, self.stream.restart(log.tail.sequence))
        if self._damage is not None:
            damage, self._damage = self._damage, None
            shop.slots.settle(self.stream, self.stream.truncate(damage.damaged))
        self._pipeline = Pipeline(
            self.stream,
            log,
            writer,
            sealer=shop.sealer,
            slots=shop.slots,
            cache=shop.cache,
            clock=shop.clock,
            counters=self.counters,
            tallies=shop.tallies,
            uploads=shop.tuning.uploads,
            on_stored=self._progress,
            on_error=self._upload_error,
        )
        self.state, self.error = MachineState.RUNNING, None
        if self._agent is not None and self._hello is not None:
            self._welcome(self.stream)
        await self._pipeline.run()

    def _accept(self, tail: Tail) -> None:
        """Whether the log can end here.

        Raises:
            ConflictError: more than this was once acknowledged.
        """
        if self.stream is not None:
            self.stream.check_log(tail.sequence)
        known = self._known()
        if tail.number < known.number:
            raise ConflictError(
                f"the log of machine {self.assignment.name} in storage ends at segment {tail.number}, but segment "
                f"{known.number} was stored",
                hint=LOST_LOG_HINT,
                ours=known.number,
                theirs=tail.number,
                machine_id=str(self.assignment.machine_id),
            )

    async def _first_stream(self, stored_sequence: int) -> Stream:
        """A stream that goes on where storage and what the cache still has end."""
        shop, machine_id = self.workshop, self.assignment.machine_id
        leftovers = self._leftovers
        found = await shop.sealer.run(take_up, shop.cache, leftovers, machine_id, stored_sequence)
        self._leftovers = []
        weight = shop.tuning.weights.get(self.assignment.name, 1)
        stream = Stream(machine_id, stored_sequence, shop.tuning.cutting(), weight=weight)
        now = shop.clock.monotonic()
        for each in found:
            slot = Slot(each.index, each.header.serial, each.header.first_sequence, None)
            stream.adopt(slot, each.headers, each.start, now)
        used = {each.index for each in found}
        for index, _ in leftovers:
            if index not in used:
                shop.slots.release_index(index)
        return stream

    def _welcome(self, stream: Stream) -> None:
        agent, hello, self._hello = self._agent, self._hello, None
        assert agent is not None
        assert hello is not None
        try:
            agent.welcome(admit(hello, stream.next_sequence, stream.stored_sequence))
        except ReplicarError as error:
            self.error = error
            self._refuse(error)
        else:
            if self.state is MachineState.RUNNING:
                self.error = None

    def _refuse(self, error: ReplicarError) -> None:
        agent, self._agent, self._hello = self._agent, None, None
        if agent is not None:
            agent.refuse(error)

    def _progress(self) -> None:
        if self._agent is not None:
            self._agent.progress()

    def _upload_error(self, error: ReplicarError | None) -> None:
        if isinstance(self.error, ConflictError) and error is None:
            return  # what the agent was refused for still stands
        self.error = error

    def _stop(self, error: FencedError) -> None:
        """Nothing of this stream may be written any more, nor need it be kept: the newer writer's agent has it."""
        self.state, self.error = MachineState.FENCED, error
        self._refuse(error)
        self._let_go()

    def _known(self) -> Stored:
        """The furthest that is known to be stored, whoever said so."""
        if self._pipeline is None or not self._pipeline.tail.number:
            return self._stored
        tail = self._pipeline.tail
        return _further(self._stored, Stored(tail.number, tail.sequence, tail.digest))

    def _let_go(self) -> None:
        """Give slots and buffers back; what was not stored is the agent's to send again."""
        self._stored = self._known()
        stream, self.stream, self._pipeline, self._damage = self.stream, None, None, None
        if stream is not None:
            self.workshop.slots.settle(stream, stream.abandon())
            self.workshop.slots.forget(stream)
        for index, _ in self._leftovers:
            self.workshop.slots.release_index(index)
        self._leftovers = []


def _further(one: Stored, other: Stored) -> Stored:
    return max(one, other, key=lambda stored: (stored.number, stored.digest))


MachineFinder = Callable[[uuid.UUID], Machine | None]  # by the id in its certificate
