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

The environment's names are the fields' in capitals behind `REPLICAR_WORKER_`. A name that is not known is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from replicar.observe.endpoint import MetricsListen
from replicar.observe.logs import LogFormat, LogFormatSetting
from replicar.settings import FileSettings, Reader
from replicar.storage.target import StorageTarget

ENVIRONMENT_PREFIX: Final = "REPLICAR_WORKER_"
DEFAULT_IDENTITY: Final = Path("/var/lib/replicar/worker")

_READER: Final = Reader("recovery worker", "recovery-worker run")


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


def load_settings(file: Path | None) -> WorkerSettings:
    """Settings from the environment and, if one is named, the file.

    Raises:
        PermanentError: a file that is missing or no TOML, a name that is unknown, a value that can't be used.
    """
    return _READER.read(WorkerSettings, file)
