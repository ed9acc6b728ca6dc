"""Marks: named recovery points, made once for each command that asks for one.

A command comes until it is answered, and it comes again after a restart, but a second mark of one command would be two
points of one name. So a mark is made in four steps, each durable before the next:

    intent   id and name, and how far the stream was        marks.json
    record   the MARK in the stream                         change log
    sync     the change log
    made     its sequence and time                          marks.json; from here on it is reported

A process that dies before "made" finds an intent when it starts again, and looks for its mark in the change log from
where the stream was. It is there, or it was never made. Only if that part of the log is gone too (stored and trimmed
within the few milliseconds before the death) can nobody tell; then the command is refused rather than done twice.

Where the stream has order at points only (trace capture), `at_point` brings it to one and has the mark appended there.
A point that can't be had now refuses the command. The intent is written when the point is there, so that nothing is
remembered of the many ways not to get there.

A mark inside a gap is recorded, since the stream should show that somebody asked, but reported as not offered.

Marks by the clock (`schedule`) are commands that the agent gives itself. They are reported without a command, and of
those only the last `MAX_SCHEDULED` are remembered, so that they don't drive out the marks that somebody asked for.

An application-consistent mark is made while the operator's hooks hold the applications still (`hooks`), and says how
long that took; if they can't be held, the command is refused: claiming it would be a lie.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from mobility_agent.changelog import ChangeLog
from mobility_agent.hooks import Hooks
from mobility_agent.records import Record
from replicar.control import files
from replicar.control.messages import Command, CommandRefusal, MarkReport
from replicar.errors import CorruptionError, LimitError, PermanentError, ReplicarError, TransientError
from replicar.formats import record
from replicar.formats.frame import Kind
from replicar.formats.record import Consistency

COMMAND_KIND: Final = "mark"
#: What the ids of marks by the clock begin with; no id of a command does.
SCHEDULED: Final = "schedule:"
#: Marks remembered, by command and by name.
MAX_MARKS: Final = 1000
#: Of which by the clock; at one every five minutes, two days.
MAX_SCHEDULED: Final = 576
#: 1,000 names of 255 characters fit, whatever the characters.
MAX_FILE_BYTES: Final = 4 << 20
MAX_REFUSALS: Final = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MadeMark:
    """A mark, or the intent to make one (`sequence` 0). `floor` is the stream's next sequence when it was intended."""

    mark_id: str
    name: str
    consistency: str
    floor: int
    sequence: int = 0
    time_ns: int = 0
    in_gap: bool = False
    pause_seconds: float | None = None

    @property
    def is_scheduled(self) -> bool:
        """Whether the clock asked for it, and nobody else."""
        return self.mark_id.startswith(SCHEDULED)


class Marks:
    """The marks of one machine. Call `recover` once before the first `carry_out`.

    Args:
        log: the stream they go into.
        path: where they are remembered.
        in_gap: whether a mark made now would lie in a gap.
        hooks: hold applications still; None where there are none.

    Raises:
        CorruptionError: the file can't be read; going on without it could make a point twice.
    """

    def __init__(self, log: ChangeLog, path: Path, in_gap: Callable[[], bool], *, hooks: Hooks | None = None) -> None:
        self._hooks = hooks
        self._log = log
        self._path = path
        self._in_gap = in_gap
        #: Calls what it is given once the stream is at a point; None: every place is one.
        self.at_point: Callable[[Callable[[], None]], Awaitable[None]] | None = None
        self._making = asyncio.Lock()
        self._marks: dict[str, MadeMark] = {mark.mark_id: mark for mark in _load(path)}
        self._unreported = {mark.mark_id: mark for mark in self._marks.values() if mark.sequence}
        self._refusals: dict[str, CommandRefusal] = {}
        self._appended: dict[str, MadeMark] = {}  # in the stream, but neither synced nor saved yet

    @property
    def count(self) -> int:
        return sum(1 for mark in self._marks.values() if mark.sequence)

    @property
    def latest(self) -> MadeMark | None:
        """The last mark that was made."""
        return next((mark for mark in reversed(self._marks.values()) if mark.sequence), None)

    def application_facts(self) -> dict[str, Any] | None:
        """For the status: how long applications were held for the last points, and what is wrong with letting them go;
        None without hooks."""
        if self._hooks is None:
            return None
        pauses = [mark.pause_seconds for mark in self._marks.values() if mark.pause_seconds is not None]
        return {
            "last_pause_seconds": pauses[-1] if pauses else None,
            "longest_pause_seconds": max(pauses, default=None),
            "trouble": self._hooks.trouble,
        }

    # --- after a restart ---

    @property
    def search_from(self) -> int | None:
        """From which sequence `recover` needs the log's records; None when no mark was under way."""
        return min((mark.floor for mark in self._marks.values() if not mark.sequence), default=None)

    def recover(self, held: Iterable[Record], is_in_gap: Callable[[int], bool]) -> None:
        """Settle what a killed process had begun.

        Args:
            held: the log's records from `search_from` on.
            is_in_gap: whether a sequence lies in a gap.
        """
        intents = [mark for mark in self._marks.values() if not mark.sequence]
        found = {item.item.mark_id: item for item in held if isinstance(item.item, record.Mark)}
        for intent in intents:
            place = found.get(intent.mark_id)
            if place is not None:
                in_gap = is_in_gap(place.sequence)
                self._remember(replace(intent, sequence=place.sequence, time_ns=place.time_ns, in_gap=in_gap))
            elif self._log.first_sequence <= intent.floor:
                del self._marks[intent.mark_id]  # never made: the command will come again
            else:
                del self._marks[intent.mark_id]
                self._refuse(
                    intent.mark_id,
                    PermanentError(
                        f"the agent died while it made the mark {intent.name!r}, and its change log can't tell any more"
                        " whether it was made",
                        hint="look for the point with `replicar points`; ask for another one under a new name",
                    ),
                )
        if intents:
            self._save_now()

    # --- commands ---

    async def carry_out(self, command: Command) -> None:
        """Make the mark, unless it is made; a command that can't be done is refused, in `refusals`.

        Raises:
            LimitError: the change log is full; the command will come again.
            PermanentError: marks.json can't be written; nothing was put into the stream.
        """
        if command.kind != COMMAND_KIND:
            return  # a newer config server's; it sees that nothing comes of it
        async with self._making:
            known = self._marks.get(command.id)
            if known is not None and known.sequence:
                self._unreported[known.mark_id] = known  # asked again: the answer was lost
                return
            try:
                item = self._wanted(command)
            except ReplicarError as error:
                self._refuse(command.id, error)
                return
            try:
                self._remember(await self._make(item))
            except TransientError as error:
                self._refuse(command.id, error)

    # --- group points: the mark is prepared, then, at the instant that counts, put into the stream ---

    async def prepare(self, command: Command) -> None:
        """Have everything ready for a group's mark, so that nothing but the record is left to do.

        Raises:
            PermanentError, LimitError: it can't be made.
        """
        async with self._making:
            await self._save(self._intent(self._wanted(command)))

    def append_prepared(self, command: Command, *, pause_seconds: float) -> MadeMark:
        """Put the mark into the stream. `settle` it next.

        Raises:
            LimitError: the change log is full.
        """
        item = self._wanted(command)
        made = replace(self._record(item, self._intent(item)), pause_seconds=pause_seconds)
        self._appended[item.mark_id] = made
        return made

    async def settle(self, made: MadeMark) -> None:
        """Make an appended mark durable, and report it."""
        async with self._making:
            await self._log.sync()
            await self._save(made)
            self._appended.pop(made.mark_id, None)
            self._remember(made)

    def forget_prepared(self, command: Command) -> None:
        """There will be no such mark."""
        if command.id not in self._appended:
            self._marks.pop(command.id, None)

    async def _make(self, item: record.Mark) -> MadeMark:
        made = self._appended.get(item.mark_id)
        if made is None:
            made = await self._append_held(item)
        # Should a step from here on fail, the next try goes on with the record that is in the stream.
        await self._log.sync()
        await self._save(made)
        del self._appended[made.mark_id]
        where = " inside a gap" if made.in_gap else ""
        pause = "" if made.pause_seconds is None else f", applications held for {made.pause_seconds:.3f} s"
        _log.info("mark %r made at sequence %d%s%s", made.name, made.sequence, where, pause)
        return made

    async def _append_held(self, item: record.Mark) -> MadeMark:
        if item.consistency is not Consistency.APPLICATION:
            return await self._append(item)
        assert self._hooks is not None, "`_wanted` refuses it without"
        async with self._hooks.held(item.name) as held:
            made = await self._append(item)
        made = self._appended[item.mark_id] = replace(made, pause_seconds=round(held.pause_seconds, 4))
        return made

    async def _append(self, item: record.Mark) -> MadeMark:
        if self.at_point is None:
            intent = self._intent(item)
            await self._save(intent)
            return self._record(item, intent)

        def append() -> None:
            intent = self._intent(item)
            files.write_file(self._path, self._with(intent), mode=files.PUBLIC_MODE)  # nothing may come in between
            self._record(item, intent)

        await self.at_point(append)
        return self._appended[item.mark_id]

    def _intent(self, item: record.Mark) -> MadeMark:
        return MadeMark(item.mark_id, item.name, item.consistency, self._log.next_sequence)

    def _record(self, item: record.Mark, intent: MadeMark) -> MadeMark:
        # Nothing runs between the question and the record, so the answer is true of the mark's place.
        in_gap = self._in_gap()
        sequence = self._log.append_record(Kind.MARK, item)
        self._marks[intent.mark_id] = intent  # kept in the file, whatever other marks are saved meanwhile
        made = replace(intent, sequence=sequence, time_ns=self._log.last_time_ns, in_gap=in_gap)
        self._appended[intent.mark_id] = made
        return made

    def _wanted(self, command: Command) -> record.Mark:
        """Raises:
        PermanentError, LimitError: it can't be done as it is asked for.
        """
        if any(mark.name == command.name and mark.mark_id != command.id for mark in self._marks.values()):
            raise PermanentError(
                f"this machine has a recovery point named {command.name!r} already",
                hint="choose another name; `replicar points` lists those there are",
            )
        if command.consistency is Consistency.APPLICATION:
            if self._hooks is None:
                raise PermanentError(
                    "this agent has no hooks to hold applications still, so it makes no application-consistent points",
                    hint="ask for a crash-consistent one, or set [application] hooks in the agent's settings",
                )
            self._hooks.programs()
        item = record.Mark(command.name, command.consistency, command.id)
        record.pack_record(item)  # before anything is remembered of it
        return item

    # --- what the config server is told ---

    def reports(self) -> tuple[MarkReport, ...]:
        """Marks that it has not acknowledged, oldest first."""
        return tuple(
            MarkReport(
                name=mark.name,
                kind=Consistency(mark.consistency),
                sequence=mark.sequence,
                time_ns=mark.time_ns,
                command_id=None if mark.is_scheduled else mark.mark_id,
                in_gap=mark.in_gap,
                pause_seconds=mark.pause_seconds,
            )
            for mark in self._unreported.values()
        )

    def refusals(self) -> tuple[CommandRefusal, ...]:
        """Commands that were refused and that it has not acknowledged."""
        return tuple(self._refusals.values())

    def acknowledged(self, reports: tuple[MarkReport, ...], refusals: tuple[CommandRefusal, ...] = ()) -> None:
        """A heartbeat with these was answered."""
        for report in reports:
            self._unreported.pop(report.command_id or f"{SCHEDULED}{report.name}", None)
        for refusal in refusals:
            self._refusals.pop(refusal.command_id, None)

    # --- inside ---

    def _refuse(self, command_id: str, error: ReplicarError) -> None:
        if command_id not in self._refusals:
            _log.warning("command %s is refused: %s", command_id, error)
        if command_id.startswith(SCHEDULED):
            return  # nobody asked for it, so nobody is waiting for an answer
        self._refusals[command_id] = CommandRefusal(
            command_id=command_id, error=type(error).__name__, message=error.message[:512], hint=error.hint[:512]
        )
        while len(self._refusals) > MAX_REFUSALS:
            del self._refusals[next(iter(self._refusals))]

    def _remember(self, made: MadeMark) -> None:
        self._marks[made.mark_id] = made
        self._unreported[made.mark_id] = made
        scheduled = [mark_id for mark_id, mark in self._marks.items() if mark.is_scheduled]
        for mark_id in scheduled[: max(len(scheduled) - MAX_SCHEDULED, 0)]:
            self._forget(mark_id)
        while len(self._marks) > MAX_MARKS:
            self._forget(next(iter(self._marks)))

    def _forget(self, mark_id: str) -> None:
        del self._marks[mark_id]
        self._unreported.pop(mark_id, None)

    async def _save(self, mark: MadeMark) -> None:
        """Make durable what is remembered, with `mark` as it is to be."""
        await asyncio.to_thread(files.write_file, self._path, self._with(mark), mode=files.PUBLIC_MODE)

    def _with(self, mark: MadeMark) -> bytes:
        return _pack({**self._marks, mark.mark_id: mark})

    def _save_now(self) -> None:
        files.write_file(self._path, _pack(self._marks), mode=files.PUBLIC_MODE)


def _pack(marks: dict[str, MadeMark]) -> bytes:
    kept = list(marks.values())[-MAX_MARKS:]
    return json.dumps({"marks": [asdict(mark) for mark in kept]}, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _load(path: Path) -> list[MadeMark]:
    """Raises:
    CorruptionError: see `Marks`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PermanentError(f"can't read the marks in {path}: {error.strerror}", path=str(path)) from None
    try:
        if len(data) > MAX_FILE_BYTES:
            raise LimitError(f"{path} is too long to be the agent's marks")
        fields: dict[str, Any] = json.loads(data.decode("utf-8", "surrogatepass"))
        return [_mark(entry) for entry in fields["marks"]]
    except (ReplicarError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptionError(
            f"the agent's memory of its marks in {path} is damaged: {type(error).__name__}",
            hint="remove it if no recovery point was asked for lately; one asked for just now might be made twice",
            path=str(path),
        ) from None


def _mark(entry: dict[str, Any]) -> MadeMark:
    return MadeMark(
        mark_id=str(entry["mark_id"]),
        name=str(entry["name"]),
        consistency=str(Consistency(entry["consistency"])),
        floor=int(entry["floor"]),
        sequence=int(entry["sequence"]),
        time_ns=int(entry["time_ns"]),
        in_gap=bool(entry["in_gap"]),
        pause_seconds=None if entry.get("pause_seconds") is None else float(entry["pause_seconds"]),
    )
