"""Every part reads its settings alike, and refuses what it does not know, wherever that stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import config_server.settings
import process_server.settings
import recovery.worker.settings
import replicar.cli.settings
from replicar.errors import PermanentError

STORAGE = """
[storage]
endpoint = "https://name.blob.core.windows.net"
account_name = "name"
account_key_file = "/nowhere"
container = "replicar"
"""

READERS: dict[str, tuple[Callable[[Path | None], Any], str]] = {
    "REPLICAR_CONFIG_SERVER_": (config_server.settings.load_settings, ""),
    "REPLICAR_PS_": (process_server.settings.load_settings, STORAGE),
    "REPLICAR_WORKER_": (recovery.worker.settings.load_settings, STORAGE),
    "REPLICAR_": (replicar.cli.settings.load_settings, STORAGE),
}
pytestmark = pytest.mark.parametrize("prefix", READERS)


def read(prefix: str, file: Path, text: str) -> Any:
    load, always = READERS[prefix]
    file.write_text(text + always)
    return load(file)


def test_a_misspelt_name_in_the_file_is_refused_and_named(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match=r"'directroy'.* can't be used") as refused:
        read(prefix, tmp_path / "it.toml", 'directroy = "hunter2"\n')
    assert "it.toml" in str(refused.value.hint)
    assert prefix + "DIRECTROY" in str(refused.value.hint)
    assert "hunter2" not in refused.value.message + str(refused.value.hint)


def test_what_is_no_toml_is_refused_with_the_line(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match=r"it.toml is no TOML: .*line 1"):
        read(prefix, tmp_path / "it.toml", "directory\n")


def test_a_file_that_is_not_there_is_refused(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="no settings file at"):
        READERS[prefix][0](tmp_path / "none.toml")


def test_a_file_of_another_encoding_is_refused(prefix: str, tmp_path: Path) -> None:
    (tmp_path / "it.toml").write_bytes('directory = "é"'.encode("latin-1"))
    with pytest.raises(PermanentError, match=r"can't read .*it.toml"):
        READERS[prefix][0](tmp_path / "it.toml")


def test_a_misspelt_variable_is_refused_where_the_prefix_is_the_parts_own(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(prefix + "DIRECTROY", "/tmp")  # noqa: S108 - never used
    if prefix == "REPLICAR_":
        read(prefix, tmp_path / "it.toml", "")  # it may be another part's
        return
    with pytest.raises(PermanentError, match=prefix + "DIRECTROY"):
        read(prefix, tmp_path / "it.toml", "")


def test_the_environment_beats_the_file(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "identity" if prefix == "REPLICAR_" else "directory"
    monkeypatch.setenv(prefix + name.upper(), "/from/environment")
    found = read(prefix, tmp_path / "it.toml", f'{name} = "/from/file"\n')
    assert getattr(found, name) == Path("/from/environment")
