"""Changes of jobs, lives and alerts, as the database itself tells of them.

Triggers of the connection (they are in no file) call back whenever such a row is written, whoever's code writes it: so
no change is forgotten, and what is rolled back is not told. What the rows mean for people is made of it in `events`.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Final

from replicar.control.messages import Alert, Job


@dataclass(frozen=True, slots=True)
class LifeChanged:
    """What is stored of a machine's life was changed."""


Change = Job | Alert | LifeChanged

_TRIGGERS: Final = """
CREATE TEMP TRIGGER tell_new_job AFTER INSERT ON main.jobs BEGIN SELECT tell_job('', new.job); END;
CREATE TEMP TRIGGER tell_job AFTER UPDATE OF job ON main.jobs BEGIN SELECT tell_job(old.job, new.job); END;
CREATE TEMP TRIGGER tell_new_alert AFTER INSERT ON main.alerts BEGIN SELECT tell_alert(name, new.number, new.code,
    new.message, new.hint, new.raised_ns, new.cleared_ns) FROM main.parties WHERE id = new.machine_id; END;
CREATE TEMP TRIGGER tell_alert AFTER UPDATE ON main.alerts BEGIN SELECT tell_alert(name, new.number, new.code,
    new.message, new.hint, new.raised_ns, new.cleared_ns) FROM main.parties WHERE id = new.machine_id; END;
CREATE TEMP TRIGGER tell_new_life AFTER INSERT ON main.lives BEGIN SELECT tell_life(); END;
CREATE TEMP TRIGGER tell_life AFTER UPDATE ON main.lives BEGIN SELECT tell_life(); END;
"""


class Changes:
    """What the transaction under way has changed so far; for use on the connection's thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._found: list[Change] = []
        connection.create_function("tell_job", 2, self._job)
        connection.create_function("tell_alert", 7, self._alert)
        connection.create_function("tell_life", 0, self._life)
        connection.executescript(_TRIGGERS)

    def taken(self) -> list[Change]:
        """The changes up to now, which are forgotten with it."""
        found, self._found = self._found, []
        return found

    def _job(self, before: str, after: str) -> None:
        job = Job.model_validate_json(after)
        if not before or _without_lease(Job.model_validate_json(before)) != _without_lease(job):
            self._found.append(job)

    def _alert(
        self, machine: str, number: int, code: str, message: str, hint: str, raised_ns: int, cleared_ns: int | None
    ) -> None:
        self._found.append(
            Alert(
                number=number,
                machine=machine,
                code=code,
                message=message,
                hint=hint,
                raised_ns=raised_ns,
                cleared_ns=cleared_ns,
            )
        )

    def _life(self) -> None:
        self._found.append(LifeChanged())


def _without_lease(job: Job) -> Job:
    """Of a job what is news: a lease is renewed every twenty seconds."""
    return job.model_copy(update={"lease_until_ns": None})
