"""The agent's own program, and a witness of its freezes: `python witness.py NOTES run --settings ...`.

While the file systems are frozen for a point and all that is dirty was read, the witness hashes the files under the
traced loop devices, and appends the hashes to NOTES: what the disks were at that point, whatever the agent read of
them. Nothing else of the agent is another than it is; the freeze takes as much longer as the witness does.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from mobility_agent.capture.trace import capture
from mobility_agent.capture.trace.freeze import Freeze
from mobility_agent.capture.trace.stage import Stage
from mobility_agent.cli import main


class WitnessStage(Stage):
    """A stage that notes what the disks hold when it has been read."""

    notes: Path

    def read(self, freeze: Freeze) -> bool:
        done = super().read(freeze)
        if done:
            seen = {disk.name: _digest(_backing(disk.path)) for disk, _ in self._taken}
            with self.notes.open("a") as file:
                file.write(json.dumps(seen) + "\n")
        return done


def _backing(device: Path) -> Path:
    return Path((Path("/sys/block") / device.name / "loop/backing_file").read_text().strip())


def _digest(image: Path) -> str:
    with image.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seen(notes: Path) -> dict[str, str]:
    """What the last witness saw: each disk's SHA-256."""
    found: dict[str, str] = json.loads(notes.read_text().splitlines()[-1])
    return found


if __name__ == "__main__":
    WitnessStage.notes = Path(sys.argv.pop(1))
    capture.Stage = WitnessStage  # type: ignore[attr-defined]
    main()
