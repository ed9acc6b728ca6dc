"""TLS between the parts: 1.3 only, mutual, one private authority per vault, and names that are identities.

A certificate's DNS name is `<uuid>.<role>.replicar`. A client connects to an address but verifies that name, so
ordinary host-name verification *is* the identity check, and a part may move to another address without a new
certificate. A server learns who its client is from the same name in the client's verified certificate.

    context = client_context(identity)
    await asyncio.open_connection(host, 9443, ssl=context, server_hostname=server_name(Role.PROCESS_SERVER, server_id))

The system's list of authorities plays no part: a certificate of any other authority fails the handshake. What becomes
of that is worth knowing. With TLS 1.3 a client has finished its handshake before the server has looked at the client's
certificate, so a refused client learns of it at its first *read*, not when it connects. There it should see an alert,
and does from a blocking server; asyncio and uvloop make the alert but hang up without sending it. So a connection that
ends before its first byte may mean: this certificate is not wanted here.

Weak: there is no revocation at this level. The config server knows revoked certificates and refuses them; a process
server takes a removed machine out of its assignments instead.
"""

from __future__ import annotations

import ssl
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from replicar.control.identity import CERTIFICATE_FILE, CONFIG_SERVER_NAME, DOMAIN, KEY_FILE, Identity, Role, dns_name
from replicar.errors import PermanentError

__all__ = [
    "PeerIdentity",
    "Role",
    "client_context",
    "peer_identity",
    "reload_certificate",
    "server_context",
    "server_name",
]


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """Who is at the other end, as its verified certificate says. `serial` is the certificate's, upper-case hex."""

    role: Role
    id: uuid.UUID
    serial: str = field(default="", compare=False)


def server_context(identity: Identity, *, require_client: bool) -> ssl.SSLContext:
    """A context for a listening socket.

    Args:
        require_client: whether a client without a certificate is turned away. When false it may come without one (as
            for enrolment), but one that it shows must be of this vault's authority all the same.

    Raises:
        PermanentError: the identity's files can't be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED if require_client else ssl.CERT_OPTIONAL
    return _prepared(context, identity)


def client_context(identity: Identity) -> ssl.SSLContext:
    """A context for connecting; give `server_hostname` (see `server_name`), which is checked.

    Raises:
        PermanentError: the identity's files can't be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    assert context.check_hostname  # the type of context sees to it; everything here rests on it
    return _prepared(context, identity)


def reload_certificate(context: ssl.SSLContext, identity: Identity) -> None:
    """Have `context` use the certificate as it lies in the identity's directory now; open connections keep theirs.

    Raises:
        PermanentError: the files can't be used.
    """
    directory = _directory(identity)
    try:
        context.load_cert_chain(directory / CERTIFICATE_FILE, directory / KEY_FILE)
    except (OSError, ssl.SSLError) as error:
        raise PermanentError(
            f"can't use the certificate and key in {directory}: {error}",
            hint="enrol this part again",
            path=str(directory),
        ) from None


def server_name(role: Role, party_id: uuid.UUID | None = None) -> str:
    """The name to verify a server by; the config server may be addressed without its id."""
    if party_id is not None:
        return dns_name(party_id, role)
    if role is not Role.CONFIG_SERVER:
        raise ValueError(f"a {role} is verified by its id")
    return CONFIG_SERVER_NAME


def peer_identity(ssl_object: ssl.SSLObject | ssl.SSLSocket | None) -> PeerIdentity:
    """Who is at the other end; `ssl_object` is what `transport.get_extra_info("ssl_object")` returns.

    Raises:
        PermanentError: the peer showed no certificate, or one that names no identity.
    """
    certificate = ssl_object.getpeercert() if ssl_object is not None else None
    if not certificate:
        raise PermanentError(
            "the other side showed no certificate", hint="enrol it with the config server first", status=401
        )
    serial = str(certificate.get("serialNumber", ""))
    for entry in certificate.get("subjectAltName", ()):
        kind, name = str(entry[0]), str(entry[1])
        if kind == "DNS" and (found := _parse(name, serial)) is not None:
            return found
    raise PermanentError("the other side's certificate names no identity", hint="enrol it again", status=401)


def _parse(name: str, serial: str) -> PeerIdentity | None:
    labels = name.split(".")
    if len(labels) != 3 or labels[2] != DOMAIN:
        return None
    try:
        return PeerIdentity(Role(labels[1]), uuid.UUID(labels[0]), serial)
    except ValueError:
        return None


def _prepared(context: ssl.SSLContext, identity: Identity) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Strict as Python 3.13 is by default, on all versions alike.
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        context.load_verify_locations(cadata=identity.authority_pem.decode("ascii"))
    except (ValueError, ssl.SSLError) as error:
        raise PermanentError(f"can't use the authority's certificate: {error}", hint="enrol this part again") from None
    reload_certificate(context, identity)
    return context


def _directory(identity: Identity) -> Path:
    if identity.directory is None:
        raise ValueError("an identity must be saved before TLS can use it")
    return identity.directory
