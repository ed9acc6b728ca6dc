"""How a vault, its machines and their points look on a terminal: tables that fit 80 columns, and what is in the way.

A table has what one looks for in a list; `replicar machines NAME` and `--json` have the rest. Errors stand under the
tables, each with its next step, and one that several machines have in common is told once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from replicar.cli.console import duration, row, size, table
from replicar.control.message import ErrorReport
from replicar.control.messages import (
    HealthSignal,
    LifeState,
    MachineState,
    MachineSummary,
    PointList,
    VaultStatus,
)
from replicar.moments import format_moment
from replicar.signals import Level

NOT_STORING: Final = "not storing"
#: Signals of machines that their errors tell as well.
_SAID_BY_ERRORS: Final = ("heartbeat", "process server")
_SHORT: Final = {
    str(MachineState.INITIAL_REPLICATION): "replicating",
    str(MachineState.RESYNCHRONISING): "resyncing",
}
#: Where a machine's state is what jobs made of it.
ELSEWHERE: Final = frozenset(LifeState) - {
    LifeState.UNPROTECTED,
    LifeState.ENABLING,
    LifeState.INITIAL_REPLICATION,
    LifeState.WAITING_FOR_POINT,
    LifeState.PROTECTED,
    LifeState.RESYNCHRONISING,
}
#: Kept states without a name that `points` shows.
KEPT_SHOWN: Final = 20
#: Gaps that `points` shows; a machine under trace capture has one for each point.
GAPS_SHOWN: Final = 10


def show_status(console: Console, found: VaultStatus) -> None:
    """The whole vault."""
    console.print(f"Vault {escape(found.vault)} (config server {escape(found.software)})\n")
    servers = table("~process server", "state", "~address", ">machines", ">cache free", ">of")
    for server in found.process_servers:
        state = ("online" if server.health == Level.HEALTHY else str(server.health)) if server.online else "offline"
        row(servers, server.name, state, f"{server.host}:{server.port}", server.machines,
            size(server.cache_bytes_free), size(server.cache_bytes))  # fmt: skip
    if found.process_servers:
        console.print(servers)
    else:
        console.print("No process server is enrolled yet: process-server enrol --help")
    console.print()
    if found.machines:
        console.print(_machine_table(found.machines))
    else:
        console.print("No machine is enrolled yet: mobility-agent enrol --help")
    told: set[str] = set()
    _show_errors(console, "config server", found.errors, told)
    for server in found.process_servers:
        _show_errors(console, f"process server {server.name}", server.errors, told)
        _show_signals(console, f"process server {server.name}", server.signals)
    _show_machine_errors(console, found.machines, told)


def show_machines(console: Console, found: Sequence[MachineSummary]) -> None:
    """A list of machines, and what is in the way of any of them."""
    console.print(_machine_table(found))
    _show_machine_errors(console, found, set())


def show_machine(console: Console, found: MachineSummary) -> None:
    """Everything about one machine."""
    made = table("", "~")
    heard = format_moment(found.last_heartbeat_ns) if found.last_heartbeat_ns is not None else "never"
    row(made, "machine", found.name)
    row(made, "id", found.id)
    row(made, "state", found.state if found.storing else f"{found.state}, but {NOT_STORING}")
    since = f" since {format_moment(found.life_since_ns)}" if found.life in ELSEWHERE else ""
    row(made, "life", f"{found.life}{since}")
    row(made, "agent", f"{'online' if found.online else 'offline'}, last heard of {heard}")
    row(made, "process server", found.process_server or "-")
    row(made, "enrolled again", f"{found.incarnation} times")
    row(made, "captured", f"up to sequence {found.captured_sequence}, {size(found.bytes_captured)}")
    row(made, "sent", size(found.bytes_sent))
    row(made, "received", f"up to sequence {found.received_sequence}, {size(found.bytes_received)}")
    row(made, "stored", f"up to sequence {found.stored_sequence}, {size(found.bytes_stored)} compressed")
    row(made, "in transit", f"{size(max(found.source_bytes - found.pending_bytes, 0))} at the source, "
        f"{size(found.pending_bytes)} at the process server")  # fmt: skip
    row(made, "RPO", f"{duration(found.rpo_seconds)} now, p50 {duration(found.rpo_p50_seconds)}, "
        f"p99 {duration(found.rpo_p99_seconds)}")  # fmt: skip
    if found.journal_full_seconds is not None:
        row(made, "journal", f"full in about {duration(found.journal_full_seconds)} if it goes on so")
    if found.copy_remaining_seconds:
        row(made, "all copied", f"in about {duration(found.copy_remaining_seconds)}")
    for disk in found.disks:
        done = f", {size(disk.seed_done_bytes)} replicated" if disk.seed_done_bytes < disk.size_bytes else ""
        row(made, f"disk {disk.name}", f"{size(disk.size_bytes)}{done}")
    console.print(made)
    _show_machine_errors(console, [found], set())


def show_points(console: Console, found: PointList) -> None:
    """What a machine can be recovered to."""
    if found.points:
        named = table("~point", "kind", "time", ">sequence", "stored", ">held")
        for point in found.points:
            stored = "yes" if point.stored else "not yet"
            if point.earlier:
                stored = "earlier" if point.stored else "no"
            held = "" if point.pause_seconds is None else f"{point.pause_seconds * 1000:.0f} ms"
            row(named, point.name, point.kind, format_moment(point.time_ns), point.sequence, stored, held)
        console.print(named)
        if found.truncated:
            console.print("(older ones are left out)")
        if any(point.earlier and point.stored for point in found.points):
            console.print(
                "earlier: stored before the machine was enrolled again; it can be recovered if the log of that time "
                "is still in the container, which `replicar verify` tells."
            )
    else:
        console.print("There is no named point yet: replicar tag MACHINE NAME")
    _show_retention(console, found)
    console.print()
    if found.ordered_from is None:
        console.print("No instant can be chosen at present: storage holds no end of initial replication (or of a gap).")
    else:
        sequence, time_ns = found.ordered_from
        until_ns = found.ordered_until_ns if found.ordered_until_ns is not None else time_ns
        console.print("Any instant can be chosen with --at")
        console.print(f"  from {format_moment(time_ns)} (sequence {sequence})")
        console.print(f"  to   {format_moment(until_ns)} (what is stored up to now, sequence {found.stored_sequence}).")
    if len(found.gaps) > GAPS_SHOWN:
        console.print(f"({len(found.gaps) - GAPS_SHOWN} older gaps are left out; --json has them)")
    for gap in found.gaps[-GAPS_SHOWN:]:
        end = gap.last_sequence if gap.last_sequence is not None else "(it lasts)"
        console.print(f"But for the gap from sequence {gap.first_sequence} to {end}: {escape(gap.reason)}")
    _show_errors(console, f"machine {found.name} is {NOT_STORING}", found.errors, set())


def _show_retention(console: Console, found: PointList) -> None:
    """What is kept in front of the window besides named points, and how much was given up."""
    names = {point.sequence for point in found.points}
    others = [item for item in found.retention.kept if item.sequence not in names] if found.retention else []
    if others:
        kept = table("~kept, without a name", ">sequence")
        for item in others[-KEPT_SHOWN:]:
            row(kept, format_moment(item.time_ns), item.sequence)
        console.print(kept)
        if len(others) > KEPT_SHOWN:
            console.print(f"({len(others) - KEPT_SHOWN} older ones are left out; --json has them)")
    if found.thinned:
        console.print(
            f"{len(found.thinned)} older named point(s) were thinned by the policy: they can't be chosen any more"
        )


def _machine_table(found: Iterable[MachineSummary]) -> Table:
    made = table("~machine", "state", "~server", ">initial", ">stored", ">RPO")
    for machine in found:
        total = machine.seed_total_bytes
        initial = f"{100 * machine.seed_done_bytes / total:.0f} %" if total else "-"
        row(made, machine.name, _state(machine), machine.process_server or "-", initial,
            size(machine.bytes_stored), duration(machine.rpo_seconds))  # fmt: skip
    return made


def _state(machine: MachineSummary) -> str:
    """One word; what an agent said that is away is no news, nor is it where a job has taken the machine elsewhere."""
    if machine.life in ELSEWHERE:
        return machine.life
    if not machine.storing:
        return NOT_STORING
    if not machine.online and machine.state in set(MachineState) - {MachineState.STOPPED}:
        return "offline"
    return _SHORT.get(machine.state, machine.state)


def _show_machine_errors(console: Console, found: Iterable[MachineSummary], told: set[str]) -> None:
    for machine in found:
        what = f"machine {machine.name} is {NOT_STORING}"
        if machine.errors and all(error.message in told for error in machine.errors):
            console.print(f"\n[bold red]{escape(what)}[/]: as said above", soft_wrap=True)
        _show_errors(console, what, machine.errors, told)
        # Silence and a way that is barred are errors as well, and were said just now.
        rest = [signal for signal in machine.signals if not (machine.errors and signal.name in _SAID_BY_ERRORS)]
        _show_signals(console, f"machine {machine.name}", rest)


def _show_signals(console: Console, who: str, signals: Iterable[HealthSignal]) -> None:
    """What is not well with somebody, with its next step."""
    for signal in signals:
        if signal.level == Level.HEALTHY:
            continue
        colour = "bold red" if signal.level == Level.CRITICAL else "bold yellow"
        what = f"{who} is in {signal.level} health"
        console.print(f"\n[{colour}]{escape(what)}[/]: {escape(signal.cause)}", soft_wrap=True)
        console.print(f"next step: {escape(signal.hint)}", soft_wrap=True)


def _show_errors(console: Console, what: str, errors: Iterable[ErrorReport], told: set[str]) -> None:
    for error in errors:
        if error.message in told:
            continue
        told.add(error.message)
        where = f", {error.part}" if error.part else ""
        console.print(f"\n[bold red]{escape(what + where)}[/]: {escape(error.message)}", soft_wrap=True)
        if error.hint:
            console.print(f"next step: {escape(error.hint)}", soft_wrap=True)
