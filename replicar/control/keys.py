"""How the name of a data key, which the registry knows as text, becomes the number that segments and log blobs carry.

Process server and recovery both go from one to the other, so the rule stands here once.
"""

from __future__ import annotations

import uuid

from replicar.control.messages import MachineKey
from replicar.errors import PermanentError


def key_number(key_id: str) -> int:
    """The 64-bit number of a data key: the upper half of the UUID that names it, or the number that it is.

    Raises:
        PermanentError: it is neither.
    """
    try:
        number = int(key_id) if key_id.isascii() and key_id.isdigit() else uuid.UUID(key_id).int >> 64
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 64:
        raise PermanentError(
            f"{key_id!r} names no data key",
            hint="the config server may be of another version: compare `--version` on both",
            key_id=key_id,
        )
    return number


def data_keys(key: MachineKey) -> dict[int, bytes]:
    """All data keys of a machine that the config server gave, the former ones too, by number."""
    former = {key_number(each.key_id): each.data_key_bytes() for each in key.former_keys}
    return {**former, key_number(key.key_id): key.data_key_bytes()}
