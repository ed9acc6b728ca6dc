"""Which machines this server serves: as the config server says, and as it said last when it is away.

The last assignment is kept in the state directory, data keys included, in a file of mode 0600. That is acceptable: this
host is trusted with the keys anyway (they are in its memory as long as it runs), with the machines' plain bytes (in the
cache file beside it) and with the storage credential; and without them a server that is restarted while the config
server is down could serve nobody, which is promise 7.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from process_server.logwriter import Writer
from process_server.machine import Assignment
from replicar.control.files import read_file, write_file
from replicar.control.keys import key_number
from replicar.control.messages import ProcessServerAssignment, ProcessServerInstructions
from replicar.errors import CorruptionError, PermanentError
from replicar.formats.logblob import WRAPPED_KEY_BYTES
from replicar.log.tail import Stored

ASSIGNMENTS_FILE: Final = "assignments.json"


def read_assignment(message: ProcessServerAssignment) -> Assignment:
    """An assignment as the log writer needs it.

    Raises:
        CorruptionError, PermanentError: its keys are not what they should be.
    """
    try:
        wrapped = base64.b64decode(message.wrapped_key, validate=True)
    except (binascii.Error, ValueError):
        wrapped = b""
    if len(wrapped) != WRAPPED_KEY_BYTES:
        raise CorruptionError(
            f"the wrapped key of machine {message.name} is not base64 of {WRAPPED_KEY_BYTES} bytes",
            hint="look at the config server's vault",
            machine=message.name,
        )
    writer = Writer(
        machine_id=message.machine_id,
        epoch=message.epoch,
        key_id=key_number(message.key_id),
        data_key=message.data_key_bytes(),
        wrapped_key=wrapped,
    )
    stored = Stored(message.stored_segment or 0, message.stored_sequence, bytes.fromhex(message.stored_digest))
    former = {key_number(key.key_id): key.data_key_bytes() for key in message.former_keys}
    return Assignment(message.name, writer, message.incarnation, stored, former)


def read_assignments(messages: Iterable[ProcessServerAssignment]) -> list[Assignment]:
    return [read_assignment(message) for message in messages]


def save(directory: Path, instructions: ProcessServerInstructions) -> None:
    """Keep the last instructions. Raises PermanentError when the state directory can't be written."""
    write_file(directory / ASSIGNMENTS_FILE, instructions.to_json())


def load(directory: Path) -> ProcessServerInstructions | None:
    """The last instructions; None when there never were any.

    Raises:
        PermanentError: the file is damaged, or others may read it.
    """
    path = directory / ASSIGNMENTS_FILE
    if not path.exists():
        return None
    data = read_file(path, what="the last assignments", secret=True)
    try:
        return ProcessServerInstructions.from_json(data)
    except PermanentError:
        raise PermanentError(
            f"{path} is damaged", hint="remove it; the config server says it all again", path=str(path)
        ) from None
