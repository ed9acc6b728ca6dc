"""`replicar replica`, from the outside, on a real Azurite."""

from __future__ import annotations

from replicar.formats import vhd
from replicar.storage import PageBlobStore
from tests.cli.conftest import Operator, Stored


async def test_it_is_made_brought_on_and_says_how_far_behind_it_is(
    operator: Operator, stored: Stored, store: PageBlobStore
) -> None:
    nothing = await operator("replica", "status", "db1", "--json")
    assert (nothing.status, nothing.json["phase"]) == (1, None)
    point = stored.points["point-5"]
    made = await operator("replica", "run", "db1", "--once", "--point", "point-5", "--json")
    assert (made.status, made.json["full"], made.json["sequence"]) == (0, True, point), made.output
    status = (await operator("replica", "status", "db1", "--json")).json
    assert (status["phase"], status["behind_sequences"]) == ("applied", stored.points["point-7"] - point)
    brought_on = await operator("replica", "run", "db1", "--once", "--json")
    assert (brought_on.json["full"], brought_on.json["sequence"]) == (False, stored.points["point-7"])
    for index, content in stored.builder.expected[stored.points["point-7"]].items():
        name = f"replicas/{stored.builder.machine_id}/{index}.vhd"
        data = await store.read(name, 0, (await store.properties(name)).size_bytes)
        assert data[: len(content)] == content
        assert vhd.read_footer(data[-512:]).virtual_bytes == len(data) - 512
    back = await operator("replica", "run", "db1", "--once", "--point", "point-5", "--json")
    assert (back.status, back.json["error"]) == (5, "ConflictError")
    refused = await operator("replica", "run", "db1", "--point", "point-5", "--json")
    assert "--once" in refused.json["hint"]
