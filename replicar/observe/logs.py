"""How a part's log is written: lines for people, or one JSON object a line for programs (`log_format`).

    2026-11-25 03:12:07,412 WARNING process_server.service: machine shop: storage is away; it is tried again
    {"time": "2026-11-25T03:12:07.412345Z", "level": "warning", "part": "process-server", "logger": "...",
     "message": "machine shop: storage is away; it is tried again", "machine": "shop", "error": "TransientError", ...}

The message is the same in both. In JSON its facts stand beside it: what the caller says (`extra=fields(disk=...)`),
the class, hint and fields of a `ReplicarError` that is logged, and what is true of all lines of the process (`always`).
So does a traceback, as one text. With JSON nothing else goes to the log: what a part would say to a person at its start
(`announce`) or at its end (`told`) is a line too.

Secrets are kept out where they are: errors' fields hold none, and keys are types that don't print. What is here is the
last net, for text that others wrote: bytes are never written out, and what looks like a signature, a key or a bearer
token is blotted. The net knows no secret, so it can't be relied on; a test searches the logs of a whole story for all.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import types
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import Field

from replicar.errors import ReplicarError

TEXT_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
#: Longer messages are cut: a line has to pass through journals and shippers.
MAX_MESSAGE_CHARS: Final = 16 << 10
_FIELDS: Final = "replicar_fields"
_BLOTS: Final = re.compile(
    r"(?i)\b(sig|accountkey|sharedaccesssignature|client_secret|password|passphrase)(=|%3D)[^&;\s\"']+"
    r"|\b(bearer|sharedkey)\s+[\w.:+/=~-]{8,}"
)


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


#: The setting, as every part has it.
LogFormatSetting = Annotated[LogFormat, Field(description="of the log: text for people, json: one object a line")]


def fields(**facts: object) -> dict[str, Any]:
    """Facts of one line, for `extra=`: names as `ReplicarError.fields` has them (machine, disk, sequence...)."""
    return {_FIELDS: facts}


def set_up(part: str, form: LogFormat, *, level: int = logging.INFO) -> None:
    """Write this process's log to standard error, in that form; asked again, the last word counts."""
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, _Handler)]:
        root.removeHandler(handler)
    formatter = JsonFormatter(part) if form is LogFormat.JSON else _TextFormatter(TEXT_FORMAT)
    root.addHandler(_Handler(formatter))
    root.setLevel(level)
    # The storage client's own lines (URLs, requests) and the event loop's are not for this log.
    for name in ("azure", "asyncio", "msal", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(form is LogFormat.JSON)
    sys.excepthook = _log_uncaught if form is LogFormat.JSON else sys.__excepthook__


def always(**facts: object) -> None:
    """Put these facts into every line from now on."""
    formatter = _json()
    if formatter is not None:
        formatter.common.update(facts)


def announce(message: str) -> None:
    """Say to whoever started the part that it is up: on standard output, or as a line of a JSON log."""
    if _json() is not None:
        logging.getLogger("replicar").info(message)
    else:
        sys.stdout.write(message + "\n")
        sys.stdout.flush()


def told(error: ReplicarError) -> bool:
    """Whether the error that ends the process was put into the log, as it is with JSON; else the caller says it."""
    if _json() is None:
        return False
    logging.getLogger("replicar").critical("%s", error)
    return True


class JsonFormatter(logging.Formatter):
    """One object a line. `common` are facts of all lines."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.common: dict[str, object] = {}

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="microseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "part": self.part,
            "logger": record.name,
            "message": _message(record),
        }
        raised = record.exc_info[1] if record.exc_info else None
        for facts in (getattr(record, _FIELDS, {}), _facts_of(_error(record, raised)), self.common):
            for name, value in facts.items():
                entry.setdefault(name, value)
        if record.exc_info:
            entry["trace"] = blotted(self.formatException(record.exc_info))[:MAX_MESSAGE_CHARS]
        return blotted(json.dumps(entry, default=_shown, ensure_ascii=False))


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return blotted(super().format(record))


class _Handler(logging.StreamHandler[Any]):
    """Writes to what standard error is at that moment."""

    def __init__(self, formatter: logging.Formatter) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(formatter)

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        raise AssertionError("the stream is standard error")


def blotted(text: str) -> str:
    """`text` without what looks like a credential; see the module for what that is worth."""
    return _BLOTS.sub(lambda found: f"{found[1]}{found[2]}***" if found[1] else f"{found[3]} ***", text)


def _message(record: logging.LogRecord) -> str:
    text = record.getMessage()
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _error(record: logging.LogRecord, raised: BaseException | None) -> ReplicarError | None:
    arguments = record.args if isinstance(record.args, tuple) else ()
    return next((each for each in (*arguments, raised) if isinstance(each, ReplicarError)), None)


def _facts_of(error: ReplicarError | None) -> Mapping[str, object]:
    if error is None:
        return {}
    return {name: value for name, value in error.as_dict().items() if name != "message" and value not in (None, "")}


def _shown(value: object) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes | bytearray | memoryview) else str(value)


def _json() -> JsonFormatter | None:
    handlers = (each for each in logging.getLogger().handlers if isinstance(each, _Handler))
    formatter = next((each.formatter for each in handlers), None)
    return formatter if isinstance(formatter, JsonFormatter) else None


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    logging.getLogger("replicar").critical("the process ends by an error of its own", exc_info=(kind, error, trace))
