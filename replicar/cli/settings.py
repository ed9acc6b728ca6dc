"""The operator's settings: who asks, and where the logs are.

    identity = "/var/lib/replicar/vault/operator"   # made by `config-server init`
    config_server = "config.example.org:443"        # only if it differs from what the identity says

    [storage]                                       # only for what reads storage: recover, verify
    endpoint = "https://NAME.blob.core.windows.net"
    account_name = "NAME"
    account_key_file = "/etc/replicar/account.key"
    container = "replicar"

The environment beats the file: `REPLICAR_IDENTITY`, `REPLICAR_CONFIG_SERVER`, `REPLICAR_STORAGE__CONTAINER`... An
unknown name in the file is refused, never ignored.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Final

from pydantic_settings import SettingsConfigDict

from replicar.control.client import ControlClient
from replicar.control.identity import Identity
from replicar.errors import PermanentError
from replicar.observe import logs
from replicar.observe.logs import LogFormat, LogFormatSetting
from replicar.settings import FileSettings, Reader
from replicar.storage.target import StorageTarget

ENVIRONMENT_PREFIX: Final = "REPLICAR_"
SETTINGS_VARIABLE: Final = "REPLICAR_SETTINGS"

#: Other parts' variables begin with its prefix too.
_READER: Final = Reader("", "replicar", owns_prefix=False)


def default_file() -> Path:
    """Where the settings are unless somebody says otherwise."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "replicar" / "replicar.toml"


class OperatorSettings(FileSettings):
    """See the module. What a sub-command needs and nobody set is refused when it is asked for."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX)

    identity: Path | None = None
    config_server: str | None = None
    storage: StorageTarget | None = None
    log_format: LogFormatSetting = LogFormat.TEXT

    def control(self) -> ControlClient:
        """A client of the config server with the operator's identity; an asynchronous context manager.

        Raises:
            PermanentError: the identity is not set, missing or damaged.
        """
        if self.identity is None:
            raise PermanentError(
                "the settings do not say which identity to use",
                hint=f"set `identity` in {default_file()} or REPLICAR_IDENTITY to the operator's directory that "
                "`config-server init` made",
                setting="identity",
            )
        return ControlClient(Identity.load(self.identity), address=self.config_server)

    def target(self, container: str | None = None) -> StorageTarget:
        """The storage account, with another container if one is named.

        Raises:
            PermanentError: it is not set, or the name is no container's.
        """
        if self.storage is None:
            raise PermanentError(
                "the settings do not say where the storage account is",
                hint=f"add a [storage] section to {default_file()}; see `replicar recover --help`",
                setting="storage",
            )
        if container is None:
            return self.storage
        fields: dict[str, Any] = {name: getattr(self.storage, name) for name in StorageTarget.model_fields}
        return StorageTarget(**{**fields, "container": container})


def load_settings(file: Path | None) -> OperatorSettings:
    """Settings from the environment and a file: the one that is named, or the default one if it is there. What the
    command logs beside its result is written from then on as they say.

    Raises:
        PermanentError: a file that is missing or no TOML, a name that is unknown, a value that can't be used.
    """
    found = file or (default_file() if default_file().is_file() else None)
    settings = _READER.read(OperatorSettings, found)
    if settings.log_format is LogFormat.JSON:
        logs.set_up("replicar", settings.log_format, level=logging.WARNING)
    return settings
