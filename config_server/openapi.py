"""The API's own document, OpenAPI 3.1, made of the routes and the messages, so that it can't be out of step with them.

It is served at /v1/openapi.json and kept as docs/openapi.json:

    python -m config_server.openapi > docs/openapi.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import Any, Final, Literal

from pydantic.json_schema import models_json_schema

from config_server.api import Call, Context, Route
from replicar.control.event_stream import MEDIA_TYPE
from replicar.control.message import Message
from replicar.control.messages import API_PREFIX, ApiDocument

_REFERENCE: Final = "#/components/schemas/{model}"
_ERROR: Final = {
    "type": "object",
    "description": "An error of replicar/errors.py: its class, what happened, what to do next, and facts as fields.",
    "properties": {"error": {"type": "string"}, "message": {"type": "string"}, "hint": {"type": "string"}},
    "required": ["error", "message", "hint"],
    "additionalProperties": True,
}
_TEXT: Final = {"type": "string"}
_FLAG: Final = {"type": "string", "enum": ["yes", "no"]}
#: What a name in a query may hold, where that is not any text.
_QUERIES: Final = {
    "going": _FLAG,
    "lasting": _FLAG,
    "wait": {"type": "string", "enum": ["", "stored"]},
    "before": {"type": "string", "pattern": "^[0-9]{1,18}$"},
}
_ABOUT: Final = """The API of a Replicar config server. The vault's own authority vouches for the server, whose name is
`config-server.replicar`; callers show a certificate of that authority, or a bearer token."""


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """The document of these routes."""
    routes = sorted(routes, key=lambda route: (route.path, route.method))
    wanted: dict[tuple[type[Message], Literal["validation", "serialization"]], None] = {}
    for route in routes:
        wanted[route.reply, "serialization"] = None
        if route.request is not None:
            wanted[route.request, "validation"] = None
    references, schemas = models_json_schema(list(wanted), ref_template=_REFERENCE)
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(API_PREFIX + route.path, {})[route.method.lower()] = _operation(route, references)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Replicar config server", "version": API_PREFIX.strip("/"), "description": _ABOUT},
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {
                "certificate": {"type": "mutualTLS"},
                "token": {"type": "http", "scheme": "bearer", "description": "made by `replicar token create`"},
            },
        },
    }


def route_of_document(routes: tuple[Route, ...]) -> Route:
    """The route that serves the document of these routes and itself."""
    found: list[ApiDocument] = []

    async def get_openapi(context: Context, call: Call) -> ApiDocument:
        """This document."""
        return found[0]

    route = Route("GET", "/openapi.json", get_openapi, None)
    found.append(ApiDocument.model_validate(document((*routes, route))))
    return route


def _operation(route: Route, references: dict[Any, Any]) -> dict[str, Any]:
    about = (route.handler.__doc__ or "").strip()
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    parameters += [{"name": name, "in": "query", "schema": _QUERIES.get(name, _TEXT)} for name in route.query]
    parameters += [{"name": name, "in": "header", "schema": _TEXT} for name in route.headers]
    media = MEDIA_TYPE if route.streams else "application/json"
    operation: dict[str, Any] = {
        "operationId": _identifier(route),
        "summary": about.partition("\n")[0],
        "parameters": parameters,
        "responses": {
            "200": {
                "description": "events without end; the data of each is one of these" if route.streams else "as asked",
                "content": {media: {"schema": references[route.reply, "serialization"]}},
            },
            "default": {
                "description": "refused, or not possible now",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
        "security": [],
    }
    if route.request is not None:
        schema = references[route.request, "validation"]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if route.roles is not None:
        operation["security"] = [{"certificate": []}, {"token": []}]
        operation["description"] = f"For: {', '.join(sorted(route.roles))}."
    return operation


def _identifier(route: Route) -> str:
    words = re.findall(r"\w+", route.path.replace("{", "by_").replace("}", ""))
    return "_".join([route.method.lower(), *words]).replace("-", "_")


def as_text(routes: Iterable[Route]) -> str:
    """The document as it is kept."""
    return json.dumps(document(routes), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    from config_server.routes import ALL

    sys.stdout.write(as_text(ALL))
