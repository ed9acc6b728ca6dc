"""A host's clock that is set back, as when it was wrong until it was first compared with others'.

What the registry says of times, it says by this host's clock. When that goes back, what is due would be due later, by
as much; what a dead worker had would stay its own, and who was heard of last before would count as alive for as long.
So what lies ahead of the clock is moved along with it. What was written since by the clock as it is now stays as it is.

Noticed by a round against the one before, and against what the registry knows of: of a set-back while the server was
down, when somebody was heard of before.

Weak: times that only order events (of jobs, points, the audit) stay as they were said.
"""

from __future__ import annotations

import logging
import sqlite3
from typing import Final

from config_server import upkeep
from config_server.jobs import claims
from replicar.control.messages import JobKind

#: A clock that is this much behind what it was, or behind what the registry knows of, was set back.
LEAST_NS: Final = 10**9
#: When somebody was last heard of, or something done; never ahead of the clock.
_PAST: Final = (
    ("upkeep", "done_ns"),
    ("machines", "heartbeat_ns"),
    ("process_servers", "heartbeat_ns"),
    ("recovery_workers", "heartbeat_ns"),
    ("lives", "since_ns"),
)

_log = logging.getLogger(__name__)


def follow(connection: sqlite3.Connection, *, now_ns: int, latest_ns: int) -> None:
    """If the clock was set back since it said `latest_ns`, move along what waits for a time.

    A lease by the clock as it is now ends within a lease's time, and is left alone; so what had been granted before is
    somebody's for that long at most.
    """
    known_ns = max(_latest(connection, table, column) for table, column in _PAST)
    back_ns = max(latest_ns, known_ns) - now_ns
    if back_ns < LEAST_NS:
        return
    _log.warning("the clock was set back by %.0f s; what is due is so by the clock as it is now", back_ns / 1e9)
    for table, column in _PAST:
        connection.execute(f"UPDATE {table} SET {column} = min({column}, ?)", (now_ns,))  # noqa: S608 - names of ours
    end_ns = upkeep.lease_end(now_ns)
    connection.execute(
        "UPDATE upkeep SET due_ns = max(due_ns - ?, min(due_ns, ?)) WHERE owner != ''", (back_ns, end_ns)
    )
    # What is nobody's is no lease, and too early does no harm.
    connection.execute("UPDATE upkeep SET due_ns = due_ns - ? WHERE owner = '' AND due_ns > ?", (back_ns, now_ns))
    end_ns = claims.lease_end(now_ns)
    connection.execute(
        "UPDATE jobs SET due_ns = max(due_ns - ?, min(due_ns, ?)) WHERE ended_ns IS NULL", (back_ns, end_ns)
    )
    lease = "json_extract(job, '$.lease_until_ns')"
    connection.execute(
        f"UPDATE jobs SET job = json_set(job, '$.lease_until_ns', max({lease} - ?, min({lease}, ?)))"  # noqa: S608
        f" WHERE ended_ns IS NULL AND {lease} IS NOT NULL",
        (back_ns, end_ns),
    )
    connection.execute(  # the next drill is due so long after it
        "UPDATE jobs SET job = json_set(job, '$.created_ns', min(json_extract(job, '$.created_ns'), ?)) WHERE kind = ?",
        (now_ns, JobKind.TEST_FAILOVER),
    )


def _latest(connection: sqlite3.Connection, table: str, column: str) -> int:
    found = connection.execute(f"SELECT max({column}) FROM {table}").fetchone()[0]  # noqa: S608 - names of ours
    return int(found or 0)
