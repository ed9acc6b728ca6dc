"""What recovery workers call for upkeep: which machine is due, that it is seen to, and how that went."""

from __future__ import annotations

from functools import partial
from typing import Final

from config_server import upkeep
from config_server.api import Call, Context, Route
from config_server.rights import WORKERS
from replicar.control.messages import UpkeepClaim, UpkeepReceipt, UpkeepRenewal, UpkeepReport, UpkeepTask


async def post_upkeep(context: Context, call: Call) -> UpkeepTask:
    """A machine whose log is to be folded, or whose warm replica is to be brought on, or nothing that is due."""
    request, worker, now_ns = UpkeepClaim.from_json(call.body), call.asking(), context.clock.now_ns()
    return await context.registry.run(partial(upkeep.claim, worker=worker, request=request, now_ns=now_ns))


async def post_upkeep_renewal(context: Context, call: Call) -> UpkeepReceipt:
    """Keep a machine that is being seen to."""
    said, worker, now_ns = UpkeepRenewal.from_json(call.body), call.asking(), context.clock.now_ns()
    return await context.registry.run(partial(upkeep.renew, worker=worker, said=said, now_ns=now_ns))


async def post_upkeep_report(context: Context, call: Call) -> UpkeepReceipt:
    """How a machine's upkeep went, and what retention has left of its past."""
    said, worker, now_ns = UpkeepReport.from_json(call.body), call.asking(), context.clock.now_ns()
    return await context.registry.run(partial(upkeep.report, worker=worker, said=said, now_ns=now_ns))


ROUTES: Final[tuple[Route, ...]] = (
    Route("POST", "/worker/upkeep", post_upkeep, WORKERS, UpkeepClaim),
    Route("POST", "/worker/upkeep/renew", post_upkeep_renewal, WORKERS, UpkeepRenewal),
    Route("POST", "/worker/upkeep/report", post_upkeep_report, WORKERS, UpkeepReport),
)
