"""Where the stream's order was lost and when it was whole again, for the config server's catalogue.

The stream itself says so, in GAP records; this is a memory of them, so that the agent can tell which recovery points
are offered without reading the stream. A gap that is begun while one is open is the same gap. The memory lags behind
the stream by at most a second on disk; after a restart it is completed from the change log (`observe` again).

Weak: a gap whose records were stored and trimmed within that second, before the process died, is missing from the
catalogue. Recovery takes gaps from the stream, so it would still offer no point inside.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from mobility_agent.records import Record
from replicar.control.files import PUBLIC_MODE, read_file, write_file
from replicar.control.messages import GapReport
from replicar.errors import PermanentError
from replicar.formats import record
from replicar.formats.frame import Flag

#: Gaps remembered; older ones have long been reported.
MAX_GAPS: Final = 1000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gap:
    """From GAP_BEGIN at `first_sequence` to GAP_END at `last_sequence` (None: still open)."""

    first_sequence: int
    last_sequence: int | None
    reason: str


class Gaps:
    """The last gaps of a stream.

    Args:
        path: where they are remembered; a file that can't be read is begun anew, since the stream has the truth.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._gaps: deque[Gap] = deque(maxlen=MAX_GAPS)
        self._unreported: dict[int, Gap] = {}  # by first sequence
        self._changed = False
        self.covered_sequence = 0
        self.ordered_from: tuple[int, int] | None = None
        self.begun = 0  # in this life of the process
        self._load()

    @property
    def is_open(self) -> bool:
        return bool(self._gaps) and self._gaps[-1].last_sequence is None

    @property
    def is_first(self) -> bool:
        """Whether order was never whole yet: the gap is initial replication."""
        return all(gap.last_sequence is None for gap in self._gaps)

    @property
    def latest(self) -> Gap | None:
        return self._gaps[-1] if self._gaps else None

    def holds(self, sequence: int) -> bool:
        """Whether `sequence` lies in a gap (its ends count as inside)."""
        return any(
            gap.first_sequence <= sequence and (gap.last_sequence is None or sequence <= gap.last_sequence)
            for gap in self._gaps
        )

    def observe(self, found: Record) -> None:
        """Take note of a record of the stream, in its order; what was seen before is passed over."""
        if not isinstance(found.item, record.Gap) or found.sequence <= self.covered_sequence:
            return
        self.covered_sequence = found.sequence
        self._changed = True
        if found.flags & Flag.GAP_END:
            if self.is_open:
                self._gaps[-1] = replace(self._gaps[-1], last_sequence=found.sequence)
                self._report(self._gaps[-1])
            self.ordered_from = (found.sequence, found.time_ns)
        elif not self.is_open:
            self.ordered_from = None
            self.begun += 1
            self._gaps.append(Gap(found.sequence, None, found.item.reason))
            self._report(self._gaps[-1])

    def reports(self) -> tuple[GapReport, ...]:
        """What the config server was not told yet, oldest first."""
        return tuple(
            GapReport(first_sequence=gap.first_sequence, last_sequence=gap.last_sequence, reason=gap.reason[:512])
            for gap in self._unreported.values()
        )

    def acknowledged(self, reports: tuple[GapReport, ...]) -> None:
        """A heartbeat with these was answered."""
        for report in reports:
            gap = self._unreported.get(report.first_sequence)
            if gap is not None and gap.last_sequence == report.last_sequence:
                del self._unreported[report.first_sequence]

    async def save(self) -> None:
        """Remember what changed since the last time, if anything did."""
        if not self._changed:
            return
        self._changed = False
        fields = {
            "covered_sequence": self.covered_sequence,
            "ordered_from": self.ordered_from,
            "gaps": [asdict(gap) for gap in self._gaps],
        }
        try:
            await asyncio.to_thread(write_file, self._path, json.dumps(fields).encode(), mode=PUBLIC_MODE)
        except BaseException:
            self._changed = True
            raise

    def _report(self, gap: Gap) -> None:
        self._unreported[gap.first_sequence] = gap
        if len(self._unreported) > MAX_GAPS:
            del self._unreported[next(iter(self._unreported))]

    def _load(self) -> None:
        if not self._path.exists():
            return
        try:
            fields = json.loads(read_file(self._path, what="the gaps"))
            gaps = [
                Gap(int(g["first_sequence"]), _sequence(g["last_sequence"]), str(g["reason"])) for g in fields["gaps"]
            ]
            whole = fields["ordered_from"]
            self.ordered_from = None if whole is None else (int(whole[0]), int(whole[1]))
            self.covered_sequence = int(fields["covered_sequence"])
        except (PermanentError, ValueError, KeyError, TypeError, IndexError) as error:
            _log.warning("the gaps in %s are taken from the change log again: %s", self._path, error)
            self.covered_sequence, self.ordered_from = 0, None
            return
        self._gaps.extend(gaps)
        for gap in self._gaps:
            self._report(gap)  # perhaps told already; telling it again does no harm


def _sequence(value: object) -> int | None:
    if value is None or isinstance(value, int):
        return value
    raise ValueError("no sequence")
