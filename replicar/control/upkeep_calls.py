"""Upkeep over the config server's API, as recovery workers ask and tell it; a part of `ControlClient`."""

from __future__ import annotations

from replicar.control.caller import Caller
from replicar.control.messages import UpkeepClaim, UpkeepReceipt, UpkeepRenewal, UpkeepReport, UpkeepTask


class UpkeepCalls(Caller):
    """What a recovery worker says of the machines that it keeps up."""

    async def upkeep(self, request: UpkeepClaim) -> UpkeepTask:
        """A machine that is due, if there is one."""
        return await self._post("/worker/upkeep", request, UpkeepTask)

    async def renew_upkeep(self, renewal: UpkeepRenewal) -> UpkeepReceipt:
        """Keep a machine that is being seen to.

        Raises:
            FencedError: another worker has it by now.
        """
        return await self._post("/worker/upkeep/renew", renewal, UpkeepReceipt)

    async def report_upkeep(self, report: UpkeepReport) -> UpkeepReceipt:
        """Say how it went; again: changes nothing."""
        return await self._post("/worker/upkeep/report", report, UpkeepReceipt)
