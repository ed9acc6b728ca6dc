"""NBD as clients of other makes speak it: structured replies, what lies where, TLS; and as nobody should."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import socket
import struct
from pathlib import Path

import pytest

from bench.certificates import Certificates
from replicar.errors import CorruptionError, PermanentError
from replicar.nbd.protocol import Handshake, Option, Tls
from replicar.nbd.tls import server_context
from tests.mobility_agent.core import MIB, Core, agent_core, frames_of, replay
from tests.support.tools import need

#: Of the loopback network, but not an address that the product knows to be this machine alone: TLS is required there.
ELSEWHERE = "127.0.0.2"
_IHAVEOPT = 0x49484156454F5054


async def _run(*command: str | Path) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


def _sparse(directory: Path) -> bytes:
    """A disk of 8 MiB with two islands of data."""
    draw, image = random.Random(4), directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
        for place in (MIB, 5 * MIB):
            file.seek(place)
            file.write(draw.randbytes(MIB // 2))
    return image.read_bytes()


# --- structured replies ---


async def test_a_client_is_told_what_lies_where(tmp_path: Path) -> None:
    need("nbdinfo")
    _sparse(tmp_path)
    async with agent_core(tmp_path) as core:
        status, output = await _run("nbdinfo", "--json", "--map", f"nbd+unix:///root?socket={core.socket}")
    assert status == 0, output
    data = [(part["offset"], part["length"]) for part in json.loads(output) if part["type"] == 0]
    assert data == [(MIB, MIB // 2), (5 * MIB, MIB // 2)]


async def test_holes_are_copied_as_holes(tmp_path: Path) -> None:
    need("nbdcopy")
    content = _sparse(tmp_path)
    async with agent_core(tmp_path) as core:
        status, output = await _run("nbdcopy", f"nbd+unix:///root?socket={core.socket}", tmp_path / "copy")
    assert status == 0, output
    assert (tmp_path / "copy").read_bytes() == content
    assert (tmp_path / "copy").stat().st_blocks * 512 < 2 * MIB


async def test_a_read_over_several_holes_comes_whole(tmp_path: Path) -> None:
    need("qemu-img")
    content = _sparse(tmp_path)
    async with agent_core(tmp_path) as core:
        uri = f"nbd+unix:///root?socket={core.socket}"
        status, output = await _run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, tmp_path / "copy")
    assert status == 0, output
    assert (tmp_path / "copy").read_bytes() == content


async def test_a_read_beyond_the_end_says_so_in_words(tmp_path: Path) -> None:
    async with agent_core(tmp_path) as core:
        reader, writer = await asyncio.open_unix_connection(core.socket)
        await reader.readexactly(18)
        writer.write(struct.pack(">I", 3) + _option(Option.STRUCTURED_REPLY) + _option(Option.GO, _go(b"root")))
        reply = await _until_go(reader)
        assert reply
        writer.write(struct.pack(">IHHQQI", 0x25609513, 0, 0, 77, 8 * MIB, 4096))
        magic, flags, kind, handle, length = struct.unpack(">IHHQI", await reader.readexactly(20))
        assert (magic, flags, kind, handle) == (0x668E33EF, 1, 0x8001, 77)
        error, size = struct.unpack(">IH", await reader.readexactly(6))
        assert error == 28
        assert b"8388608" in await reader.readexactly(size)
        assert length == 6 + size
        writer.close()


def _option(option: int, body: bytes = b"") -> bytes:
    return struct.pack(">QII", _IHAVEOPT, option, len(body)) + body


def _go(name: bytes) -> bytes:
    return struct.pack(">I", len(name)) + name + struct.pack(">H", 0)


async def _until_go(reader: asyncio.StreamReader) -> bool:
    while True:
        _, option, kind, length = struct.unpack(">QIII", await reader.readexactly(20))
        await reader.readexactly(length)
        if option == Option.GO and kind == 1:
            return True


# --- TLS ---


def _port() -> int:
    with socket.socket() as probe:
        probe.bind((ELSEWHERE, 0))
        port: int = probe.getsockname()[1]
    return port


class Remote:
    """An authority, what the agent shows, and what a client shows, as libnbd and QEMU want it laid out."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "client"
        self.files = Certificates.make(directory / "server", host=ELSEWHERE)
        self.lay_out(self.files)

    def lay_out(self, shown: Certificates | None) -> None:
        """What the client shows: None for nothing."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        shutil.copy(self.files.authority, self.directory / "ca-cert.pem")
        if shown is not None:
            shutil.copy(shown.certificate, self.directory / "client-cert.pem")
            shutil.copy(shown.key, self.directory / "client-key.pem")

    def uri(self, core: Core, scheme: str = "nbds") -> str:
        host, port = core.capture.addresses["root"]  # type: ignore[misc]
        more = f"?tls-certificates={self.directory}" if scheme == "nbds" else ""
        return f"{scheme}://{host}:{port}/root{more}"

    async def copy(self, core: Core, target: Path, scheme: str = "nbds") -> tuple[int, str]:
        return await _run("nbdcopy", self.uri(core, scheme), target)


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    need("nbdcopy")
    return Remote(tmp_path)


async def test_a_disk_is_written_and_read_over_tls(tmp_path: Path, remote: Remote) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(8).randbytes(3 * MIB).ljust(8 * MIB, b"\0"))
    tls = server_context(remote.files.certificate, remote.files.key, remote.files.authority)
    async with agent_core(tmp_path, address=(ELSEWHERE, _port()), tls=tls) as core:
        status, output = await _run("nbdcopy", "--flush", source, remote.uri(core))
        assert status == 0, output
        status, output = await remote.copy(core, tmp_path / "back")
        assert status == 0, output
        core.log.seal()
        assert replay(frames_of(core.log), core.disk.size_bytes) == source.read_bytes()
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


async def test_qemu_opens_a_disk_over_tls(tmp_path: Path, remote: Remote) -> None:
    need("qemu-io")
    tls = server_context(remote.files.certificate, remote.files.key, remote.files.authority)
    async with agent_core(tmp_path, address=(ELSEWHERE, _port()), tls=tls) as core:
        host, port = core.capture.addresses["root"]  # type: ignore[misc]
        credentials = f"tls-creds-x509,id=tls,dir={remote.directory},endpoint=client,verify-peer=yes"
        where = f"driver=nbd,server.type=inet,server.host={host},server.port={port},export=root,tls-creds=tls"
        status, output = await _run(
            *("qemu-io", "--object", credentials, "--image-opts", where),
            *("-c", "write -P 7 1M 256k", "-c", "flush", "-c", "read -P 7 1M 256k"),
        )
        assert status == 0, output
        assert "verification failed" not in output
        assert core.disk.read(MIB, 512) == b"\7" * 512


@pytest.mark.parametrize("scheme", ["nbd", "nbds"])
async def test_a_client_without_a_certificate_gets_nothing(tmp_path: Path, remote: Remote, scheme: str) -> None:
    tls = server_context(remote.files.certificate, remote.files.key, remote.files.authority)
    remote.lay_out(None)
    async with agent_core(tmp_path, address=(ELSEWHERE, _port()), tls=tls) as core:
        status, _ = await remote.copy(core, tmp_path / "back", scheme)
        assert status != 0


async def test_a_client_of_another_authority_gets_nothing(tmp_path: Path, remote: Remote) -> None:
    tls = server_context(remote.files.certificate, remote.files.key, remote.files.authority)
    remote.lay_out(Certificates.make(tmp_path / "stranger"))
    async with agent_core(tmp_path, address=(ELSEWHERE, _port()), tls=tls) as core:
        status, _ = await remote.copy(core, tmp_path / "back")
        assert status != 0


async def test_on_this_machine_a_plain_client_is_served_beside_it(tmp_path: Path, remote: Remote) -> None:
    tls = server_context(remote.files.certificate, remote.files.key, remote.files.authority)
    content = _sparse(tmp_path)
    async with agent_core(tmp_path, tls=tls) as core:
        status, output = await _run("nbdcopy", f"nbd+unix:///root?socket={core.socket}", tmp_path / "copy")
    assert status == 0, output
    assert (tmp_path / "copy").read_bytes() == content


def test_a_key_that_others_may_read_is_refused(remote: Remote) -> None:
    remote.files.key.chmod(0o644)
    with pytest.raises(PermanentError, match="may be read by others"):
        server_context(remote.files.certificate, remote.files.key, remote.files.authority)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path, remote: Remote) -> None:
    other = Certificates.make(tmp_path / "other")
    with pytest.raises(PermanentError, match="can't be used"):
        server_context(remote.files.certificate, other.key, remote.files.authority)


# --- the handshake, without a socket ---


def _greeted(tls: Tls) -> Handshake:
    handshake = Handshake({"root": MIB, "data": MIB}, tls)
    handshake.receive(struct.pack(">I", 3))
    return handshake


@pytest.mark.parametrize("option", [Option.LIST, Option.INFO, Option.GO, Option.STRUCTURED_REPLY, 99])
def test_where_tls_is_required_nothing_else_is_answered_before_it(option: int) -> None:
    handshake = _greeted(Tls.REQUIRED)
    answer = handshake.receive(_option(option, _go(b"root") if option in (Option.INFO, Option.GO) else b""))
    assert struct.unpack_from(">I", answer, 12) == (0x80000005,)
    assert handshake.chosen is None
    assert b"data" not in answer


def test_the_old_way_to_choose_is_hung_up_on_where_tls_is_required() -> None:
    handshake = _greeted(Tls.REQUIRED)
    assert handshake.receive(_option(Option.EXPORT_NAME, b"root")) == b""
    assert handshake.finished


def test_what_follows_the_wish_for_tls_in_the_clear_is_never_taken() -> None:
    with pytest.raises(CorruptionError):
        _greeted(Tls.REQUIRED).receive(_option(Option.STARTTLS) + _option(Option.GO, _go(b"root")))


def test_what_was_agreed_before_tls_counts_for_nothing_after_it() -> None:
    handshake = _greeted(Tls.OFFERED)
    handshake.receive(_option(Option.STRUCTURED_REPLY))
    handshake.receive(_option(Option.STARTTLS))
    assert handshake.starts_tls
    handshake.secured()
    handshake.receive(_option(Option.GO, _go(b"root")))
    assert handshake.chosen is not None
    assert not handshake.chosen.structured


def test_tls_that_can_not_be_had_is_not_begun() -> None:
    handshake = _greeted(Tls.NONE)
    assert struct.unpack_from(">I", handshake.receive(_option(Option.STARTTLS)), 12) == (0x80000001,)
    assert not handshake.starts_tls


def test_a_context_counts_for_the_disk_it_was_chosen_for() -> None:
    handshake = _greeted(Tls.NONE)
    query = struct.pack(">I", 4) + b"root" + struct.pack(">II", 1, 15) + b"base:allocation"
    handshake.receive(_option(Option.STRUCTURED_REPLY) + _option(Option.SET_META_CONTEXT, query))
    handshake.receive(_option(Option.GO, _go(b"data")))
    assert handshake.chosen is not None
    assert not handshake.chosen.allocation


@pytest.mark.parametrize("seed", range(300))
def test_a_handshake_of_noise_is_refused_or_answered_and_nothing_else(seed: int) -> None:
    draw = random.Random(seed)
    query = struct.pack(">I", 4) + b"root" + struct.pack(">II", 1, 15) + b"base:allocation"
    good = struct.pack(">I", 3) + b"".join(
        _option(draw.choice([*Option, 99]), draw.choice([b"", _go(b"root"), query, draw.randbytes(draw.randrange(40))]))
        for _ in range(6)
    )
    noise = bytearray(good)
    for _ in range(draw.randrange(4)):
        noise[draw.randrange(len(noise))] = draw.randrange(256)
    handshake = Handshake({"root": MIB}, draw.choice(list(Tls)))
    try:
        while noise and handshake.chosen is None and not handshake.finished:
            size = draw.randrange(1, 50)
            handshake.receive(noise[:size])
            del noise[:size]
            if handshake.starts_tls:
                handshake.secured()
    except CorruptionError:
        pass
