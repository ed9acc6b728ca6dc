"""A recovery worker's settings: environment over the TOML file over defaults.

    identity = "/var/lib/replicar/worker"            # where `recovery-worker enrol` put it, or an operator's
    directory = "/var/lib/replicar/recovered"        # machines, overlays, evidence; a short path
    accelerator = "tcg"                              # "kvm" where this host has it
    fold_seconds = 900                               # how often each machine's log is indexed and thinned; 0: not here
    replica_seconds = 30                             # how often each warm replica is brought on; 0: not here

    [storage]                                        # as a process server's
    endpoint = "https://NAME.blob.core.windows.net"
    account_name = "NAME"
    account_key_file = "/etc/replicar/account.key"
    container = "replicar"

    [azure]                                          # only for machines in Azure
    subscription_id = "11111111-2222-3333-4444-555555555555"
    identity = "managed"                             # of this host: default, managed, workload

    [azure.disks]                                    # where their disks' VHDs go: the target settings' account
    endpoint = "https://NAME.blob.core.windows.net"
    account_name = "NAME"
    account_key_file = "/etc/replicar/account.key"
    container = "disks"

The environment's names are the fields' in capitals behind `REPLICAR_WORKER_`. A name that is not known is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import SettingsConfigDict

from replicar.observe.endpoint import MetricsListen
from replicar.observe.logs import LogFormat, LogFormatSetting
from replicar.settings import FileSettings, Reader
from replicar.storage.entra import Kind
from replicar.storage.target import StorageTarget

ENVIRONMENT_PREFIX: Final = "REPLICAR_WORKER_"
DEFAULT_IDENTITY: Final = Path("/var/lib/replicar/worker")

_READER: Final = Reader("recovery worker", "recovery-worker run")


class AzureSettings(BaseModel):
    """Machines in Azure: who asks Resource Manager, and where disks go; the rest is in each machine's target settings.

    `endpoint` is Resource Manager's, for clouds other than the public one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    subscription_id: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$")]
    identity: Kind = "default"
    identity_client_id: str | None = None
    endpoint: Annotated[str, Field(pattern=r"^(https://[^/?#]+/?)?$")] = ""
    authority_file: Path | None = None
    disks: StorageTarget


class WorkerSettings(FileSettings):
    """See the module."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX)

    identity: Annotated[Path, Field(description="this worker's identity, or an operator's")] = DEFAULT_IDENTITY
    config_server: Annotated[str | None, Field(description="if it differs from what the identity says")] = None
    directory: Annotated[Path, Field(description="machines, overlays and evidence")] = Path(
        "/var/lib/replicar/recovered"
    )
    accelerator: Annotated[Literal["tcg", "kvm"], Field(description="what runs machines on this host")] = "tcg"
    fold_seconds: Annotated[
        float, Field(ge=0, le=86_400, description="how often each log is indexed and thinned; 0: never")
    ] = 900.0
    replica_seconds: Annotated[
        float, Field(ge=0, le=86_400, description="how often each warm replica is brought on; 0: never")
    ] = 30.0
    metrics_listen: MetricsListen = ""
    log_format: LogFormatSetting = LogFormat.TEXT
    storage: StorageTarget
    azure: Annotated[AzureSettings | None, Field(description="for machines in Azure")] = None


def load_settings(file: Path | None) -> WorkerSettings:
    """Settings from the environment and, if one is named, the file.

    Raises:
        PermanentError: a file that is missing or no TOML, a name that is unknown, a value that can't be used.
    """
    return _READER.read(WorkerSettings, file)
