"""How machines are protected, and what they are to be made of: `policy`, `target`, `alerts`.

A change is made from what is there: only what is named changes, and if somebody else changed it meanwhile the change is
refused, so that neither is lost.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console

from replicar.cli.console import Json, Machine, SettingsFile, Telling, row, run, table
from replicar.cli.settings import load_settings
from replicar.control.message import Message
from replicar.control.messages import Alert, Policy, TargetSettings
from replicar.errors import PermanentError
from replicar.moments import format_moment

policy_app = typer.Typer(
    name="policy", help="How machines are protected: list, show, set policies.", no_args_is_help=True
)
target_app = typer.Typer(
    name="target", help="What a machine is to be made of on the other side: show, set.", no_args_is_help=True
)

PolicyName = Annotated[str, typer.Argument(help="The policy's name; `default` counts where none was chosen.")]
_Changed = TypeVar("_Changed", bound=Message)


@policy_app.command("list")
def list_policies(settings: SettingsFile = None, as_json: Json = False) -> None:
    """List policies."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.policies()

        def show(console: Console) -> None:
            made = table("policy", ">version", ">RPO threshold", ">retention", "replica", ">drill")
            for policy in found:
                drill = f"{policy.drill_days} days" if policy.drill_days else "-"
                row(made, policy.name, policy.version, f"{policy.rpo_threshold_seconds} s",
                    _days(policy.retention_seconds), policy.replica, drill)  # fmt: skip
            console.print(made)

        telling.result({"policies": [policy.model_dump(mode="json") for policy in found]}, show)

    run(as_json, work)


@policy_app.command("show")
def show_policy(name: PolicyName, settings: SettingsFile = None, as_json: Json = False) -> None:
    """Show a policy."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.policy(name)
        telling.result(found.model_dump(mode="json"), lambda console: _show_policy(console, found))

    run(as_json, work)


@policy_app.command("set")
def set_policy(
    name: PolicyName,
    rpo_threshold: Annotated[
        int | None, typer.Option(help="Seconds of RPO above which there is an alert.", show_default=False)
    ] = None,
    every_point: Annotated[
        int | None, typer.Option(help="Hours for which any instant can be chosen.", show_default=False)
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            help="DAYS:SECONDS: up to this age keep a point every so many seconds; several, in order; `none` for none.",
            show_default=False,
        ),
    ] = None,
    crash_points: Annotated[
        int | None,
        typer.Option(help="Seconds between crash-consistent points; 0: none, -1: as the agent says.", min=-1),
    ] = None,
    application_points: Annotated[
        int | None,
        typer.Option(help="Seconds between application-consistent points; 0: none, -1: as the agent says.", min=-1),
    ] = None,
    replica: Annotated[
        str | None, typer.Option(help="sealed (the log alone) or warm (a page blob close behind it).")
    ] = None,
    replica_points: Annotated[
        int | None, typer.Option(help="Seconds between the points of a warm replica; 0: none.", min=0)
    ] = None,
    drill_days: Annotated[
        int | None, typer.Option(help="Days after which a drill is begun; 0: by hand only.", show_default=False)
    ] = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Make a policy, or change what is named of one that is there."""

    async def work(telling: Telling) -> None:
        given: dict[str, Any] = {
            "rpo_threshold_seconds": rpo_threshold,
            "every_point_seconds": None if every_point is None else every_point * 3600,
            "tiers": None if tier is None else _tiers(tier),
            "replica": replica,
            "replica_point_seconds": replica_points,
            "drill_days": drill_days,
        }
        given = {field: value for field, value in given.items() if value is not None}
        for field, value in (
            ("crash_point_seconds", crash_points),
            ("application_point_seconds", application_points),
        ):
            if value is not None:
                given[field] = None if value < 0 else value
        async with load_settings(settings).control() as control:
            there = {policy.name: policy for policy in await control.policies()}
            base = there[name] if name in there else _checked(Policy, {"name": name})
            found = await control.set_policy(_checked(Policy, base.model_dump() | given), base_version=base.version)
        telling.result(found.model_dump(mode="json"), lambda console: _show_policy(console, found))

    run(as_json, work)


@policy_app.command("assign")
def assign_policy(machine: Machine, name: PolicyName, settings: SettingsFile = None, as_json: Json = False) -> None:
    """Have a machine protected by a policy."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.assign_policy(machine, name)
        telling.result(found.model_dump(mode="json"), lambda console: _show_policy(console, found))

    run(as_json, work)


@target_app.command("show")
def show_target(machine: Machine, settings: SettingsFile = None, as_json: Json = False) -> None:
    """Show what a machine is to be made of, and what is missing."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.target(machine)
        telling.result(_target_data(found), lambda console: _show_target(console, found))

    run(as_json, work)


@target_app.command("set")
def set_target(
    machine: Machine,
    compute: Annotated[str | None, typer.Option(help="qemu or azure.")] = None,
    storage_account: Annotated[str | None, typer.Option(help="Takes the disks.")] = None,
    resource_group: Annotated[str | None, typer.Option(help="Takes the machine.")] = None,
    location: Annotated[str | None, typer.Option(help="As in westeurope.")] = None,
    size: Annotated[str | None, typer.Option(help="As in Standard_D2s_v5.")] = None,
    network: Annotated[str | None, typer.Option(help="The virtual network.")] = None,
    subnet: Annotated[str | None, typer.Option(help="A subnet of it.")] = None,
    drill_network: Annotated[str | None, typer.Option(help="Where drills go.")] = None,
    availability_set: Annotated[str | None, typer.Option(help="If it is to be in one.")] = None,
    disk_kind: Annotated[str | None, typer.Option(help="Standard_LRS, StandardSSD_LRS or Premium_LRS.")] = None,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Decide what a machine is to be made of; only what is named changes. An empty value takes a decision back."""
    named = {
        "compute": compute,
        "storage_account": storage_account,
        "resource_group": resource_group,
        "location": location,
        "size": size,
        "network": network,
        "subnet": subnet,
        "drill_network": drill_network,
        "availability_set": availability_set,
        "disk_kind": disk_kind,
    }
    given = {field: value for field, value in named.items() if value is not None}

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            base = await control.target(machine)
            wanted = _checked(TargetSettings, base.model_dump() | given)
            found = await control.set_target(machine, wanted, base_version=base.version)
        telling.result(_target_data(found), lambda console: _show_target(console, found))

    run(as_json, work)


def alerts(
    every: Annotated[bool, typer.Option("--all", help="Those that are over as well.")] = False,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """List alerts: machines whose RPO is above their policy's threshold."""

    async def work(telling: Telling) -> None:
        async with load_settings(settings).control() as control:
            found = await control.alerts(lasting_only=not every)
        data = {"alerts": [alert.model_dump(mode="json") for alert in found]}
        telling.result(data, lambda console: _show_alerts(console, found))

    run(as_json, work)


def _tiers(given: list[str]) -> list[dict[str, int]]:
    tiers = []
    for text in given if given != ["none"] else []:
        days, separator, seconds = text.partition(":")
        if not separator or not days.isdecimal() or not seconds.isdecimal():
            raise PermanentError(f"{text!r} is no tier", hint="write it as DAYS:SECONDS, as in 7:7200")
        tiers.append({"until_seconds": int(days) * 86_400, "every_seconds": int(seconds)})
    return tiers


def _checked(kind: type[_Changed], fields: dict[str, Any]) -> _Changed:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = " ".join(str(part) for part in first["loc"])
        raise PermanentError(f"{where} can't be that: {first['msg']}", hint="see --help", field=where) from None


def _days(seconds: int) -> str:
    return f"{seconds / 86_400:g} days"


def _show_policy(console: Console, policy: Policy) -> None:
    made = table("", "~")
    row(made, "policy", f"{policy.name}, version {policy.version}")
    row(made, "alert", f"while the RPO is above {policy.rpo_threshold_seconds} s")
    row(made, "any instant", f"of the last {policy.every_point_seconds / 3600:g} hours")
    for tier in policy.tiers:
        row(made, "then", f"a point every {tier.every_seconds / 3600:g} hours, up to {_days(tier.until_seconds)}")
    for what, every in (("crash", policy.crash_point_seconds), ("application", policy.application_point_seconds)):
        said = "as the agent's settings say" if every is None else f"every {every} s" if every else "none"
        row(made, f"{what}-consistent points", said)
    points = f"a point every {policy.replica_point_seconds} s" if policy.replica_point_seconds else "no points"
    row(made, "replica", policy.replica if policy.replica == "sealed" else f"{policy.replica}, {points}")
    row(made, "drills", f"every {policy.drill_days} days" if policy.drill_days else "by hand")
    console.print(made)


def _target_data(target: TargetSettings) -> dict[str, Any]:
    return {**target.model_dump(mode="json"), "missing": list(target.missing())}


def _show_target(console: Console, target: TargetSettings) -> None:
    made = table("", "~")
    for name, value in target:
        if name != "version":
            row(made, name.replace("_", " "), value or "-")
    console.print(made)
    if target.missing():
        console.print(f"missing: {', '.join(target.missing())}")


def _show_alerts(console: Console, found: tuple[Alert, ...]) -> None:
    if not found:
        console.print("There are no alerts.")
        return
    made = table("machine", "since", "over", "~")
    for alert in found:
        over = format_moment(alert.cleared_ns) if alert.cleared_ns is not None else "-"
        row(made, alert.machine, format_moment(alert.raised_ns), over, alert.message)
    console.print(made)
