"""The API's document: it is current, it is true, and whatever is sent by it or against it is answered and never a 500.

The requests are made up from the document's own schemas by hypothesis: values that fit, and values that don't.
"""

from __future__ import annotations

import json
import re
import ssl
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st

from config_server.openapi import as_text, document
from config_server.routes import ALL
from replicar.control.identity import CONFIG_SERVER_NAME
from replicar.control.messages import JobKind
from replicar.tls import client_context
from tests.config_server.support import Cast

DOCUMENT = document(ALL)
KEPT = Path(__file__).resolve().parents[2] / "docs" / "openapi.json"
#: Requests of one operation; all of them together take a few seconds.
EXAMPLES = 6
#: Not by an operator's certificate, or with an end that a test can't have.
LEFT_OUT = {"post_certificates", "post_worker_claim", "post_groups", "post_machines_by_name_marks", "get_events"}


def test_the_document_that_is_kept_is_current() -> None:
    assert KEPT.read_text() == as_text(ALL), "python -m config_server.openapi > docs/openapi.json"


def test_every_operation_has_a_name_of_its_own_a_summary_and_schemas_that_are_there() -> None:
    operations = [operation for path in DOCUMENT["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(names) == len(set(names)) == len(ALL)
    assert all(operation["summary"] for operation in operations)
    for reference in re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(DOCUMENT)):
        assert reference in DOCUMENT["components"]["schemas"]


@pytest.mark.parametrize("route", ALL, ids=lambda route: f"{route.method} {route.path}")
def test_a_handlers_body_is_the_one_that_the_document_tells(route: Any) -> None:
    read = re.findall(r"(\w+)\.from_json\(call\.body", _source(route.handler))
    helpers = {"post_hold": ["HoldRequest"], "post_release": ["HoldRequest"]}
    expected = helpers.get(route.handler.__name__, read)
    assert [route.request.__name__ if route.request is not None else None] == (expected or [None])
    for name in re.findall(r"call\.(?:query\.get|flag)\(\"(\w+)\"", _source(route.handler)):
        assert name in route.query or "{name}" in route.path


def _source(handler: Any) -> str:
    import inspect

    return inspect.getsource(handler)


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that fit a schema of the document, as far as this vocabulary goes."""
    if "$ref" in schema:
        return st.deferred(lambda: values(DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]))
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([values(each) for each in schema["anyOf"]])
    kind = schema.get("type")
    if kind == "object":
        return _objects(schema)
    if kind == "array":
        if "prefixItems" in schema:
            return st.tuples(*map(values, schema["prefixItems"])).map(list)
        fewest = schema.get("minItems", 0)
        return st.lists(values(schema["items"]), min_size=fewest, max_size=min(schema.get("maxItems", 3), fewest + 2))
    if kind == "string":
        if schema.get("format") == "uuid":
            return st.uuids().map(str)
        if "pattern" in schema:
            return st.from_regex(re.compile(schema["pattern"], re.ASCII), fullmatch=True)
        return st.text(min_size=schema.get("minLength", 0), max_size=min(schema.get("maxLength", 20), 40))
    if kind == "integer":
        return st.integers(schema.get("minimum", 0), schema.get("maximum", 2**63 - 1))
    if kind == "number":
        return st.floats(schema.get("minimum", 0), schema.get("maximum", 1e9), allow_nan=False)
    return {"boolean": st.booleans(), "null": st.none()}.get(str(kind), st.none())


def _objects(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    wanted = set(schema.get("required", ()))
    fields = {name: values(each) for name, each in schema.get("properties", {}).items()}
    return st.fixed_dictionaries(
        {name: each for name, each in fields.items() if name in wanted},
        optional={name: each for name, each in fields.items() if name not in wanted},
    )


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def requests(path: str, operation: dict[str, Any]) -> st.SearchStrategy[tuple[str, Any]]:
    """Paths (sometimes of what is there) with bodies that fit, nearly fit, or don't."""
    known = {"name": st.sampled_from(["db1", "default", "nobody"]) | st.text(min_size=1, max_size=12)}
    parts = {name: known.get(name, st.uuids().map(str) | st.text(min_size=1)) for name in re.findall(r"{(\w+)}", path)}
    body: st.SearchStrategy[Any] = st.none()
    if "requestBody" in operation:
        fits = values(operation["requestBody"]["content"]["application/json"]["schema"])
        body = fits | fits | ANYTHING
    return st.tuples(
        st.fixed_dictionaries(parts).map(
            lambda found: path.format(**{name: quote(value, safe="") for name, value in found.items()})
        ),
        body,
    )


OPERATIONS = [
    (method, path, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
    if operation["operationId"] not in LEFT_OUT
]


def samples(path: str, operation: dict[str, Any]) -> list[tuple[str, Any]]:
    """A few requests of one operation, the same ones every time."""
    found: list[tuple[str, Any]] = []

    @seed(20261125)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests(path, operation))
    def collect(request: tuple[str, Any]) -> None:
        found.append(request)

    collect()
    return found


async def test_whatever_is_sent_is_answered_as_the_document_says(protected: Cast) -> None:
    """Each operation with a few requests, by an operator's certificate."""
    sent = [(method, path, *request) for method, path, operation in OPERATIONS for request in samples(path, operation)]
    context: ssl.SSLContext = client_context(protected.operator.identity)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        for method, path, filled, body in sent:
            data = json.dumps(body).encode() if body is not None else b""
            url = f"https://{protected.house.address}{filled}"
            async with session.request(
                method.upper(), yarl(url), data=data, server_hostname=CONFIG_SERVER_NAME, allow_redirects=False
            ) as answer:
                said = json.loads(await answer.read())
                what = f"{method} {filled} {data[:300]!r} was answered {answer.status} {said}"
                assert answer.status < 500 or answer.status in (503, 504), what
                assert answer.content_type == "application/json", what
                if answer.status == 200:
                    _reply_of(method, path).from_json(json.dumps(said).encode())
                else:
                    assert {"error", "message", "hint"} <= said.keys(), what
    assert len(sent) >= len(OPERATIONS) == len(ALL) - len(LEFT_OUT)
    assert (await protected.operator.job((await protected.operator.jobs("db1")).jobs[-1].id)).kind is JobKind.ENABLE


def yarl(url: str) -> Any:
    """An address as it is: nothing decoded, nothing put in order."""
    from yarl import URL

    return URL(url, encoded=True)


def _reply_of(method: str, path: str) -> Any:
    (route,) = [each for each in ALL if each.method.lower() == method and f"/v1{each.path}" == path]
    return route.reply


def test_ids_of_the_document_are_those_that_clients_choose() -> None:
    pattern = DOCUMENT["components"]["schemas"]["JobRequest"]["properties"]["id"]["pattern"]
    assert re.search(pattern, str(uuid.uuid4()))
