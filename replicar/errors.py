"""The one tree of errors that every part of Replicar raises.

An error is caught by what can be done about it, so the classes are answers to "what now?", not places where things
went wrong:

=================== ===============================================================================================
`TransientError`    try again later; nothing was decided (a time-out, a 503, a process server that is away)
`PermanentError`    trying again gives the same answer; somebody has to change something (a wrong passphrase)
`CorruptionError`   bytes are not what they were written as; says what, where, and which promise that touches
`FencedError`       somebody newer owns this stream now; stop writing at once
`ConflictError`     two histories disagree; carries both, so that a person can choose
`LimitError`        a named bound was reached; says which, and what it is set to
=================== ===============================================================================================

Every error has a `message` (what happened and to what), a `hint` (the next step for the operator) and `fields` (the
machine, disk, sequence, path... as data, for logs and `--json`). A programmer's error is none of these: it stays a
`ValueError` or an `AssertionError` and stops the task group it happens in.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ReplicarError(Exception):
    """Root of the tree. `exit_status` is what a command line ends with when nobody handles the error.

    Args:
        message: what happened, to what; one sentence without a trailing full stop.
        hint: the next step for whoever reads it; empty when there is none.
        fields: the same facts as data (JSON-serialisable values only, never a secret).
    """

    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.fields: dict[str, Any] = fields

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def as_dict(self) -> dict[str, Any]:
        """The error as JSON-serialisable data: `error` (the class), `message`, `hint`, and the fields."""
        return {"error": type(self).__name__, "message": self.message, "hint": self.hint, **self.fields}


class TransientError(ReplicarError):
    """Try again: the world was in the way. `retry_after_seconds` is what the other side asked for, if it did."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h

    def __init__(
        self, message: str, *, hint: str = "", retry_after_seconds: float | None = None, **fields: Any
    ) -> None:
        super().__init__(message, hint=hint, **fields)
        self.retry_after_seconds = retry_after_seconds


class PermanentError(ReplicarError):
    """The same request will get the same answer until somebody changes something."""

    exit_status = 1


class CorruptionError(ReplicarError):
    """Bytes that fail their checksum, their seal or their place in the chain. Never worked around silently."""

    exit_status = 3


class FencedError(ReplicarError):
    """A newer writer owns the stream; whoever gets this must stop writing and must not retry."""

    exit_status = 4


class ConflictError(ReplicarError):
    """Two histories that can't both be true. `ours` and `theirs` say what each side holds."""

    exit_status = 5

    def __init__(self, message: str, *, hint: str = "", ours: Any = None, theirs: Any = None, **fields: Any) -> None:
        super().__init__(message, hint=hint, ours=ours, theirs=theirs, **fields)
        self.ours = ours
        self.theirs = theirs


class LimitError(ReplicarError):
    """A named limit was reached; asking for less, or raising the limit, is the way on."""

    exit_status = 6
