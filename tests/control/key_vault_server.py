"""A MOCK of Azure Key Vault: a local HTTPS server that speaks as much of its documented REST interface as is used.

There is no emulator of Key Vault, and no account to try the real one with. So what is shown against this is what the
real client libraries send and what is made of the answers: the challenge for a token, GET of a key, wrapkey and
unwrapkey with a real RSA key, refusals and failures. That Azure itself answers so is what its documentation says
(Key Vault REST API 7.x, "Authentication, requests and responses") and nothing that was tried.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import NameOID

TOKEN = "a-token-of-the-test"
_OAEP = padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=None)


class KeyVaultServer:
    """Serves one key, `vault-key`, in as many versions as `rotate` made; a context manager.

    Attributes:
        refuse: what it answers to every use of a key instead, while it is not 0.
        calls: what it was asked, in order: "get", "wrapkey 1", ...
    """

    def __init__(self, directory: Path) -> None:
        self.authority_file = directory / "key-vault.pem"
        self.refuse = 0
        self.calls: list[str] = []
        self.versions = [rsa.generate_private_key(65537, 2048)]
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(key)
        self.authority_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        chain = directory / "key-vault-key.pem"
        chain.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.authority_file, chain)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def key_url(self) -> str:
        return f"https://127.0.0.1:{self._server.server_port}/keys/vault-key"

    def rotate(self) -> None:
        self.versions.append(rsa.generate_private_key(65537, 2048))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def describe(self, version: int) -> dict[str, Any]:
        numbers = self.versions[version - 1].public_key().public_numbers()
        return {
            "key": {
                "kid": f"{self.key_url}/{version}",
                "kty": "RSA",
                "key_ops": ["wrapKey", "unwrapKey"],
                "n": _encoded(numbers.n.to_bytes(256, "big")),
                "e": _encoded(numbers.e.to_bytes(3, "big")),
            },
            "attributes": {"enabled": True},
        }

    def use(self, version: int, operation: str, value: bytes) -> bytes:
        key = self.versions[version - 1]
        return key.public_key().encrypt(value, _OAEP) if operation == "wrapkey" else key.decrypt(value, _OAEP)


def _handler(vault: KeyVaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            words = self.path.partition("?")[0].strip("/").split("/")
            self._answer("get", lambda _: vault.describe(int(words[2]) if len(words) > 2 else len(vault.versions)))

        def do_POST(self) -> None:
            words = self.path.partition("?")[0].strip("/").split("/")
            version, operation = int(words[2]), words[3]

            def use(body: dict[str, Any]) -> dict[str, Any]:
                assert body["alg"] == "RSA-OAEP-256"
                value = vault.use(version, operation, _decoded(body["value"]))
                return {"kid": f"{vault.key_url}/{version}", "value": _encoded(value)}

            self._answer(f"{operation} {version}", use)

        def _answer(self, call: str, work: Any) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                challenge = 'Bearer authorization="https://login.example/tenant", resource="https://vault.azure.net"'
                self._send(401, {"error": {"code": "Unauthorized"}}, {"WWW-Authenticate": challenge})
                return
            vault.calls.append(call)
            if vault.refuse and call != "get":
                self._send(vault.refuse, {"error": {"code": "Forbidden", "message": "refused by the test"}})
                return
            self._send(200, work(json.loads(body) if body else {}))

        def _send(self, status: int, data: dict[str, Any], headers: dict[str, str] | None = None) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: a test's output is the test's."""

    return Handler


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "key vault")]), datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
