"""The API held to its document by schemathesis: what is sent is made of the document, and so is what may come back.

Requests that fit and requests that don't, a few of each operation and the same ones every time, by an operator's
certificate, against the real config server over TLS. None is a server's error; each answer has a status, a type and a
schema that the document tells; and what does not fit is refused.
"""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from requests.adapters import HTTPAdapter
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from config_server.openapi import document
from config_server.routes import ALL
from replicar.control.identity import CONFIG_SERVER_NAME, Identity
from replicar.tls import client_context
from tests.config_server.support import Cast

#: Requests of one operation and of one kind.
EXAMPLES = 4
#: Without an end, or with one that only other parts bring about.
LEFT_OUT = {"get_events", "post_machines_by_name_marks", "post_groups", "post_worker_claim"}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


class Named(HTTPAdapter):
    """Connects to a config server by its address, and expects it to be called as all are."""

    def __init__(self, identity: Identity) -> None:
        self._context = client_context(identity)
        super().__init__()

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **options: Any) -> None:
        options |= {"server_hostname": CONFIG_SERVER_NAME, "assert_hostname": CONFIG_SERVER_NAME}
        super().init_poolmanager(connections, maxsize, block, ssl_context=self._context, **options)


def _operations(told: dict[str, Any]) -> list[Any]:
    results: list[Any] = list(schemathesis.openapi.from_dict(told).get_all_operations())
    found = [result.ok() for result in results]
    return [each for each in found if each.definition.raw["operationId"] not in LEFT_OUT]


def _send(cast: Cast, operations: list[Any], mode: GenerationMode) -> list[int]:
    """Send what is made up, in a thread, since the server is in this one's loop; the statuses of the answers."""
    statuses: list[int] = []
    with requests.Session() as session:
        session.mount("https://", Named(cast.operator.identity))
        for operation in operations:

            @seed(20261125)
            @settings(
                max_examples=EXAMPLES,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(operation.as_strategy(generation_mode=mode))
            def sent(case: Case[Any]) -> None:
                answer = case.call(base_url=f"https://{cast.house.address}", session=session)
                statuses.append(answer.status_code)
                case.validate_response(answer, checks=CHECKS)

            try:
                sent()
            except Unsatisfiable:  # of an operation that is asked nothing there is nothing that does not fit
                assert mode is GenerationMode.NEGATIVE
    return statuses


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: str(mode.value))
async def test_whatever_is_sent_the_answer_is_one_that_the_document_tells(
    protected: Cast, mode: GenerationMode
) -> None:
    operations = _operations(document(ALL))
    statuses = await asyncio.to_thread(_send, protected, operations, mode)
    assert len(operations) == len(ALL) - len(LEFT_OUT)
    if mode is GenerationMode.POSITIVE:
        assert len(statuses) >= len(operations)
        assert 200 in statuses
    else:
        assert 400 in statuses


async def test_an_answer_that_the_document_does_not_tell_is_noticed(protected: Cast) -> None:
    told = copy.deepcopy(document(ALL))
    told["components"]["schemas"]["MachineList"]["required"] = ["what nobody says"]
    (listing,) = (each for each in _operations(told) if each.definition.raw["operationId"] == "get_machines")
    with pytest.raises(FailureGroup, match="what nobody says"):
        await asyncio.to_thread(_send, protected, [listing], GenerationMode.POSITIVE)
