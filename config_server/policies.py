"""Policies and target settings in the registry: versioned, assigned to machines; functions on a transaction.

A change says which version it was made from, and is refused when that is not the newest: two operators who change the
same thing at once both hear of it. Former versions of a policy are kept, so that it can be told by which rules
something was thinned.
"""

from __future__ import annotations

import sqlite3
import uuid

from config_server.parties import Party
from replicar.control.messages import (
    DEFAULT_POLICY,
    MAX_POLICY_VERSIONS,
    PointSchedule,
    Policy,
    PolicyChange,
    TargetChange,
    TargetSettings,
)
from replicar.errors import ConflictError, LimitError, PermanentError

MAX_POLICIES = 100


def listed(connection: sqlite3.Connection) -> tuple[Policy, ...]:
    """The newest version of every policy, by name; the default one is there before anybody changed it."""
    rows = connection.execute("SELECT name, max(version), policy FROM policies GROUP BY name ORDER BY name").fetchall()
    found = {row["name"]: Policy.model_validate_json(row["policy"]) for row in rows}
    found.setdefault(DEFAULT_POLICY, Policy(name=DEFAULT_POLICY))
    return tuple(found[name] for name in sorted(found))


def named(connection: sqlite3.Connection, name: str) -> Policy:
    """The newest version of a policy.

    Raises:
        PermanentError: there is none of this name.
    """
    row = connection.execute(
        "SELECT policy FROM policies WHERE name = ? ORDER BY version DESC LIMIT 1", (name,)
    ).fetchone()
    if row is not None:
        return Policy.model_validate_json(row["policy"])
    if name == DEFAULT_POLICY:
        return Policy(name=DEFAULT_POLICY)
    raise PermanentError(
        f"no policy named {name!r} in this vault",
        hint="see `replicar policy list`, or make it: `replicar policy set`",
        status=404,
        policy=name,
    )


def change(connection: sqlite3.Connection, name: str, change: PolicyChange, now_ns: int) -> Policy:
    """Make a policy, or a new version of it; one that is the same already stays as it is.

    Raises:
        PermanentError: it contradicts itself.
        ConflictError: it was changed meanwhile.
        LimitError: there are too many.
    """
    wanted = change.policy
    if wanted.name != name:
        raise PermanentError(f"the policy is named {wanted.name!r}, not {name!r}", hint="give one name", status=400)
    if fault := wanted.fault():
        hint = "let each tier end later and keep fewer points than the one before"
        raise PermanentError(f"the retention of policy {name} contradicts itself: {fault}", hint=hint, status=400)
    there = {policy.name: policy for policy in listed(connection)}
    newest = there.get(name, Policy(name=name))
    wanted = wanted.model_copy(update={"version": newest.version})
    if wanted == newest and name in there:
        return newest
    _check_base(f"policy {name}", change.base_version, newest.version)
    if name not in there and len(there) >= MAX_POLICIES:
        raise LimitError(f"the vault has {len(there)} policies; {MAX_POLICIES} is the limit", hint="change one of them")
    wanted = wanted.model_copy(update={"version": newest.version + 1})
    connection.execute(
        "INSERT INTO policies VALUES (?, ?, ?, ?)", (name, wanted.version, wanted.model_dump_json(), now_ns)
    )
    connection.execute(
        "DELETE FROM policies WHERE name = ? AND version <= ?", (name, wanted.version - MAX_POLICY_VERSIONS)
    )
    return wanted


def of_machine(connection: sqlite3.Connection, machine_id: uuid.UUID) -> Policy:
    """The policy that a machine is protected by."""
    row = connection.execute("SELECT policy FROM arrangements WHERE machine_id = ?", (str(machine_id),)).fetchone()
    return named(connection, row["policy"] if row is not None and row["policy"] is not None else DEFAULT_POLICY)


def assign(connection: sqlite3.Connection, machine: Party, name: str) -> Policy:
    """Raises:
    PermanentError: there is no such policy.
    """
    policy = named(connection, name)
    connection.execute(
        "INSERT INTO arrangements (machine_id, policy) VALUES (?, ?)"
        " ON CONFLICT DO UPDATE SET policy = excluded.policy",
        (str(machine.id), name),
    )
    return policy


def machines_under(connection: sqlite3.Connection, name: str) -> tuple[uuid.UUID, ...]:
    """The machines that a policy applies to."""
    rows = connection.execute(
        "SELECT machines.id FROM machines LEFT JOIN arrangements ON machine_id = machines.id"
        " WHERE coalesce(policy, ?) = ?",
        (DEFAULT_POLICY, name),
    ).fetchall()
    return tuple(uuid.UUID(row["id"]) for row in rows)


def schedule(connection: sqlite3.Connection, machine_id: uuid.UUID) -> PointSchedule:
    """How often the machine's agent is to make points by the clock."""
    policy = of_machine(connection, machine_id)
    return PointSchedule(crash_seconds=policy.crash_point_seconds, application_seconds=policy.application_point_seconds)


def target_of(connection: sqlite3.Connection, machine_id: uuid.UUID) -> TargetSettings:
    """What the machine is to be made of."""
    row = connection.execute("SELECT target FROM arrangements WHERE machine_id = ?", (str(machine_id),)).fetchone()
    if row is None or row["target"] is None:
        return TargetSettings()
    return TargetSettings.model_validate_json(row["target"])


def change_target(connection: sqlite3.Connection, machine: Party, change: TargetChange) -> TargetSettings:
    """Raises:
    ConflictError: the settings were changed meanwhile.
    """
    newest = target_of(connection, machine.id)
    wanted = change.target.model_copy(update={"version": newest.version})
    if wanted == newest:
        return newest
    _check_base(f"target settings of machine {machine.name}", change.base_version, newest.version)
    wanted = wanted.model_copy(update={"version": newest.version + 1})
    connection.execute(
        "INSERT INTO arrangements (machine_id, target) VALUES (?, ?)"
        " ON CONFLICT DO UPDATE SET target = excluded.target",
        (str(machine.id), wanted.model_dump_json()),
    )
    return wanted


def _check_base(what: str, base: int, newest: int) -> None:
    if base != newest:
        raise ConflictError(
            f"the {what} has version {newest} by now; the change was made from version {base}",
            hint="look at it again, then make the change anew",
            ours=base,
            theirs=newest,
        )


def deciding(machine: str, missing: tuple[str, ...]) -> str:
    """The command by which an operator decides what is missing of a machine's target settings."""
    if missing == ("compute",):
        return f"`replicar target set {machine} --compute qemu` (on a recovery worker's host), or `--compute azure`"
    options = " ".join(f"--{name.replace('_', '-')} ..." for name in missing)
    return f"`replicar target set {machine} {options}`"
