"""Policies, target settings and alerts over the config server's API; a part of `ControlClient`."""

from __future__ import annotations

from urllib.parse import quote

from replicar.control.caller import Caller, machine_path
from replicar.control.messages import (
    Alert,
    AlertList,
    Policy,
    PolicyAssignment,
    PolicyChange,
    PolicyList,
    TargetChange,
    TargetSettings,
)


class PolicyCalls(Caller):
    """What an operator asks about how machines are protected."""

    async def policies(self) -> tuple[Policy, ...]:
        return (await self._get("/policies", PolicyList)).policies

    async def policy(self, name: str) -> Policy:
        return await self._get(f"/policies/{quote(name, safe='')}", Policy)

    async def set_policy(self, policy: Policy, *, base_version: int) -> Policy:
        """Make a policy, or a new version of one.

        Raises:
            ConflictError: somebody changed it since `base_version`.
            PermanentError: it contradicts itself.
        """
        change = PolicyChange(policy=policy, base_version=base_version)
        return await self._put(f"/policies/{quote(policy.name, safe='')}", change, Policy)

    async def machine_policy(self, machine: str) -> Policy:
        return await self._get(f"{machine_path(machine)}/policy", Policy)

    async def assign_policy(self, machine: str, policy: str) -> Policy:
        return await self._put(f"{machine_path(machine)}/policy", PolicyAssignment(policy=policy), Policy)

    async def target(self, machine: str) -> TargetSettings:
        return await self._get(f"{machine_path(machine)}/target", TargetSettings)

    async def set_target(self, machine: str, target: TargetSettings, *, base_version: int) -> TargetSettings:
        """Decide what the machine is to be made of.

        Raises:
            ConflictError: somebody changed it since `base_version`.
        """
        change = TargetChange(target=target, base_version=base_version)
        return await self._put(f"{machine_path(machine)}/target", change, TargetSettings)

    async def alerts(self, *, lasting_only: bool = False) -> tuple[Alert, ...]:
        """Alerts, newest first."""
        query = {"lasting": "yes"} if lasting_only else {}
        return (await self._get("/alerts", AlertList, query=query)).alerts
