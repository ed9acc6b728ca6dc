"""The messages by which a part is let in and stays in (vault, enrolment, renewal), by the rules of `messages`."""

from __future__ import annotations

import uuid
from typing import Annotated

from pydantic import StringConstraints

from replicar.control.message import Count, Digest, Message, Name, Pem


class VaultInfo(Message):
    """GET /v1/vault, public: what a part needs to prove that it knows the passphrase. `id` is the salt."""

    id: uuid.UUID
    name: Name
    time_ns: Count


class EnrolRequest(Message):
    """POST /v1/enrol, public: what proves itself is the content (see `proofs`), not the connection.

    A process server adds the id of a registration key and a proof of knowing it; the key itself is not sent.
    """

    role: Annotated[str, StringConstraints(max_length=32)]
    name: Name
    csr: Pem
    nonce: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    time_ns: Count
    registration_key_id: Annotated[str, StringConstraints(max_length=64)] = ""
    registration_proof: Digest = ""
    proof: Digest


class EnrolConfig(Message):
    """What a newly enrolled part is told about itself."""

    vault: Name
    vault_id: uuid.UUID
    incarnation: Count


class EnrolReply(Message):
    """The new identity. `proof` is over the other fields and the request's nonce; a wrong one is refused."""

    id: uuid.UUID
    certificate: Pem
    authority: Pem
    config: EnrolConfig
    proof: Digest


class RenewRequest(Message):
    """POST /v1/certificates: a request by the key of the certificate the caller shows."""

    csr: Pem


class RenewReply(Message):
    certificate: Pem
