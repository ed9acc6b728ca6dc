"""The config server's settings: command line over environment over the TOML file over defaults.

The file is `config-server.toml` in the vault's directory unless another is named; the environment's names are the
fields' in capitals behind `REPLICAR_CONFIG_SERVER_`. A name that is not known is refused, never ignored: a setting that
can't be honoured is worse than none.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from config_server.vault import SETTINGS_FILE
from replicar.control.messages import DEFAULT_PORT, MAX_WAIT_SECONDS
from replicar.errors import PermanentError
from replicar.observe.endpoint import MetricsListen

ENVIRONMENT_PREFIX: Final = "REPLICAR_CONFIG_SERVER_"
DEFAULT_DIRECTORY: Final = Path("/var/lib/replicar/vault")


class Settings(BaseSettings):
    """What `config-server run` needs to know.

    `address` is where the other parts reach this server (`host:port`); it goes into the identities made here. A process
    server that is silent for `takeover_seconds` loses those of its machines that reach nobody; 0: never.
    """

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True)

    directory: Path = DEFAULT_DIRECTORY
    listen: str = "0.0.0.0"  # noqa: S104 - it is there for other machines, and TLS decides who may speak
    port: Annotated[int, Field(ge=0, le=65535)] = DEFAULT_PORT
    address: str = ""
    heartbeat_seconds: Annotated[float, Field(ge=1, le=MAX_WAIT_SECONDS)] = 10.0
    takeover_seconds: Annotated[float, Field(ge=0)] = 900.0
    metrics_listen: MetricsListen = ""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(file: Path | None = None, **given: Any) -> Settings:
    """Settings from all sources; `given` (of which None counts as not given) wins.

    Args:
        file: the TOML file; by default the one in the vault's directory, if there is one.

    Raises:
        PermanentError: a file that is missing or no TOML, a name that is unknown, a value out of bounds.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if file is not None and not file.is_file():
        raise PermanentError(f"no settings file at {file}", hint="check the path given to --settings", path=str(file))
    try:
        path = file or _read(None, given).directory / SETTINGS_FILE
        return _read(path, given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise PermanentError(
            f"the setting {name!r} of the config server can't be used: {first['msg']}",
            hint=f"look in {file or SETTINGS_FILE}, at {ENVIRONMENT_PREFIX}{name.upper()}, and at the options given",
            setting=name,
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise PermanentError(
            f"the settings file is no TOML: {error}", hint=f"look in {file or SETTINGS_FILE}"
        ) from None


def _read(file: Path | None, given: dict[str, Any]) -> Settings:
    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=file)

    return Settings.model_construct(**FromFile(**given).model_dump())
