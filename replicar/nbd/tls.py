"""TLS for NBD clients on other machines: 1.3, and nobody without a certificate of the operator's authority.

The certificates are the operator's own, not the vault's: a hypervisor that opens a disk is no part of Replicar.

Weak: whoever has a certificate of that authority may open every disk of the machine.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from replicar.errors import PermanentError


def server_context(certificate: Path, key: Path, authority: Path, *, setting: str = "nbd_tls") -> ssl.SSLContext:
    """The context that NBD clients are met with.

    Args:
        certificate, key: what the server shows; PEM.
        authority: whose certificates clients have to show; PEM.
        setting: where the three are set, for errors.

    Raises:
        PermanentError: a file is missing, is no PEM, or is a key that others may read.
    """
    for what, path in (("certificate", certificate), ("key", key), ("authority", authority)):
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise PermanentError(
                f"{setting}: the {what} {path} can't be read: {error.strerror}", hint="check its path", path=str(path)
            ) from None
        if what == "key" and mode & 0o077:
            raise PermanentError(
                f"{setting}: the key {path} may be read by others (mode {mode & 0o777:o})",
                hint=f"chmod 600 {path}, and ask whether it has to be replaced",
                path=str(path),
            )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        raise PermanentError(
            f"{setting}: certificate, key and authority can't be used: {error}",
            hint="all three are PEM files, and the key is the certificate's",
            path=str(certificate),
        ) from None
    return context
