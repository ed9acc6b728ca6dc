"""A real Azurite over HTTPS, for the demo and the tests: started on a free port, gone when its owner is.

Azurite is Microsoft's own emulator of blob storage, so what is tested against it is tested against the protocol as
they understand it. It is not Azure: it takes sizes and alignments that Azure refuses, so the limits are enforced on our
side, and it is single-threaded, so no figure measured against it says anything about Azure.

Each start makes a throw-away authority and a certificate of it for 127.0.0.1. Clients get the authority's file and
verify as they would in earnest; the authority's key is never written down.

Azurite must not outlive its owner, even one that is killed. So it holds the reading end of a pipe whose writing end
only the owner has: when the owner dies, however it dies, the kernel closes the pipe and Azurite ends. A parent-death
signal would not do, since it follows the *thread* that forked, which in asyncio may end long before the process.

Weak: a child that the owner forks without exec keeps the pipe open too, and Azurite then lives as long as that child.
"""

from __future__ import annotations

import asyncio
import datetime
import http.client
import ipaddress
import os
import re
import ssl
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from replicar.errors import PermanentError, TransientError

INSTALLATION = Path(__file__).resolve().parents[1] / ".azurite"
"""Where `make setup` puts Azurite and the Node it runs on."""

ACCOUNT_NAME = "devstoreaccount1"
# The account and key that every Azurite has, published by Microsoft in its documentation; it guards nothing.
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

#: A name that no DNS knows, which the certificate is good for besides: a private endpoint's.
PRIVATE_NAME = "storage.invalid"

START_LIMIT_SECONDS = 60.0
STOP_LIMIT_SECONDS = 10.0
POLL_SECONDS = 0.05
CERTIFICATE_DAYS = 30

_HOST = "127.0.0.1"
_LISTENING = re.compile(rb"successfully listen\w+ (?:at|on) https://[^:\s]+:(\d+)")
_LOG_TAIL_BYTES = 4096

# Run by Node before Azurite: end when standard input does. `unref`, so that the pipe alone keeps no Azurite alive that
# has closed everything else.
_END_WITH_OWNER = "data:text/javascript,process.stdin.on('end',()=>process.exit(1)).resume().unref()"


class Azurite:
    """One Azurite, as a synchronous or an asynchronous context manager; it can be started again after it stopped.

    Args:
        directory: made if need be; takes the certificate, Azurite's log and, unless `in_memory`, the blobs.
        in_memory: keep the blobs in memory only; they are gone when it stops. Otherwise a start in the same directory
            finds them again.
        port: the TCP port on 127.0.0.1; 0 takes a free one, and a later start of this object keeps it.

    Raises (from start):
        PermanentError: Azurite is not installed, or ended at once (its port is taken, its directory is not writable).
        TransientError: it did not answer within `START_LIMIT_SECONDS`.
    """

    account_name = ACCOUNT_NAME
    account_key = ACCOUNT_KEY

    def __init__(self, directory: Path, *, in_memory: bool, port: int = 0) -> None:
        self.directory = directory.resolve()
        self.in_memory = in_memory
        self.port = port
        self.authority_file = self.directory / "azurite-authority.pem"
        self._certificate_file = self.directory / "azurite-certificate.pem"
        self._key_file = self.directory / "azurite-key.pem"
        self._log_file = self.directory / "azurite.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def blob_endpoint(self) -> str:
        """`https://127.0.0.1:PORT/ACCOUNT`, as azure-storage-blob wants its `account_url`; known once started."""
        if self.port == 0:
            raise ValueError("the endpoint has no port before Azurite is started")
        return f"https://{_HOST}:{self.port}/{ACCOUNT_NAME}"

    @property
    def process_id(self) -> int | None:
        """The process, while there is one."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start, and return when it answers requests."""
        deadline = self._launch()
        try:
            while not self._answers(deadline):
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Ask it to end, which writes what it has to disk; kill it if it does not. Stopping twice is fine."""
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        self._reap(process)

    def kill(self) -> None:
        """End it at once, as a power failure would."""
        if self._process is not None:
            self._process.kill()
            self._reap(self._process)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        deadline = self._launch()
        try:
            while not await asyncio.to_thread(self._answers, deadline):
                await asyncio.sleep(POLL_SECONDS)  # another process tells us nothing but by being asked
        except BaseException:  # cancelled while waiting, too
            self.kill()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    def _launch(self) -> float:
        """Start the process; the monotonic time by which it has to answer."""
        if self._process is not None:
            raise ValueError("this Azurite is running already")
        node = INSTALLATION / "bin" / "node"
        program = INSTALLATION / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
        for file in (node, program):
            if not file.exists():
                raise PermanentError(f"Azurite is not installed: there is no {file}", hint="run: make setup")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write_certificate()
        command = [str(node), "--import", _END_WITH_OWNER, str(program)]
        command += ["--blobHost", _HOST, "--blobPort", str(self.port)]
        command += ["--cert", str(self._certificate_file), "--key", str(self._key_file)]
        # The account is the first part of the path, as in `blob_endpoint`, and never guessed from the host name.
        # Tokens as well as keys: their dates and addressee are looked at, their signatures are not.
        command += ["--oauth", "basic"]
        command += ["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--disableProductStyleUrl"]
        command += ["--inMemoryPersistence"] if self.in_memory else ["--location", str(self.directory)]
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, cwd=self.directory
            )
        return time.monotonic() + START_LIMIT_SECONDS

    def _answers(self, deadline: float) -> bool:
        """Whether it answers over TLS by now; raises when it has ended or the deadline is past."""
        process = self._process
        assert process is not None
        log = self._log_file.read_bytes()
        if process.poll() is not None:
            raise PermanentError(
                f"Azurite ended at once with status {process.returncode}: {_last_line(log)}",
                hint=f"its port or its directory may be taken; see {self._log_file}",
                port=self.port,
            )
        listening = _LISTENING.search(log)
        if listening is not None and self._answers_on(int(listening[1])):
            self.port = int(listening[1])
            return True
        if time.monotonic() > deadline:
            raise TransientError(
                f"Azurite did not answer within {START_LIMIT_SECONDS:.0f} s", hint=f"see {self._log_file}"
            )
        return False

    def _answers_on(self, port: int) -> bool:
        context = ssl.create_default_context(cafile=str(self.authority_file))
        connection = http.client.HTTPSConnection(_HOST, port, timeout=5, context=context)
        try:
            # Without a signature the answer is a refusal, and a refusal is an answer.
            connection.request("GET", f"/{ACCOUNT_NAME}?comp=list")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return True

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        stdin: IO[bytes] | None = process.stdin
        if stdin is not None:
            stdin.close()
        self._process = None

    def _write_certificate(self) -> None:
        authority_key = ec.generate_private_key(ec.SECP256R1())
        authority = _certificate("Azurite throw-away authority", authority_key, issuer=None, issuer_key=authority_key)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(_HOST, key, issuer=authority, issuer_key=authority_key)
        self.authority_file.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
        self._certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self._key_file.unlink(missing_ok=True)
        with os.fdopen(os.open(self._key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    *,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    """A certificate of `issuer` for a server on 127.0.0.1, or an authority's own where there is no issuer.

    It has all the extensions that strict verification (Python 3.13's default) asks for.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    is_authority = issuer is None
    usage = x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not is_authority:
        names = [x509.IPAddress(ipaddress.ip_address(_HOST)), x509.DNSName("localhost"), x509.DNSName(PRIVATE_NAME)]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _last_line(log: bytes) -> str:
    lines = log[-_LOG_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
