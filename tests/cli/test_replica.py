"""`replicar replica`, from the outside, on a real Azurite."""

from __future__ import annotations

from pathlib import Path

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


async def test_its_points_are_snapshots_that_hold_what_recover_gives(
    operator: Operator, stored: Stored, store: PageBlobStore, tmp_path: Path
) -> None:
    none = await operator("replica", "points", "db1")
    assert "no earlier points" in none.output
    wanted = []
    for name in ("point-2", "point-4"):
        made = await operator(
            *("replica", "run", "db1", "--once", "--point", name, "--points-every", "0.000001", "--json")
        )
        assert made.status == 0, made.output
        wanted.append(made.json["sequence"])
    assert (await operator("replica", "run", "db1", "--once", "--json")).status == 0  # the blobs go on; none is due
    points = (await operator("replica", "points", "db1", "--json")).json["points"]
    assert [point["sequence"] for point in points] == wanted
    shown = (await operator("replica", "points", "db1")).output
    for point in points:
        assert str(point["sequence"]) in shown
        assert [each["disk"] for each in point["snapshots"]] == [0, 1]
        for each in point["snapshots"]:
            size = (await store.properties(each["blob"])).size_bytes
            held = await store.read_snapshot(each["blob"], each["snapshot"], 0, size)
            raw = tmp_path / f"{point['sequence']}-{each['disk']}.img"
            recovered = await operator(
                *("recover", "db1", "--sequence", point["sequence"], "--disk", f"disk{each['disk']}", "--raw", raw)
            )
            assert recovered.status == 0, recovered.output
            content = raw.read_bytes()
            assert held[: len(content)] == content
            assert held[len(content) : -512] == bytes(len(held) - 512 - len(content))
            assert vhd.read_footer(held[-512:]).virtual_bytes == size - 512
            assert content != await store.read(each["blob"], 0, len(content)), "the blob has gone on"
