"""A recovery worker beside a cluster: enrolled with the cluster's vault, working by its real command, killable.

Its machines and exporters are nobody's children and outlive it, as they should; leaving the context removes them too.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from recovery.compute import qemu
from recovery.worker import keeper
from replicar.control.messages import Job, JobKind, JobParameters
from replicar.errors import PermanentError
from simulator import command
from simulator.child import Child
from simulator.cluster import Cluster, write_toml

JOB_SECONDS: Final = 240.0


class RecoveryHost:
    """See the module; an asynchronous context manager inside that of the cluster. `settings`: more of the worker's."""

    def __init__(self, cluster: Cluster, settings: Mapping[str, Any] | None = None) -> None:
        self._cluster = cluster
        self._more = dict(settings or {})
        # Sockets lie below it, so its path is short.
        self.directory = Path(tempfile.mkdtemp(prefix="replicar-r-"))
        identity, self._settings = cluster.directory / "worker", self.directory / "settings.toml"
        self._identity = identity
        words: list[str | Path] = [*command.program("recovery-worker"), "run", "--settings", self._settings]
        self.child = Child("recovery-worker", words, cluster.directory / "recovery-worker.log")

    async def __aenter__(self) -> Self:
        vault = self._cluster.vault
        arguments: list[str | Path] = [
            *("--config-server", self._cluster.config_server_address, "--name", "hands", "--directory", self._identity),
            *("--passphrase-file", vault / "passphrase", "--registration-key-file", vault / "registration.key"),
        ]
        (await command.run("recovery-worker", "enrol", *arguments)).require()
        fields: dict[str, Any] = {
            "identity": str(self._identity),
            "directory": str(self.directory),
            "storage": self._cluster.target_fields(),
        }
        write_toml(self._settings, fields | self._more)
        self.child.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.child.kill()
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def processes(self) -> Iterator[int]:
        """What runs for this host besides the worker: exporters and machines."""
        # A number in a file may be anybody's by now; who holds the file locked is who wrote it.
        for kind, running in (("disks", keeper.running), ("machines", qemu.running)):
            where = self.directory / kind
            for made in where.iterdir() if where.exists() else ():
                if (process := running(made)) is not None:
                    yield process

    async def job(self, kind: JobKind, parameters: JobParameters | None = None) -> Job:
        """Make a job of the cluster's machine and wait until it has ended.

        Raises:
            PermanentError: it did not succeed, or not in time; with its error and the worker's last words.
        """
        async with self._cluster.control() as control:
            made = await control.make_job(self._cluster.machine, kind, parameters)
        return await self.ended(made.id)

    async def ended(self, job_id: str, *, well: bool = True) -> Job:
        """Wait for a job's end. Raises as `job`."""
        found: list[Job] = []
        async with self._cluster.control() as control:
            try:
                async with asyncio.timeout(JOB_SECONDS):
                    while not found or not found[-1].state.has_ended:
                        await asyncio.sleep(0.1)
                        found[:] = [await control.job(job_id)]
            except TimeoutError:
                raise self.child.failure(f"did not end the job: {found[-1] if found else job_id}") from None
        job = found[-1]
        if well and job.state != "succeeded":
            raise PermanentError(
                f"{job.kind} ended as {job.state}: {job.error.message if job.error else ''}",
                hint=f"{job.error.hint if job.error else ''}\n{self.child.last_lines()}",
            )
        return job

    def console(self, made: str) -> list[str]:
        """What a machine's console said so far."""
        path = self.directory / "machines" / made / "console.log"
        return (
            [line.strip() for line in path.read_bytes().decode(errors="replace").splitlines()] if path.exists() else []
        )
