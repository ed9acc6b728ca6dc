"""The process server's settings: environment over the TOML file over defaults.

The environment's names are the fields' in capitals behind `REPLICAR_PS_`, and `__` goes inside
(`REPLICAR_PS_STORAGE__ACCOUNT_KEY_FILE`). A name that is not known is refused, never ignored: a setting that can't be
honoured is worse than none.

    directory = "/var/lib/replicar/process-server"
    cache_bytes = 107374182400

    [storage]
    endpoint = "https://NAME.blob.core.windows.net"
    account_name = "NAME"
    account_key_file = "/etc/replicar/account.key"
    container = "replicar"

    [bandwidth]
    bytes_per_second = 0                 # 0: no limit
    [[bandwidth.windows]]                # in this host's local time; the first that applies counts
    days = ["monday", "tuesday", "wednesday", "thursday", "friday"]
    start = "08:00"
    end = "18:00"
    bytes_per_second = 5000000

    [weights]                            # shares of cache and uploads, by the machine's name; 1 for the others
    shop = 4
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import SettingsConfigDict

from process_server.bandwidth import DAYS, LEAST_BYTES_PER_SECOND, Day, Schedule, Window
from process_server.cache import MIN_SLOTS, PAYLOAD_BYTES, SLOT_BYTES
from process_server.logwriter import MIN_BLOB_BYTES, LogLimits
from process_server.machine import Tuning
from process_server.watermarks import MAX_WEIGHT
from replicar.formats.logblob import MAX_STRIPES
from replicar.formats.wire import DEFAULT_PORT
from replicar.observe.endpoint import MetricsListen
from replicar.observe.logs import LogFormat, LogFormatSetting
from replicar.settings import FileSettings, Reader
from replicar.storage.target import StorageTarget

ENVIRONMENT_PREFIX: Final = "REPLICAR_PS_"
DEFAULT_DIRECTORY: Final = Path("/var/lib/replicar/process-server")
MAX_BLOB_BYTES: Final = 8 << 40
MAX_WINDOWS: Final = 64
MAX_WEIGHTS: Final = 4096

_READER: Final = Reader("process server", "process-server run")

Bytes = Annotated[int, Field(gt=0)]
Rate = Annotated[int, Field(ge=0, description="bytes a second; 0 for no limit")]
TimeOfDay = Annotated[str, Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")]
Weight = Annotated[int, Field(ge=1, le=MAX_WEIGHT)]


class WindowSettings(BaseModel):
    """Hours of some days with a rate of their own; one that ends before it begins goes on past midnight."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    days: Annotated[tuple[Day, ...], Field(min_length=1, description="it begins on")] = DAYS
    start: Annotated[TimeOfDay, Field(description="hh:mm, local time")]
    end: Annotated[TimeOfDay, Field(description="hh:mm, local time")]
    bytes_per_second: Rate

    @model_validator(mode="after")
    def _hold_something(self) -> Self:
        if self.start == self.end:
            raise ValueError("a window that ends when it begins; for whole days set the rate outside windows")
        return self

    def window(self) -> Window:
        days = frozenset(DAYS.index(day) for day in self.days)
        return Window(days, _minute(self.start), _minute(self.end), _rate(self.bytes_per_second))


class BandwidthSettings(BaseModel):
    """What may be uploaded, in bytes a second: outside all windows, and in them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes_per_second: Rate = 0
    windows: Annotated[tuple[WindowSettings, ...], Field(max_length=MAX_WINDOWS)] = ()

    @model_validator(mode="after")
    def _move_something(self) -> Self:
        for rate in (self.bytes_per_second, *(window.bytes_per_second for window in self.windows)):
            if 0 < rate < LEAST_BYTES_PER_SECOND:
                raise ValueError(
                    f"{rate} bytes a second are too few: {LEAST_BYTES_PER_SECOND} at least, 0 for no limit"
                )
        return self

    def schedule(self) -> Schedule:
        return Schedule(_rate(self.bytes_per_second), tuple(window.window() for window in self.windows))


def _minute(text: str) -> int:
    hours, _, minutes = text.partition(":")
    return int(hours) * 60 + int(minutes)


def _rate(bytes_per_second: int) -> int | None:
    return bytes_per_second or None


class Settings(FileSettings):
    """What `process-server run` needs to know; `storage` has no default."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX)

    directory: Annotated[Path, Field(description="identity, cache and state")] = DEFAULT_DIRECTORY
    listen_host: Annotated[str, Field(description="local address to listen on")] = "0.0.0.0"  # noqa: S104 - mutual TLS
    port: Annotated[int, Field(ge=0, le=65535, description="0 takes a free one")] = DEFAULT_PORT
    advertise_host: Annotated[str, Field(description="where agents reach it; empty: this host's name")] = ""
    cache_bytes: Annotated[Bytes, Field(ge=MIN_SLOTS * SLOT_BYTES)] = 16 << 30
    buffers_bytes: Annotated[Bytes, Field(ge=PAYLOAD_BYTES, description="memory to receive into")] = 256 << 20
    compression_level: Annotated[int, Field(ge=-7, le=19, description="zstd's, more on a narrow link; 0: none")] = 1
    segment_age_seconds: Annotated[float, Field(gt=0, le=60)] = 0.2
    uploads_per_machine: Annotated[int, Field(ge=1, le=32)] = 4
    log_stripes: Annotated[int, Field(ge=1, le=MAX_STRIPES)] = 8
    log_blob_bytes: Annotated[int, Field(ge=MIN_BLOB_BYTES, le=MAX_BLOB_BYTES, multiple_of=512)] = 4 << 30
    heartbeat_seconds: Annotated[float, Field(gt=0, le=30, description="how often it reports")] = 10.0
    metrics_listen: MetricsListen = ""
    log_format: LogFormatSetting = LogFormat.TEXT
    bandwidth: BandwidthSettings = BandwidthSettings()
    weights: Annotated[dict[str, Weight], Field(max_length=MAX_WEIGHTS, description="shares, by machine")] = {}  # noqa: RUF012 - pydantic copies it
    storage: StorageTarget

    def tuning(self) -> Tuning:
        """The part of it that concerns a machine's stream."""
        return Tuning(
            segment_age_seconds=self.segment_age_seconds,
            uploads=self.uploads_per_machine,
            log=LogLimits(stripes=self.log_stripes, blob_bytes=self.log_blob_bytes),
            weights=self.weights,
        )

    def advertised_host(self) -> str:
        """Where agents are told to connect."""
        if self.advertise_host:
            return self.advertise_host
        everywhere = ("", "0.0.0.0", "::")  # noqa: S104 - compared, not listened on
        return socket.getfqdn() if self.listen_host in everywhere else self.listen_host


def load_settings(file: Path | None) -> Settings:
    """Settings from the environment and, if one is named, the file.

    Raises:
        PermanentError: a file that is missing or no TOML, a name that is unknown, a value out of bounds.
    """
    return _READER.read(Settings, file)
