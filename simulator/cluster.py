"""A cluster on one machine: Azurite, config server, process server and agent, each a real process by its real command.

It serves the demo, the tests and the benchmarks alike. Everything lies below one directory, every port is a free one,
and every part can be started, stopped politely or killed at any time, as often as one likes:

    async with Cluster(directory, disks={"root": image}) as cluster:
        await cluster.start()                     # storage, vault, enrolments, all parts
        await cluster.protect()
        ... cluster.process_server.kill(); await cluster.start_process_server() ...
        await cluster.replicar("recover", cluster.machine, "--latest", "--disk", "root", "--raw", path)

Leaving the context kills what still runs and removes the sockets; the directory is the caller's.

Weak: a free port was free when it was looked for; the parts that must be told their port beforehand could lose it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from azure.storage.blob.aio import BlobServiceClient
from pydantic import SecretStr

from mobility_agent.capture.fuse import session
from replicar.control.client import ControlClient
from replicar.control.identity import Identity
from replicar.storage.store import PageBlobStore
from replicar.storage.target import StorageTarget, open_store
from simulator import command
from simulator.azurite import Azurite
from simulator.child import Child, watch
from simulator.command import Result

#: From the start of a part until it serves; generous, since tests share two cores.
READY_SECONDS: Final = 60.0
HEARTBEAT_SECONDS: Final = 1.0
MIB: Final = 1 << 20


class Cluster:
    """The parts and their places; see the module. Attributes `config_server`, `process_server`, `agent` are children.

    Args:
        directory: made if need be; takes everything but the sockets.
        disks: name to raw image of each disk that the machine has; or to block device, where the agent settings say
            that its capture is "trace"; "scan" takes either.
        agent_settings, process_server_settings, config_server_settings: what to set besides, or instead of, what is
            set here.
        in_memory: whether Azurite keeps its blobs in memory.
        agent_program: the words that start the agent, where it is not the one of this tree.
        files: by disk, what it is shown as besides.
    """

    machine: Final = "shop"
    container: Final = "replicar"

    def __init__(
        self,
        directory: Path,
        *,
        disks: Mapping[str, Path],
        agent_settings: Mapping[str, Any] | None = None,
        process_server_settings: Mapping[str, Any] | None = None,
        config_server_settings: Mapping[str, Any] | None = None,
        in_memory: bool = False,
        agent_program: Sequence[str | Path] | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> None:
        self.directory = directory.resolve()
        self.disks = dict(disks)
        self.files = dict(files or {})
        self.azurite = Azurite(self.directory / "azurite", in_memory=in_memory)
        self.vault = self.directory / "vault"
        self.process_server_directory = self.directory / "process-server"
        self.agent_directory = self.directory / "agent"
        self.operator_settings = self.directory / "operator.toml"
        self._sockets = Path()
        self._agent_settings = dict(agent_settings or {})
        self._process_server_settings = dict(process_server_settings or {})
        self._logs = self.directory / "logs"
        self._config_port = free_port()
        self.process_server_port = free_port()
        environment = {f"REPLICAR_CONFIG_SERVER_{k}".upper(): str(v) for k, v in (config_server_settings or {}).items()}
        words: list[str | Path] = [*command.program("config-server"), "run", "--directory", self.vault]
        self.config_server = Child("config-server", words, self._logs / "config-server.log", environment=environment)
        process_server_toml, agent_toml = self.process_server_directory / "settings.toml", self._agent_toml
        self.process_server = self._child("process-server", "run", "--settings", process_server_toml)
        self.agent = self._child("mobility-agent", "run", "--settings", agent_toml, program=agent_program)
        self._more: list[Child] = []

    # --- the whole ---

    async def start(self) -> None:
        """Start everything and enrol the parts; returns when all of them serve and the machine can be protected."""
        await self.start_storage()
        await self.start_parts()

    async def start_parts(self) -> None:
        """The same beside storage that runs already."""
        await self.make_vault()
        await self.start_config_server()
        await self.enrol_process_server()
        await self.enrol_agent()
        await self.start_process_server()
        await self.start_agent()

    async def watch(self) -> None:
        """Run beside the work: raises as soon as a part dies that nobody stopped or killed."""
        await watch(self.children)

    @property
    def children(self) -> list[Child]:
        return [self.config_server, self.process_server, self.agent, *self._more]

    async def __aenter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        # Socket paths are limited to 107 bytes, which a test's directory may well exceed.
        self._sockets = Path(tempfile.mkdtemp(prefix="replicar-"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Nothing here waits on the event loop: this has to work while everything is being cancelled.
        for child in self.children:
            child.kill()
        session.release(self.agent_directory / "files")  # what a killed agent showed waits for the next one, for ever
        self.azurite.kill()
        shutil.rmtree(self._sockets, ignore_errors=True)

    # --- storage ---

    async def start_storage(self) -> None:
        """Start Azurite and make the container."""
        await self.azurite.__aenter__()
        async with self.store() as store:
            await store.ensure_container()

    def target(self) -> StorageTarget:
        """The settings of the storage account."""
        return StorageTarget(**self.target_fields())

    def store(self) -> PageBlobStore:
        """A new client of the container; the caller's to close."""
        return open_store(self.target())

    async def delete_container(self) -> None:
        """Remove the container with all that is in it, behind everybody's back."""
        credential = {"account_name": self.azurite.account_name, "account_key": self.azurite.account_key}
        trust = str(self.azurite.authority_file)
        async with BlobServiceClient(self.azurite.blob_endpoint, credential, connection_verify=trust) as service:
            await service.delete_container(self.container)

    # --- config server ---

    async def make_vault(self) -> None:
        """`config-server init`: the vault, its passphrase, a registration key and an operator's identity."""
        arguments: list[str | Path] = ["--vault", "demo", "--directory", self.vault, "--listen", "127.0.0.1"]
        address = ["--address", self.config_server_address, "--port", str(self._config_port)]
        (await command.run("config-server", "init", *arguments, *address)).require()

    @property
    def config_server_address(self) -> str:
        return f"127.0.0.1:{self._config_port}"

    async def start_config_server(self) -> None:
        self.config_server.start()
        await _listening(self.config_server)

    def control(self) -> ControlClient:
        """A client of the config server with the operator's identity; an asynchronous context manager."""
        return ControlClient(Identity.load(self.vault / "operator"))

    # --- process server ---

    async def enrol_process_server(self) -> None:
        await self._enrol_process_server(self.process_server_directory, "ps-1", self.process_server_port)

    async def add_process_server(self, name: str) -> Child:
        """Enrol and start another process server, in the directory of its name; it is watched like the others."""
        directory = self.directory / name
        await self._enrol_process_server(directory, name, free_port())
        toml = directory / "settings.toml"
        child = Child(name, [*command.program("process-server"), "run", "--settings", toml], self._logs / f"{name}.log")
        self._more.append(child)
        child.start()
        await _listening(child)
        return child

    async def _enrol_process_server(self, directory: Path, name: str, port: int) -> None:
        key: list[str | Path] = ["--registration-key-file", self.vault / "registration.key"]
        await self._enrol("process-server", directory, name, *key)
        settings: dict[str, Any] = {
            "directory": str(directory),
            "listen_host": "127.0.0.1",
            "advertise_host": "127.0.0.1",
            # A fixed one: agents find it again while the config server is away.
            "port": port,
            "cache_bytes": 256 * MIB,
            "heartbeat_seconds": HEARTBEAT_SECONDS,
            "storage": self.target_fields(),
        }
        write_toml(directory / "settings.toml", settings | self._process_server_settings)

    async def start_process_server(self) -> None:
        self.process_server.start()
        await self.process_server.until(
            "listening", lambda: "listening on" in self.process_server.said(), READY_SECONDS
        )

    # --- agent ---

    async def enrol_agent(self) -> None:
        await self._enrol("mobility-agent", self.agent_directory, self.machine)
        self._write_agent_settings()

    def _write_agent_settings(self) -> None:
        settings: dict[str, Any] = {
            "directory": str(self.agent_directory),
            "journal_bytes": 512 * MIB,
            "mark_every_seconds": 0,  # the points of a story are its own
            "heartbeat_seconds": HEARTBEAT_SECONDS,
        }
        disks = [{"name": name, "path": str(path)} for name, path in self.disks.items()]
        if not self._is_followed:
            disks = [{**disk, "nbd": str(self.nbd(disk["name"]))} for disk in disks]
        disks = [
            disk | ({"file": str(self.files[disk["name"]])} if disk["name"] in self.files else {}) for disk in disks
        ]
        write_toml(self._agent_toml, settings | self._agent_settings | {"disks": disks})

    async def change_disks(self, disks: Mapping[str, Path]) -> None:
        """Put other disks into the agent's settings, and have it reload them; returns when it has."""
        self.disks = dict(disks)
        self._write_agent_settings()
        before = self.agent_status().get("started_ns")
        process_id = self.agent.process_id
        assert process_id is not None, "an agent runs"
        os.kill(process_id, signal.SIGHUP)

        def taken_up() -> bool:
            status = self.agent_status()
            named = [disk["name"] for disk in status.get("disks", ())]
            return status.get("started_ns") != before and sorted(named) == sorted(self.disks)

        await self.agent.until("taking up its disks", taken_up, READY_SECONDS)

    def agent_status(self) -> dict[str, Any]:
        """What the agent says of itself; empty before it says anything."""
        path = self.agent_directory / "status.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    async def start_agent(self) -> None:
        self.agent.start()
        if self._is_followed:
            await self.agent.until(
                "following its disks",
                lambda: any(words in self.agent.said() for words in ("disks are followed", "disks are scanned")),
                READY_SECONDS,
            )
            return
        sockets = [self.nbd(name) for name in self.disks]
        await self.agent.until("serving its disks", lambda: all(map(_accepts, sockets)), READY_SECONDS)

    def nbd(self, disk: str) -> Path:
        """The socket at which the agent serves a disk."""
        return self._sockets / f"{disk}.sock"

    # --- operator ---

    async def replicar(self, *arguments: str | Path, limit_seconds: float = command.LIMIT_SECONDS) -> Result:
        """Run the operator's command with this cluster's settings."""
        write_toml(self.operator_settings, {"identity": str(self.vault / "operator"), "storage": self.target_fields()})
        settings = {"REPLICAR_SETTINGS": str(self.operator_settings)}
        return await command.run("replicar", *arguments, environment=settings, limit_seconds=limit_seconds)

    # --- below ---

    @property
    def _is_followed(self) -> bool:
        return self._agent_settings.get("capture") in ("trace", "scan")

    @property
    def _agent_toml(self) -> Path:
        return self.agent_directory / "settings.toml"

    async def _enrol(self, part: str, directory: Path, name: str, *more: str | Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        server: list[str | Path] = ["--config-server", self.config_server_address]
        passphrase: list[str | Path] = ["--passphrase-file", self.vault / "passphrase"]
        mine: list[str | Path] = ["--directory", directory, "--name", name]
        (await command.run(part, "enrol", *server, *passphrase, *mine, *more)).require()

    def _child(self, name: str, *arguments: str | Path, program: Sequence[str | Path] | None = None) -> Child:
        return Child(name, [*(program or command.program(name)), *arguments], self._logs / f"{name}.log")

    def target_fields(self) -> dict[str, Any]:
        """The settings of the storage account, as a part's settings file has them."""
        key_file = self.directory / "account-key"
        if not key_file.exists():
            key_file.touch(mode=0o600)
            key_file.write_text(SecretStr(self.azurite.account_key).get_secret_value())
        return {
            "endpoint": self.azurite.blob_endpoint,
            "account_name": self.azurite.account_name,
            "account_key_file": str(key_file),
            "container": self.container,
            "authority_file": str(self.azurite.authority_file),
        }


async def _listening(server: Child) -> None:
    await server.until("listening", lambda: "listening on" in server.said(), READY_SECONDS)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def write_toml(path: Path, fields: Mapping[str, Any]) -> None:
    """Write settings as TOML: scalars, then tables and arrays of tables, one level deep."""
    lines: list[str] = []
    tables: list[str] = []
    for key, value in fields.items():
        if isinstance(value, Mapping):
            tables += ["", f"[{key}]", *(f"{name} = {json.dumps(entry)}" for name, entry in value.items())]
        elif isinstance(value, list):
            for table in value:
                tables += ["", f"[[{key}]]", *(f"{name} = {json.dumps(entry)}" for name, entry in table.items())]
        else:
            lines.append(f"{key} = {json.dumps(value)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, *tables, ""]))


def _accepts(path: Path) -> bool:
    """Whether somebody listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
