"""Whether a machine's stream can go on here, as a pure function of both sides' state."""

from __future__ import annotations

from replicar.errors import ConflictError, PermanentError
from replicar.formats import wire
from replicar.formats.frame import may_begin_anew
from replicar.formats.wire import Hello, Welcome


def admit(hello: Hello, next_sequence: int, stored_sequence: int) -> Welcome:
    """Answer a HELLO.

    Args:
        next_sequence: what this server wants next.
        stored_sequence: where the log in storage ends.

    Raises:
        PermanentError: no protocol version in common.
        ConflictError: the agent no longer has what is wanted, or has less than was already received.
    """
    if wire.VERSION not in hello.versions:
        raise PermanentError(
            f"the agent of machine {hello.machine_id} speaks versions {list(hello.versions)}, not {wire.VERSION}",
            hint="upgrade the older of the two parts",
        )
    if hello.first_sequence <= next_sequence <= hello.next_sequence:
        return Welcome(next_sequence, stored_sequence)
    if hello.first_sequence > next_sequence and may_begin_anew(hello.first_sequence):
        # The log was lost, or its tail: what it holds begins with a gap, and intake sees to it that it does.
        return Welcome(hello.first_sequence, stored_sequence)
    if hello.first_sequence > next_sequence:
        what, hint = (
            f"the agent's change log begins at sequence {hello.first_sequence}, but {next_sequence} is needed next",
            "was the container or a log blob deleted? Bring it back, or enrol the machine again to start anew",
        )
    else:
        what, hint = (
            f"the agent's change log ends before sequence {hello.next_sequence}, but {next_sequence - 1} was received",
            "was the agent's state directory put back from a copy? Enrol the machine again to start anew",
        )
    raise ConflictError(
        f"machine {hello.machine_id}: {what}",
        hint=hint,
        ours={"next_sequence": next_sequence, "stored_sequence": stored_sequence},
        theirs={"first_sequence": hello.first_sequence, "next_sequence": hello.next_sequence},
    )
