"""What came of the demo: facts as data, as one JSON object, and as tables that a person can read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from simulator.recovered import Verdict


@dataclass(frozen=True, slots=True)
class Proof:
    """One recovered disk: of which point, in which form, and what judging it gave."""

    point: str
    at_ns: int
    form: str
    recover_seconds: float
    verdict: Verdict

    @property
    def holds(self) -> bool:
        return not self.verdict.problems


@dataclass(slots=True)
class Report:
    """Everything the demo measured. Sizes in bytes, times in seconds, rates in bytes a second."""

    machine: str = ""
    disk: str = ""
    disk_bytes: int = 0
    file_bytes: int = 0
    initial_replication_seconds: float = 0.0
    writing_seconds: float = 0.0
    writes: int = 0
    bytes_written: int = 0
    bytes_zeroed: int = 0
    rpo_p50_seconds: float = 0.0
    rpo_p99_seconds: float = 0.0
    bytes_captured: int = 0
    bytes_sent: int = 0
    bytes_stored: int = 0
    process_server_kills: int = 0
    proofs: list[Proof] = field(default_factory=list)
    verify: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def churn_bytes_per_second(self) -> float:
        return self.bytes_written / self.writing_seconds if self.writing_seconds else 0.0

    @property
    def points_verified(self) -> int:
        """Points of which every recovered form held."""
        points = {proof.point for proof in self.proofs}
        return sum(all(proof.holds for proof in self.proofs if proof.point == point) for point in points)

    @property
    def holds(self) -> bool:
        """Whether all of it was true."""
        return bool(self.proofs) and all(proof.holds for proof in self.proofs) and not self.problems

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-serialisable data; `ok` says whether all of it was true."""
        data = asdict(self)
        data["churn_mb_per_s"] = round(self.churn_bytes_per_second / 1e6, 3)
        data["points_verified"] = self.points_verified
        data["points"] = len({proof.point for proof in self.proofs})
        for entry, proof in zip(data["proofs"], self.proofs, strict=True):
            entry["ok"] = proof.holds
        return {"ok": self.holds, **data}

    def print(self, console: Console) -> None:
        """The report for a person."""
        console.print(self._summary(), self._points())
        failed = (f"{proof.point} as {proof.form}: {what}" for proof in self.proofs for what in proof.verdict.problems)
        for problem in [*self.problems, *failed]:
            console.print(f"[red]not true:[/red] {problem}", highlight=False)
        verdict = "[green]everything held[/green]" if self.holds else "[red]not everything held[/red]"
        console.print(f"{verdict}, in {self.seconds:.0f} s", highlight=False)

    def _summary(self) -> Table:
        table = Table(title="replicar demo", show_header=False, title_justify="left")
        points = len({proof.point for proof in self.proofs})
        moved = (self.bytes_captured, self.bytes_sent, self.bytes_stored)
        churn = f"{self.churn_bytes_per_second / 1e6:.1f} MB/s"
        rows = {
            "machine": self.machine,
            "disk": f"{self.disk}, {_size(self.disk_bytes)}, {_size(self.file_bytes)} of real files",
            "initial replication": f"{self.initial_replication_seconds:.1f} s, beside live writes",
            "churn": f"{churn}, {self.writes} writes in {self.writing_seconds:.0f} s",
            "RPO p50 / p99": f"{self.rpo_p50_seconds:.2f} s / {self.rpo_p99_seconds:.2f} s",
            "captured / sent / stored": " / ".join(map(_size, moved)),
            "process server killed": f"{self.process_server_kills} time(s), in mid-flow",
            "points verified": f"{self.points_verified} of {points}",
        }
        for name, value in rows.items():
            table.add_row(name, value)
        return table

    def _points(self) -> Table:
        table = Table()
        for column in ("point", "instant (UTC)", "recovered as", "bytes equal", "files equal", "in", "holds"):
            table.add_column(column)
        for proof in self.proofs:
            verdict = proof.verdict
            instant = datetime.fromtimestamp(proof.at_ns / 1e9, UTC)
            moment = instant.strftime("%H:%M:%S.%f") if proof.at_ns else "the end"
            holds = "[green]yes" if proof.holds else "[red]no"
            equal, files = f"{verdict.bytes_compared:,}", str(verdict.files_compared)
            table.add_row(proof.point, moment, proof.form, equal, files, f"{proof.recover_seconds:.1f} s", holds)
        return table


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
