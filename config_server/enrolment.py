"""The rules for letting a part in: what must be proven, in which order, and what each refusal says.

The order matters. Nothing is told to someone who has not proven to know the passphrase, except that; then come the
clock, the nonce (each is taken once) and, for whoever is given keys (process servers, recovery workers), the
registration key. That key may be used by any number of them until it expires: it is a second proof with a short life,
not a ticket, and a single-use key would be spent by an enrolment whose answer was lost on the way.

Wrong proofs are counted by address and over all; beyond the limit an address waits, so that a passphrase can't be
tried out in a hurry.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from typing import Final

from config_server import parties
from config_server.vault import Vault
from replicar.control.admission import EnrolConfig, EnrolReply, EnrolRequest
from replicar.control.enrolment import ENROLLING_ROLES
from replicar.control.identity import Role
from replicar.control.messages import MAX_CLOCK_SKEW_SECONDS
from replicar.control.proofs import client_proof, registration_proof, same, server_proof
from replicar.errors import LimitError, PermanentError

MAX_WRONG_PER_MINUTE: Final = 10
MAX_WRONG_PER_MINUTE_OVERALL: Final = 60
#: Addresses remembered; the overall limit keeps it far below, whatever comes.
MAX_ADDRESSES: Final = 256
#: A request is fresh for the skew on either side of its time; a nonce must be remembered for longer than both.
NONCE_KEEP_SECONDS: Final = 3 * MAX_CLOCK_SKEW_SECONDS
_MINUTE: Final = 60.0


class AttemptLimit:
    """Counts wrong proofs within the last minute; `now` is monotonic seconds, handed in."""

    def __init__(self) -> None:
        self._wrong: dict[str, deque[float]] = {}
        self._overall: deque[float] = deque(maxlen=MAX_WRONG_PER_MINUTE_OVERALL)

    def check(self, address: str, now: float) -> None:
        """Raises:
        LimitError: this address, or all together, were wrong too often within the last minute.
        """
        mine = self._wrong.get(address)
        for times, limit in ((mine, MAX_WRONG_PER_MINUTE), (self._overall, MAX_WRONG_PER_MINUTE_OVERALL)):
            if times and len(times) >= limit and now - times[0] < _MINUTE:
                wait = int(_MINUTE - (now - times[0])) + 1
                raise LimitError(
                    f"too many wrong attempts to enrol: {limit} within a minute",
                    hint=f"check the passphrase, and try again in {wait} s",
                    status=429,
                    retry_after_seconds=wait,
                )

    def note_wrong(self, address: str, now: float) -> None:
        stale = [key for key, times in self._wrong.items() if now - times[-1] >= _MINUTE]
        for key in stale:
            del self._wrong[key]
        if address in self._wrong or len(self._wrong) < MAX_ADDRESSES:
            self._wrong.setdefault(address, deque(maxlen=MAX_WRONG_PER_MINUTE)).append(now)
        self._overall.append(now)


def check_clock(who: str, time_ns: int, now_ns: int) -> None:
    """Raises:
    PermanentError: a clock is more than five minutes off, either way; says by how much.
    """
    off_seconds = (time_ns - now_ns) / 1e9
    if abs(off_seconds) <= MAX_CLOCK_SKEW_SECONDS:
        return
    way = "ahead of" if off_seconds > 0 else "behind"
    raise PermanentError(
        f"the clock of {who} is {_interval(abs(off_seconds))} {way} the config server's "
        f"({parties.moment(now_ns)}); {MAX_CLOCK_SKEW_SECONDS // 60} minutes are allowed",
        hint="set the clock that is wrong (`timedatectl set-ntp true` keeps it right), then try again",
        status=409,
        clock_off_seconds=round(off_seconds, 3),
    )


def check_passphrase(key: bytes, request: EnrolRequest) -> None:
    """Raises:
    PermanentError: the request's proof is not one by this vault's passphrase.
    """
    if not same(client_proof(key, request), request.proof):
        raise PermanentError(
            "wrong passphrase for this vault",
            hint="use the file `passphrase` that `config-server init` wrote into the vault's directory",
            status=403,
        )


def enrol(connection: sqlite3.Connection, vault: Vault, request: EnrolRequest, now_ns: int) -> EnrolReply:
    """Let a part in whose passphrase was checked: as one transaction, to the reply with its proof.

    Raises:
        PermanentError: role, clock, nonce, registration key or signing request are not as they must be.
        LimitError: the vault is full.
    """
    role = next((role for role in ENROLLING_ROLES if role == request.role), None)
    if role is None:
        raise PermanentError(
            f"a {request.role} is not enrolled over the network",
            hint="use `config-server operator` instead",
            status=400,
        )
    who = f"{role} {request.name}"
    check_clock(who, request.time_ns, now_ns)
    if not parties.take_nonce(connection, request.nonce, now_ns, NONCE_KEEP_SECONDS):
        raise PermanentError("this request to enrol was used before", hint="run the part's `enrol` again", status=409)
    if role is not Role.MACHINE:
        check_registration(connection, request, now_ns)
    party = parties.admit(connection, role, request.name, now_ns)
    certificate = vault.authority.issue(request.csr.encode(), role, party.id, now_ns)
    parties.record_certificate(connection, party.id, certificate)
    parties.audit(connection, party.id, "enrol", who, now_ns)
    config = EnrolConfig(vault=vault.name, vault_id=vault.id, incarnation=party.incarnation)
    pem, authority = certificate.pem.decode(), vault.authority.certificate_pem.decode()
    proof = server_proof(
        vault.enrolment_key,
        nonce=request.nonce,
        party_id=party.id,
        certificate=pem,
        authority=authority,
        config=config,
    )
    return EnrolReply(id=party.id, certificate=pem, authority=authority, config=config, proof=proof)


def check_registration(connection: sqlite3.Connection, request: EnrolRequest, now_ns: int) -> None:
    """Raises:
    PermanentError: the registration key is missing, unknown, not proven, or expired (which says when).
    """
    hint = "make a new one where the vault is: `config-server registration-key`"
    known = parties.registration_key(connection, request.registration_key_id)
    if known is None or not same(registration_proof(known[0], request), request.registration_proof):
        raise PermanentError("this is no registration key of this vault", hint=hint, status=403)
    if now_ns >= known[1]:
        raise PermanentError(
            f"the registration key expired at {parties.moment(known[1])}",
            hint=hint,
            status=403,
            expired_ns=known[1],
        )


def _interval(seconds: float) -> str:
    if seconds < 7200:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{seconds / 3600:.1f} hours" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
