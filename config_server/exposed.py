"""What the config server shows to Prometheus: the vault at a glance, read in one transaction of the registry.

It knows least of the present (heartbeats are some seconds old) and most of the whole: who is silent, how old the newest
point of a machine is, which jobs wait. A scrape costs about what `replicar status` does. Labels are names of machines
and of process servers, and words of short lists.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from config_server import alerts, overview
from config_server.machines import LIVE_SECONDS, machine_row
from config_server.troubles import Troubles
from replicar.control.messages import JobKind, JobState, LifeState, MachineSummary, ProcessServerSummary
from replicar.observe.exposition import Page
from replicar.observe.process import page_of
from replicar.signals import rank

PART: Final = "config-server"
_PREFIX: Final = "replicar_config_server"
_MACHINE: Final = "replicar_config_server_machine"
_SERVER: Final = "replicar_config_server_process_server"
_NS: Final = 10**9


def page(connection: sqlite3.Connection, troubles: Troubles, now_ns: int, *, held_requests: int) -> Page:
    """The page of one scrape.

    Args:
        held_requests: long polls that wait now.
    """
    page = page_of(PART)
    page.gauge(f"{_PREFIX}_held_requests", "Long polls that are held now.", held_requests)
    text = "Kinds of work by the clock that failed last time, and are tried again."
    page.gauge(f"{_PREFIX}_failing", text, len(troubles.own))
    machines = overview.summaries(connection, now_ns, troubles)
    page.gauge(f"{_PREFIX}_machines", "Machines of the vault that were not removed.", len(machines))
    for machine in machines:
        _machine(page, connection, machine, now_ns)
    for server in overview.process_servers(connection, now_ns, troubles):
        _server(page, server, now_ns)
    _jobs(page, connection)
    text = "Recovery workers that were heard of lately."
    online = connection.execute(
        "SELECT count(*) FROM recovery_workers WHERE heartbeat_ns >= ?", (now_ns - LIVE_SECONDS * _NS,)
    ).fetchone()[0]
    page.gauge(f"{_PREFIX}_recovery_workers_online", text, online)
    rows = connection.execute("SELECT code, count(*) AS number FROM alerts WHERE cleared_ns IS NULL GROUP BY code")
    lasting = {row["code"]: row["number"] for row in rows}
    for code in sorted({alerts.RPO_EXCEEDED, *lasting}):
        page.gauge(f"{_PREFIX}_alerts", "Alerts that last, by code.", lasting.get(code, 0), code=code)
    return page


def _machine(page: Page, connection: sqlite3.Connection, machine: MachineSummary, now_ns: int) -> None:
    who = {"machine": machine.name, "machine_id": str(machine.id)}
    row = machine_row(connection, machine.id)
    page.gauge(f"{_MACHINE}_online", "1 while its agent is heard of.", int(machine.online), **who)
    page.gauge(
        f"{_MACHINE}_storing", "0 while it is protected and something is in its way.", int(machine.storing), **who
    )
    page.one_of(f"{_MACHINE}_life", "1 for where it is in the circle.", LifeState, machine.life, "life", **who)
    text = "RPO: what the agent said last, and the time since then."
    reported = row["report"] is not None
    for signal in machine.signals:
        health = "Health by signal: 0 healthy, 1 warning, 2 critical."
        page.gauge(f"{_MACHINE}_signal_level", health, rank(signal.level), **who, signal=signal.name)
    page.gauge(f"{_MACHINE}_rpo_seconds", text, alerts.rpo_seconds(row, now_ns) if reported else None, **who)
    text = "Bytes captured and not in storage: in the agent's log, and of those in the process server."
    page.gauge(f"{_MACHINE}_transit_bytes", text, machine.source_bytes, **who, stage="log")
    page.gauge(f"{_MACHINE}_transit_bytes", text, machine.pending_bytes, **who, stage="process-server")
    text = "Bytes that process servers uploaded for it, over restarts."
    page.counter(f"{_MACHINE}_uploaded_bytes_total", text, machine.bytes_stored, **who)
    text = "Bytes that process servers received of it, over restarts."
    page.counter(f"{_MACHINE}_received_bytes_total", text, machine.bytes_received, **who)
    total = machine.seed_total_bytes
    text = "How much of its disks is copied, 0 to 1."
    page.gauge(f"{_MACHINE}_copied_ratio", text, machine.seed_done_bytes / total if total else None, **who)
    points = connection.execute(
        "SELECT count(*) AS number, max(time_ns) AS newest_ns FROM marks"
        " WHERE machine_id = ? AND stored = 1 AND in_gap = 0",
        (str(machine.id),),
    ).fetchone()
    page.gauge(f"{_MACHINE}_points", "Named points of it that are in storage.", points["number"], **who)
    text = "Age of the newest of them: how old a change and a mark behind it, both in storage, are."
    newest_ns = points["newest_ns"]
    page.gauge(f"{_MACHINE}_point_age_seconds", text, _age(newest_ns, now_ns), **who)
    gaps = connection.execute(
        "SELECT count(*) AS number, count(*) FILTER (WHERE last_sequence IS NULL) AS open FROM gaps"
        " WHERE machine_id = ?",
        (str(machine.id),),
    ).fetchone()
    page.gauge(f"{_MACHINE}_gaps", "Gaps in its order that are kept in the catalogue.", gaps["number"], **who)
    page.gauge(f"{_MACHINE}_gaps_open", "Gaps that last.", gaps["open"], **who)
    audited_ns = machine.audit.last_ended_ns if machine.audit is not None else None
    text = "Time since the last whole round of audits of its disks ended."
    page.gauge(f"{_MACHINE}_audit_age_seconds", text, _age(audited_ns, now_ns), **who)


def _server(page: Page, server: ProcessServerSummary, now_ns: int) -> None:
    who = {"process_server": server.name}
    page.gauge(f"{_SERVER}_online", "1 while it is heard of.", int(server.online), **who)
    page.gauge(
        f"{_SERVER}_silent_seconds", "Time since it was heard of.", _age(server.last_heartbeat_ns, now_ns), **who
    )
    page.gauge(f"{_SERVER}_health", "0 healthy, 1 warning, 2 critical.", rank(server.health), **who)
    page.gauge(f"{_SERVER}_machines", "Machines assigned to it.", server.machines, **who)


def _jobs(page: Page, connection: sqlite3.Connection) -> None:
    rows = connection.execute("SELECT kind, state, count(*) AS number FROM jobs GROUP BY kind, state").fetchall()
    found = {(row["kind"], row["state"]): row["number"] for row in rows}
    for kind in JobKind:
        for state in JobState:
            number = found.get((str(kind), str(state)), 0)
            page.gauge(f"{_PREFIX}_jobs", "Jobs that are kept, by kind and state.", number, kind=kind, state=state)


def _age(then_ns: int | None, now_ns: int) -> float | None:
    return None if then_ns is None else max(now_ns - then_ns, 0) / _NS
