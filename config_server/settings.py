"""The config server's settings: command line over environment over the TOML file over defaults.

The file is `config-server.toml` in the vault's directory unless another is named; the environment's names are the
fields' in capitals behind `REPLICAR_CONFIG_SERVER_`. A name that is not known is refused, never ignored: a setting that
can't be honoured is worse than none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from config_server.vault import SETTINGS_FILE
from replicar.control.messages import DEFAULT_PORT, MAX_WAIT_SECONDS
from replicar.observe.endpoint import MetricsListen
from replicar.observe.logs import LogFormat, LogFormatSetting
from replicar.settings import FileSettings, Reader

ENVIRONMENT_PREFIX: Final = "REPLICAR_CONFIG_SERVER_"
DEFAULT_DIRECTORY: Final = Path("/var/lib/replicar/vault")

_READER: Final = Reader("config server", "config-server run")


class Settings(FileSettings):
    """What `config-server run` needs to know.

    `address` is where the other parts reach this server (`host:port`); it goes into the identities made here. A process
    server that is silent for `takeover_seconds` loses those of its machines that reach nobody; 0: never.
    """

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX)

    directory: Path = DEFAULT_DIRECTORY
    listen: str = "0.0.0.0"  # noqa: S104 - it is there for other machines, and TLS decides who may speak
    port: Annotated[int, Field(ge=0, le=65535)] = DEFAULT_PORT
    address: str = ""
    heartbeat_seconds: Annotated[float, Field(ge=1, le=MAX_WAIT_SECONDS)] = 10.0
    takeover_seconds: Annotated[float, Field(ge=0)] = 900.0
    metrics_listen: MetricsListen = ""
    log_format: LogFormatSetting = LogFormat.TEXT


def load_settings(file: Path | None = None, **given: Any) -> Settings:
    """Settings from all sources; `given` (of which None counts as not given) wins.

    Args:
        file: the TOML file; by default the one in the vault's directory, if there is one.

    Raises:
        PermanentError: a file that is missing or no TOML, a name that is unknown, a value out of bounds.
    """
    given = {name: value for name, value in given.items() if value is not None}
    beside = file or _READER.read(Settings, None, given).directory / SETTINGS_FILE
    return _READER.read(Settings, beside if file or beside.is_file() else None, given)
