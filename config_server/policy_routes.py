"""What operators call about policies, target settings and alerts."""

from __future__ import annotations

import sqlite3
import uuid
from typing import Final

from config_server import alerts, parties, policies
from config_server.api import Call, Context, Route
from config_server.bells import Topic
from config_server.jobs import own
from config_server.rights import OPERATORS, READERS
from replicar.control.messages import (
    AlertList,
    Policy,
    PolicyAssignment,
    PolicyChange,
    PolicyList,
    TargetChange,
    TargetSettings,
)


async def get_policies(context: Context, call: Call) -> PolicyList:
    """All policies, each in its newest version."""
    return PolicyList(policies=await context.registry.run(policies.listed))


async def get_policy(context: Context, call: Call) -> Policy:
    """One policy, in its newest version."""
    return await context.registry.run(lambda connection: policies.named(connection, call.names["name"]))


async def put_policy(context: Context, call: Call) -> Policy:
    """Make a policy, or a new version of one."""
    request, name, now_ns = PolicyChange.from_json(call.body), call.names["name"], context.clock.now_ns()

    def change(connection: sqlite3.Connection) -> tuple[Policy, tuple[uuid.UUID, ...]]:
        policy = policies.change(connection, name, request, now_ns)
        parties.audit(connection, call.asking().id, "policy", f"{name}, version {policy.version}", now_ns)
        return policy, policies.machines_under(connection, name)

    policy, machine_ids = await context.registry.run(change)
    for machine_id in machine_ids:
        context.bells.ring(Topic.INSTRUCTIONS, machine_id)
    return policy


async def get_machine_policy(context: Context, call: Call) -> Policy:
    """The policy that a machine is protected by."""
    name = call.names["name"]
    return await context.registry.run(lambda c: policies.of_machine(c, parties.machine_named(c, name).id))


async def put_machine_policy(context: Context, call: Call) -> Policy:
    """Give a machine another policy."""
    request, name, now_ns = PolicyAssignment.from_json(call.body), call.names["name"], context.clock.now_ns()

    def change(connection: sqlite3.Connection) -> tuple[Policy, uuid.UUID]:
        machine = parties.machine_named(connection, name)
        policy = policies.assign(connection, machine, request.policy)
        parties.audit(connection, call.asking().id, "policy", f"{policy.name} for machine {name}", now_ns)
        return policy, machine.id

    policy, machine_id = await context.registry.run(change)
    context.bells.ring(Topic.INSTRUCTIONS, machine_id)
    return policy


async def get_target(context: Context, call: Call) -> TargetSettings:
    """What a machine is to be made of on the other side."""
    name = call.names["name"]
    return await context.registry.run(lambda c: policies.target_of(c, parties.machine_named(c, name).id))


async def put_target(context: Context, call: Call) -> TargetSettings:
    """Decide what a machine is to be made of on the other side."""
    request, name, now_ns = TargetChange.from_json(call.body), call.names["name"], context.clock.now_ns()

    def change(connection: sqlite3.Connection) -> TargetSettings:
        machine = parties.machine_named(connection, name)
        target = policies.change_target(connection, machine, request)
        parties.audit(connection, call.asking().id, "target", f"machine {name}, version {target.version}", now_ns)
        own.advance(connection, machine.id, now_ns)
        return target

    return await context.registry.run(change)


async def get_alerts(context: Context, call: Call) -> AlertList:
    """Alerts, newest first; `?lasting=yes` for those that are not over."""
    lasting = call.flag("lasting")
    return AlertList(alerts=await context.registry.run(lambda c: alerts.listed(c, lasting_only=lasting)))


ROUTES: Final[tuple[Route, ...]] = (
    Route("GET", "/policies", get_policies, READERS),
    Route("GET", "/policies/{name}", get_policy, READERS),
    Route("PUT", "/policies/{name}", put_policy, OPERATORS, PolicyChange),
    Route("GET", "/machines/{name}/policy", get_machine_policy, READERS),
    Route("PUT", "/machines/{name}/policy", put_machine_policy, OPERATORS, PolicyAssignment),
    Route("GET", "/machines/{name}/target", get_target, READERS),
    Route("PUT", "/machines/{name}/target", put_target, OPERATORS, TargetChange),
    Route("GET", "/alerts", get_alerts, READERS, query=("lasting",)),
)
