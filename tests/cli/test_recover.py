"""`replicar recover` and `replicar verify`, from the outside: files, blobs, words and exit statuses."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from azure.storage.blob.aio import BlobServiceClient

from replicar.control.files import write_file
from replicar.formats import vhd
from replicar.moments import format_moment
from replicar.storage import PageBlobStore
from simulator.azurite import Azurite
from tests.cli.conftest import Operator, Stored


def disk(stored: Stored, point: str, index: int = 0) -> bytes:
    return stored.builder.expected[stored.points[point]][index]


async def flip(stored: Stored, number: int, at: int) -> None:
    blob, offset, _ = stored.builder.placed[number]
    page = (offset + at) // 512 * 512
    data = bytearray(await stored.builder.store.read(blob, page, 512))
    data[offset + at - page] ^= 1
    await stored.builder.store.put_pages(blob, page, bytes(data))


async def test_a_named_point_becomes_a_raw_file(operator: Operator, stored: Stored, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    ended = await operator("recover", "db1", "--point", "point-3", "--disk", "disk0", "--raw", path, "--json")
    assert ended.status == 0, ended.output
    assert path.read_bytes() == disk(stored, "point-3")
    assert ended.json["sequence"] == stored.points["point-3"]
    assert ended.json["disks"][0]["target"] == str(path)


async def test_an_instant_between_two_changes_becomes_vhd_files_of_all_disks(
    operator: Operator, stored: Stored, tmp_path: Path
) -> None:
    sequence = stored.points["point-5"] - 3
    moment = format_moment(stored.builder.times[sequence] + 1000)
    ended = await operator("recover", "db1", "--at", moment, "--all", "--vhd", tmp_path / "{disk}.vhd", "--json")
    assert ended.status == 0, ended.output
    for index, content in stored.builder.expected[sequence].items():
        data = (tmp_path / f"disk{index}.vhd").read_bytes()
        assert data[: len(content)] == content
        assert vhd.read_footer(data[-512:]).virtual_bytes == len(data) - 512


async def test_an_idle_machine_is_recovered_to_any_instant_up_to_its_last_report(
    operator: Operator, stored: Stored, tmp_path: Path
) -> None:
    builder, house = stored.builder, stored.cast.house
    last = builder.sequence - 1
    moment = builder.times[last] + 60 * 10**9
    words = ("recover", "db1", "--at", moment, "--disk", "disk0", "--raw", tmp_path / "disk.raw", "--json")
    refused = await operator(*words)
    assert refused.status == 1
    assert "lies after the log" in refused.json["message"]
    report = house.machine_heartbeat(stored_sequence=last, stored_until_ns=moment)
    await stored.cast.machine.agent_heartbeat(report)
    ended = await operator(*words)
    assert ended.status == 0, ended.output
    assert ended.json["sequence"] == last
    assert (tmp_path / "disk.raw").read_bytes() == disk(stored, "point-7")


async def test_the_latest_state_becomes_a_vhd_in_a_page_blob(
    operator: Operator, stored: Stored, store: PageBlobStore, tmp_path: Path
) -> None:
    ended = await operator("recover", "db1", "--latest", "--disk", "disk1", "--blob", "restored/{disk}.vhd")
    assert ended.status == 0, ended.output
    assert "restored/disk1.vhd" in ended.output
    content = disk(stored, "point-7", 1)
    info = await store.properties("restored/disk1.vhd")
    data = await store.read(info.name, 0, info.size_bytes)
    assert data[: len(content)] == content
    assert vhd.read_footer(data[-512:]).virtual_bytes == info.size_bytes - 512
    again = await operator("recover", "db1", "--latest", "--disk", "disk1", "--blob", "restored/{disk}.vhd")
    assert again.status == 1
    assert "is there already" in again.errors
    assert "--replace" in again.errors


async def test_another_container_takes_the_vhd(operator: Operator, stored: Stored) -> None:
    name = f"{stored.target.container}-out"
    words = ["recover", "db1", "--sequence", stored.points["point-1"], "--disk", "disk1", "--blob", "d.vhd"]
    ended = await operator(*words, "--container", name, "--json")
    assert ended.status == 0, ended.output
    assert (await operator(*words, "--container", "No Container", "--json")).status == 1


#: Words of a command that can't be meant, what the error says, and what its hint names.
NONSENSE = (
    (("--latest",), "where to recover to", "--raw FILE"),
    (("--raw", "x"), "say which point", "--at TIME"),
    (("--latest", "--point", "p", "--raw", "x"), "more than one point", "exactly one"),
    (("--latest", "--raw", "x"), "say which disk", "disk0, disk1"),
    (("--latest", "--disk", "root", "--raw", "x"), "no disk 'root'", "disk0, disk1"),
    (("--latest", "--all", "--raw", "x"), "can't all be written to x", "{disk}"),
    (("--at", "noon", "--raw", "x"), "'noon' is no moment", "2026-11-22"),
    (("--point", "point", "--disk", "disk0", "--raw", "x"), "no point named 'point'", "point-"),
)


async def test_what_can_not_be_meant_is_refused_with_what_can(operator: Operator, stored: Stored) -> None:
    for words, message, hint in NONSENSE:
        ended = await operator("recover", "db1", *words, "--json")
        assert ended.status == 1
        assert message in ended.json["message"]
        assert hint in ended.json["hint"]
    assert not Path("x").exists()


async def test_an_unknown_machine_is_named_in_the_error(operator: Operator, stored: Stored) -> None:
    for command in (("recover", "db2", "--latest", "--raw", "x"), ("verify", "db2"), ("points", "db2")):
        ended = await operator(*command)
        assert ended.status == 1
        assert "db2" in ended.errors
        assert "next step:" in ended.errors
        assert "Traceback" not in ended.errors


async def test_a_sound_log_verifies(operator: Operator, stored: Stored) -> None:
    ended = await operator("verify", "db1", "--json")
    assert ended.status == 0, ended.output
    assert ended.json["sound"] is True
    assert (ended.json["segments"], ended.json["stored_number"]) == (8, 8)
    shown = await operator("verify", "db1")
    assert "sound" in shown.output


async def test_a_flipped_bit_makes_verify_say_where_and_end_with_another_status(
    operator: Operator, stored: Stored
) -> None:
    await flip(stored, 4, 250)
    ended = await operator("verify", "db1", "--json")
    assert ended.status == 3
    (problem,) = ended.json["problems"]
    assert (problem["number"], problem["blob"]) == (4, stored.builder.placed[4][0])
    shown = await operator("verify", "db1")
    assert shown.status == 3
    assert "chunk 0 of segment 4" in shown.output


async def test_a_truncated_log_is_not_taken_for_the_latest_state(
    operator: Operator, stored: Stored, tmp_path: Path
) -> None:
    blob, offset, length = stored.builder.placed[8]
    await stored.builder.store.clear_pages(blob, offset, length)
    ended = await operator("recover", "db1", "--latest", "--disk", "disk0", "--raw", tmp_path / "disk.raw", "--json")
    assert ended.status == 3
    assert "segment 8 was reported as stored" in ended.json["message"]
    assert not (tmp_path / "disk.raw").exists()
    path = tmp_path / "earlier.raw"
    assert (await operator("recover", "db1", "--point", "point-6", "--disk", "disk0", "--raw", path)).status == 0
    assert path.read_bytes() == disk(stored, "point-6")
    assert (await operator("verify", "db1")).status == 3


async def test_a_deleted_container_is_an_error_that_names_it(
    operator: Operator, stored: Stored, azurite: Azurite, tmp_path: Path
) -> None:
    credential = {"account_name": azurite.account_name, "account_key": azurite.account_key}
    trust = str(azurite.authority_file)
    async with BlobServiceClient(azurite.blob_endpoint, credential, connection_verify=trust) as service:
        await service.delete_container(stored.target.container)
    recover = ("recover", "db1", "--latest", "--disk", "disk0", "--raw", tmp_path / "disk.raw")
    for command in (recover, ("verify", "db1")):
        ended = await operator(*command, "--json")
        assert ended.status == 1
        assert stored.target.container in ended.json["message"]
        assert ended.json["hint"]


async def test_the_vaults_key_is_enough_when_the_config_server_is_gone(
    operator: Operator, stored: Stored, tmp_path: Path
) -> None:
    settings = operator.settings.read_text().replace(stored.cast.house.address, "127.0.0.1:1")
    operator.settings.write_text(settings)
    key_file, path = stored.cast.house.directory / "vault.key", tmp_path / "disk.raw"
    rescue = ("--vault-key-file", key_file, "--machine-id", stored.builder.machine_id)
    listed = await operator("points", "db1", *rescue, "--json")
    assert listed.json["points"][0]["name"] == "point-7"
    ended = await operator("recover", "db1", "--point", "point-7", "--disk", "disk0", "--raw", path, *rescue, "--json")
    assert ended.status == 0, ended.output
    assert path.read_bytes() == disk(stored, "point-7")
    assert (await operator("verify", "db1", *rescue)).status == 0
    without_id = await operator("verify", "db1", *rescue[:2], "--json")
    assert "--machine-id" in without_id.json["hint"]


async def test_another_vaults_key_is_refused(operator: Operator, stored: Stored, tmp_path: Path) -> None:
    write_file(tmp_path / "other.key", os.urandom(32))
    rescue = ("--vault-key-file", tmp_path / "other.key", "--machine-id", stored.builder.machine_id)
    ended = await operator("verify", "db1", *rescue, "--json")
    assert ended.status == 1
    assert "does not open the data key" in ended.json["message"]
    write_file(tmp_path / "short.key", b"short")
    short = await operator("verify", "db1", "--vault-key-file", tmp_path / "short.key", *rescue[2:], "--json")
    assert "is 5 bytes, not 32" in short.json["message"]


async def test_as_a_process_it_prints_one_json_object_and_ends_with_the_errors_status(
    operator: Operator, stored: Stored, tmp_path: Path
) -> None:
    async def command(*words: object) -> tuple[int | None, bytes, bytes]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "replicar.cli", *(str(word) for word in words)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "REPLICAR_SETTINGS": str(operator.settings)},
        )
        output, errors = await process.communicate()
        return process.returncode, output, errors

    path = tmp_path / "disk.raw"
    words = ("recover", "db1", "--point", "point-2", "--disk", "disk0", "--raw", path, "--json")
    status, output, errors = await command(*words)
    assert (status, errors) == (0, b"")
    assert json.loads(output)["sequence"] == stored.points["point-2"]
    assert path.read_bytes() == disk(stored, "point-2")
    status, output, errors = await command(*words)
    assert (status, errors) == (1, b"")
    assert json.loads(output)["path"] == str(path)
    operator.settings.write_text(operator.settings.read_text().replace(stored.cast.house.address, "127.0.0.1:1"))
    status, output, errors = await command("verify", "db1")
    assert (status, output) == (75, b"")
    assert b"127.0.0.1:1" in errors
    assert b"next step:" in errors
