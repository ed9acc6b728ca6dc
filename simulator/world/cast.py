"""Who is who: a vault with machines, two process servers and a worker enrolled, made once and copied for every story.

Made by the config server's own code, in a process of the world, so that ids and data keys follow from a constant. What
OpenSSL draws by itself, the private keys, differs from run to run; nobody sees it, since the world has no TLS.
"""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from config_server.foundation import found_vault, new_identity
from config_server.registry import Registry
from config_server.vault import REGISTRY_FILE, Vault
from replicar.control.identity import Identity, Role
from simulator.world.calls import Calls
from simulator.world.clocks import MachineClock
from simulator.world.files import FileSystem
from simulator.world.loop import VirtualLoop
from simulator.world.processes import Machine, Process

CONFIG_SERVER: Final = "config"
CONTROL_PORT: Final = 443
MACHINES: Final = ("db1", "db2")
SERVERS: Final = ("ps1", "ps2")
OPERATOR: Final = "operator"
#: A recovery worker, and the machine that it is on where a story has one.
WORKER: Final = "hands"


class Who:
    """An identity as the network shows it."""

    def __init__(self, identity: Identity) -> None:
        self.id, self.role, self.dns_name = identity.id, identity.role, identity.dns_name
        certificate = x509.load_pem_x509_certificate(identity.certificate_pem)
        self.serial = f"{certificate.serial_number:X}"
        self.serial = self.serial.rjust(len(self.serial) + len(self.serial) % 2, "0")


@lru_cache(maxsize=1)
def template() -> Path:
    """A directory with the vault (`vault`) and everybody's identity (by name)."""
    place = Path(tempfile.mkdtemp(prefix="replicar-cast-", dir=memory_directory()))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    loop = VirtualLoop(random.Random(0))
    try:
        machine = Machine("cast", place, FileSystem(place, random.Random(0)))
        process = Process(machine, "cast", loop)
        with Calls(random.Random(0)).installed():
            process.context.run(_build, place, MachineClock(loop))
    finally:
        loop.close()
    return place


def _build(place: Path, clock: Any) -> None:
    address = f"{CONFIG_SERVER}:{CONTROL_PORT}"
    vault = found_vault(place / "vault", "world", address=address, listen="127.0.0.1", port=CONTROL_PORT, clock=clock)
    registry = Registry(place / "vault" / REGISTRY_FILE)
    try:
        for name, role in (
            *((name, Role.MACHINE) for name in MACHINES),
            *((name, Role.PROCESS_SERVER) for name in SERVERS),
            (OPERATOR, Role.OPERATOR),
            (WORKER, Role.RECOVERY),
        ):
            new_identity(vault, registry, role, name, place / name, address=address, clock=clock)
    finally:
        registry.close()


def copy(name: str, target: Path) -> None:
    """Put somebody's files into `target`."""
    shutil.copytree(template() / name, target, dirs_exist_ok=True)


@lru_cache(maxsize=64)
def who(name: str) -> Who:
    """An identity as it was enrolled first."""
    return Who(Identity.load(template() / name))


def enrol_again(vault_directory: Path, name: str, directory: Path, clock: Any) -> Who:
    """What an operator does with a machine that lost its log: the same name, one incarnation further."""
    vault, registry = Vault.load(vault_directory), Registry(vault_directory / REGISTRY_FILE)
    try:
        identity = new_identity(
            vault, registry, Role.MACHINE, name, directory, address=f"{CONFIG_SERVER}:{CONTROL_PORT}", clock=clock
        )
    finally:
        registry.close()
    return Who(identity)


def memory_directory() -> str | None:
    """Where files cost no disk; None where there is no such place."""
    shared = Path("/dev/shm")  # noqa: S108 - a directory of our own is made in it
    return str(shared) if shared.is_dir() else None
