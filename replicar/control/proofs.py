"""The arithmetic of enrolment: two sides that share a passphrase prove it to each other before either trusts the other.

    K            = scrypt(passphrase, salt = the vault's id)
    client proof = HMAC-SHA256(K, "replicar enrol client v1" | request)
    server proof = HMAC-SHA256(K, "replicar enrol server v1" | nonce, reply)
    registration = HMAC-SHA256(SHA256(registration key), "replicar enrol registration v1" | request)

The TLS below is not verified yet (there is nothing to verify it by), so whoever sits in between can read and change
everything but these proofs. It learns no secret: the passphrase, the registration key and the private key are never
sent. It can't enrol a key of its own, since the signing request is under the client's proof; nor pass off an authority
of its own, since certificate and authority are under the server's; nor use a request twice, since the server takes a
nonce once and a time only while it is fresh.

Weak: it can try passphrases against a proof it has seen. That is why the vault's passphrase is made by machine, with
160 random bits, and why K costs 64 MiB of memory: a passphrase chosen by a person would be the one weak link.

A proof covers a fixed list of fields (`v1` in its label), so that a later version may add fields without breaking it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import uuid
from typing import Any, Final

from pydantic import SecretStr

from replicar.control.admission import EnrolConfig, EnrolReply, EnrolRequest

#: OWASP's figures for scrypt (N = 2**16, r = 8, p = 1): 64 MiB and some 0.2 s.
SCRYPT_N: Final = 1 << 16
SCRYPT_R: Final = 8
SCRYPT_P: Final = 1
SCRYPT_MEMORY_BYTES: Final = 2 * 128 * SCRYPT_N * SCRYPT_R
KEY_BYTES: Final = 32

_REQUEST_FIELDS: Final = ("role", "name", "csr", "nonce", "time_ns", "registration_key_id")


def enrolment_key(passphrase: SecretStr, vault_id: uuid.UUID) -> bytes:
    """K: 32 bytes. Slow on purpose; call it off the event loop."""
    return hashlib.scrypt(
        passphrase.get_secret_value().encode(),
        salt=vault_id.bytes,
        n=SCRYPT_N,
        r=SCRYPT_R,
        p=SCRYPT_P,
        maxmem=SCRYPT_MEMORY_BYTES,
        dklen=KEY_BYTES,
    )


def registration_digest(key: SecretStr) -> bytes:
    """What the config server keeps of a registration key; it has 256 random bits, so one hash is enough."""
    return hashlib.sha256(key.get_secret_value().encode()).digest()


def registration_proof(digest: bytes, request: EnrolRequest) -> str:
    return _mac(digest, "replicar enrol registration v1", _request(request))


def client_proof(key: bytes, request: EnrolRequest) -> str:
    """The proof of a request, over everything in it but itself."""
    return _mac(
        key, "replicar enrol client v1", {**_request(request), "registration_proof": request.registration_proof}
    )


def server_proof(
    key: bytes, *, nonce: str, party_id: uuid.UUID, certificate: str, authority: str, config: EnrolConfig
) -> str:
    """The proof of a reply, bound to the request's nonce."""
    fields = {
        "nonce": nonce,
        "id": str(party_id),
        "certificate": certificate,
        "authority": authority,
        "vault": config.vault,
        "vault_id": str(config.vault_id),
        "incarnation": config.incarnation,
    }
    return _mac(key, "replicar enrol server v1", fields)


def is_server_proof(key: bytes, *, nonce: str, reply: EnrolReply) -> bool:
    expected = server_proof(
        key,
        nonce=nonce,
        party_id=reply.id,
        certificate=reply.certificate,
        authority=reply.authority,
        config=reply.config,
    )
    return same(expected, reply.proof)


def same(expected: str, given: str) -> bool:
    """Equality in time that tells nothing about where they differ."""
    return hmac.compare_digest(expected.encode(), given.encode())


def _request(request: EnrolRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in _REQUEST_FIELDS}


def _mac(key: bytes, label: str, fields: dict[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hmac.new(key, f"{label}\0{canonical}".encode(), hashlib.sha256).hexdigest()
