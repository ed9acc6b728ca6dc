"""Keeps a log up in a process of its own, which kills itself on request: `python -m tests.recovery.folding_process`.

What to do comes as JSON on standard input, since it has the data key. It prints what came of it. `kill_at`: the storage
operation, from 0, at which the process ends by SIGKILL: before it, while it is under way, or after it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any, Final, cast

from recovery.chunks import MachineLog
from recovery.upkeep import keep_up
from replicar.clock import SystemClock
from replicar.log.tail import Stored
from replicar.storage import PageBlobStore, StorageTarget, open_store
from tests.recovery.scene import POLICY

WHEN: Final = ("before", "under way", "after")
_COUNTED: Final = frozenset(
    ("create", "put_pages", "clear_pages", "set_metadata", "delete", "acquire_lease", "break_lease", "release_lease")
) | frozenset(("read", "list", "page_ranges", "properties"))


@dataclass(frozen=True)
class ShiftedClock(SystemClock):
    """The system's clock, so many nanoseconds ahead."""

    offset_ns: int

    def now_ns(self) -> int:
        return time.time_ns() + self.offset_ns


class KillingStore:
    """Counts operations, and kills this process at one."""

    def __init__(self, inner: PageBlobStore, kill_at: int, when: str) -> None:
        self._inner, self._left, self._when = inner, kill_at, when

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in _COUNTED:
            return found

        async def call(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            is_last = self._left == -1
            if is_last and self._when == "before":
                kill()
            going = asyncio.ensure_future(found(*arguments, **options))
            if is_last and self._when == "under way":
                await asyncio.wait((going,), timeout=0.002)  # the request is on its way, or in the middle of it
                kill()
            result = await going
            if is_last:
                kill()
            return result

        return call


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def main(order: dict[str, Any]) -> None:
    clock = ShiftedClock(order["offset_ns"])
    stored = Stored(order["number"], 0, bytes.fromhex(order["digest"]))
    async with open_store(StorageTarget.model_validate(order["target"])) as store:
        whole: PageBlobStore = store
        if order["kill_at"] is not None:
            whole = cast("PageBlobStore", KillingStore(store, order["kill_at"], order["when"]))
        log = MachineLog(whole, uuid.UUID(order["machine_id"]), {1: bytes.fromhex(order["key"])})
        kept = await keep_up(log, POLICY, clock=clock, random=os.urandom, stored=stored, every=2)
    done = kept.folded
    assert done is not None
    sys.stdout.write(json.dumps({"generation": done.generation, "decided": done.decided, "swept": done.swept}))


if __name__ == "__main__":
    asyncio.run(main(json.load(sys.stdin)))
