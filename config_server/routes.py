"""All routes of the API, in the order in which its document has them."""

from __future__ import annotations

from typing import Final

from config_server import job_routes, operator_routes, part_routes, policy_routes
from config_server.api import Route

ALL: Final[tuple[Route, ...]] = (
    *part_routes.ROUTES,
    *operator_routes.ROUTES,
    *policy_routes.ROUTES,
    *job_routes.ROUTES,
)
