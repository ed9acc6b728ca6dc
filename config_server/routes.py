"""All routes of the API, and the one that tells of them."""

from __future__ import annotations

from typing import Final

from config_server import (
    access_routes,
    event_routes,
    job_routes,
    operator_routes,
    part_routes,
    policy_routes,
    upkeep_routes,
)
from config_server.api import Route
from config_server.openapi import route_of_document

_OWN: Final[tuple[Route, ...]] = (
    *part_routes.ROUTES,
    *operator_routes.ROUTES,
    *policy_routes.ROUTES,
    *job_routes.ROUTES,
    *event_routes.ROUTES,
    *upkeep_routes.ROUTES,
    *access_routes.ROUTES,
)
ALL: Final[tuple[Route, ...]] = (*_OWN, route_of_document(_OWN))
