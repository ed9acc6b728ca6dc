"""What `seed` is compared with: AzCopy, which copies a disk as a page blob, and restic, which backs one up by content.

Both are used as their makers mean them to be, at their defaults, and are given what they need beforehand: AzCopy a
container and a signature, restic a repository on the local disk (where it is faster than over any network).
"""

from __future__ import annotations

import datetime
import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from azure.storage.blob import BlobServiceClient, ContainerSasPermissions, generate_container_sas

from replicar.errors import PermanentError
from simulator.azurite import Azurite

AZCOPY: Final = Path(__file__).resolve().parents[1] / ".azcopy" / "azcopy"
CONTAINER: Final = "azcopy"
_LIMIT_SECONDS: Final = 1800.0


@dataclass(frozen=True, slots=True)
class Took:
    """Wall and processor seconds of one run of a program."""

    seconds: float
    cpu_seconds: float


def check_installed() -> None:
    """
    Raises:
        PermanentError: one of them is not installed; with what to do.
    """
    if not AZCOPY.exists():
        raise PermanentError(f"AzCopy is not installed: there is no {AZCOPY}", hint="run: setup/azcopy.sh")
    if shutil.which("restic") is None:
        raise PermanentError("restic is not installed", hint="apt-get install restic")


def azcopy(azurite: Azurite, image: Path, blob: str, directory: Path) -> Took:
    """Copy the image into a page blob, and see that all of it is said to be there."""
    credential = {"account_name": azurite.account_name, "account_key": azurite.account_key}
    trust = str(azurite.authority_file)
    with BlobServiceClient(azurite.blob_endpoint, credential=credential, connection_verify=trust) as service:
        container = service.get_container_client(CONTAINER)
        if not container.exists():
            container.create_container()
        signature = generate_container_sas(
            azurite.account_name,
            CONTAINER,
            account_key=azurite.account_key,
            permission=ContainerSasPermissions(read=True, write=True, create=True, list=True),
            expiry=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=2),
        )
        place = {"AZCOPY_LOG_LOCATION": str(directory), "AZCOPY_JOB_PLAN_LOCATION": str(directory)}
        took, said = _run(
            [
                AZCOPY,
                "copy",
                image,
                f"{azurite.blob_endpoint}/{CONTAINER}/{blob}?{signature}",
                "--blob-type=PageBlob",
                "--from-to=LocalBlob",
            ],
            # The machine's own list of authorities, with Azurite's in its place, is what Go's TLS looks at.
            {"SSL_CERT_FILE": trust, "HOME": str(directory), **place},
            directory / "azcopy.txt",
        )
        if "Final Job Status: Completed" not in said:
            raise PermanentError("AzCopy did not complete", hint=said[-500:])
        size = container.get_blob_client(blob).get_blob_properties().size
    if size != image.stat().st_size:
        raise PermanentError(f"AzCopy made a blob of {size} bytes", hint="the comparison would say nothing")
    return took


class Restic:
    """A repository of its own, made here."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        # Nothing secret: the repository is gone with the benchmark.
        self._environment = {
            "RESTIC_PASSWORD": "benchmark",
            "RESTIC_REPOSITORY": str(directory / "repository"),
            "RESTIC_CACHE_DIR": str(directory / "cache"),
        }
        self._restic("init")

    def backup(self, image: Path) -> tuple[Took, float]:
        """Back the image up; what it took, and the MiB that restic says it added."""
        took, said = self._restic("backup", image)
        added = re.search(r"Added to the repo(?:sitory)?: ([\d.]+) ([KMGT]?i?B)", said)
        units = {"B": 1 / (1 << 20), "KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0}
        if added is None or added[2] not in units:
            raise PermanentError("restic does not say what it added", hint=said[-500:])
        return took, float(added[1]) * units[added[2]]

    def _restic(self, *arguments: str | Path) -> tuple[Took, str]:
        return _run(["restic", *arguments], self._environment, self._directory / "said.txt")


def _run(command: Sequence[str | Path], more: Mapping[str, str], output: Path) -> tuple[Took, str]:
    """Run to the end; what that took, the program's own children included."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with output.open("wb") as file:
        done = subprocess.run(
            command, env=os.environ | more, stdout=file, stderr=file, timeout=_LIMIT_SECONDS, check=False
        )
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    said = output.read_text(errors="replace")
    if done.returncode:
        raise PermanentError(f"{Path(command[0]).name} ended with status {done.returncode}", hint=said[-500:])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Took(seconds, cpu), said
