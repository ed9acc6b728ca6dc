"""One HTTPS request to the config server, and everything that can become of it as an error of the one tree.

An address that nobody answers at is transient: config servers are restarted. A name or authority that does not verify,
and a certificate that is refused, are permanent. An answer that is an error is raised here as the class that the
server raised there, with its hint and fields. Nothing is tried twice; that is the caller's business.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn

import aiohttp

from replicar import errors
from replicar.control.messages import API_PREFIX, DEFAULT_PORT, MAX_REPLY_BYTES
from replicar.errors import LimitError, PermanentError, ReplicarError, TransientError

CONNECT_SECONDS: Final = 10.0
#: What an answer may take beyond the time that the request itself asks the server to wait.
ANSWER_SECONDS: Final = 20.0
#: Less than the server's own 75 s, so that a request never races with the server closing an idle connection.
KEEP_ALIVE_SECONDS: Final = 30.0
MAX_CONNECTIONS: Final = 8
#: An answer that goes on says something every ten seconds; one that was silent for so long is lost.
SILENT_SECONDS: Final = 45.0

_CLASSES: Final[dict[str, type[ReplicarError]]] = {
    name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, ReplicarError)
}
_HINT: Final = "see whether `config-server run` is up there, and whether this part's config server address is right"


def parse_address(text: str) -> tuple[str, int]:
    """`host`, `host:port` or `[ipv6]:port` as (host, port); the port is 443 when none is given.

    Raises:
        PermanentError: it is none of these.
    """
    host, separator, port = text.rpartition(":")
    if not separator or (text.startswith("[") and text.endswith("]")):
        host, port = text, str(DEFAULT_PORT)
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    number = int(port) if port.isascii() and port.isdecimal() and len(port) <= 5 else 0
    bracketed = bare != host
    if not bare or not 1 <= number <= 65535 or (":" in bare) != bracketed or any(c in bare for c in "/@ []"):
        raise PermanentError(
            f"{text!r} is no address of a config server", hint="write it as host:port, as in config.example.org:443"
        )
    return bare, number


class Transport:
    """A session of HTTPS requests to one address; an asynchronous context manager.

    Args:
        address: `host:port`.
        context: what TLS verifies, and shows.
        server_hostname: the name to verify in the server's certificate; None where nothing is verified.
    """

    def __init__(self, address: str, context: ssl.SSLContext, *, server_hostname: str | None) -> None:
        self.host, self.port = parse_address(address)
        self._context = context
        self._server_hostname = server_hostname
        self._session: aiohttp.ClientSession | None = None

    @property
    def where(self) -> str:
        """The address for messages."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def __aenter__(self) -> Transport:
        connector = aiohttp.TCPConnector(
            ssl=self._context, limit=MAX_CONNECTIONS, keepalive_timeout=KEEP_ALIVE_SECONDS, force_close=False
        )
        self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        query: Mapping[str, str] | None = None,
        wait_seconds: float = 0.0,
    ) -> bytes:
        """The body of the answer to `method` `/v1<path>`.

        Raises:
            ReplicarError: whatever the server answered, or TransientError / PermanentError for the way there.
        """
        if self._session is None:
            raise RuntimeError("use the client as an asynchronous context manager: `async with`")
        try:
            async with self._session.request(
                method,
                f"https://{self.where}{API_PREFIX}{path}",
                data=body,
                params=query,
                headers={"Content-Type": "application/json"} if body is not None else None,
                server_hostname=self._server_hostname,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=wait_seconds + ANSWER_SECONDS, sock_connect=CONNECT_SECONDS),
            ) as response:
                data = await self._read(response)
                if response.status != 200:
                    self._raise_answer(response.status, data, response.headers)
                return data
        except (aiohttp.ClientError, OSError) as error:  # time-outs are an OSError too
            raise self._failure(error) from error

    @asynccontextmanager
    async def stream(
        self, path: str, *, query: Mapping[str, str], headers: Mapping[str, str]
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The pieces of an answer that goes on, to GET `/v1<path>`; the context is entered once it has begun.

        Raises:
            ReplicarError: as `request`, before the answer or within it.
        """
        if self._session is None:
            raise RuntimeError("use the client as an asynchronous context manager: `async with`")
        try:
            response = await self._session.get(
                f"https://{self.where}{API_PREFIX}{path}",
                params=query,
                headers=headers,
                server_hostname=self._server_hostname,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS),
            )
        except (aiohttp.ClientError, OSError) as error:
            raise self._failure(error) from error
        try:
            if response.status != 200:
                self._raise_answer(response.status, await self._read(response), response.headers)
            yield self._pieces(response)
        except aiohttp.ClientError as error:  # of the connection: nobody else in here raises those
            raise self._failure(error) from error
        finally:
            response.close()

    async def _pieces(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        try:
            async for piece in response.content.iter_any():
                yield piece
        except (aiohttp.ClientError, OSError) as error:
            raise self._failure(error) from error

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        data = bytearray()
        async for chunk in response.content.iter_any():
            data += chunk
            if len(data) > MAX_REPLY_BYTES:
                raise LimitError(
                    f"the config server at {self.where} answered with more than {MAX_REPLY_BYTES} bytes",
                    hint="see whether that address really is a config server",
                )
        return bytes(data)

    def _raise_answer(self, status: int, data: bytes, headers: Mapping[str, str]) -> NoReturn:
        answer = _error_fields(data)
        if answer is None:
            kind = TransientError if status in (429, 502, 503, 504) else PermanentError
            raise kind(
                f"{self.where} answered {status}, and not in a config server's way",
                hint="see the config server's own log, and whether that address really is one",
                status=status,
            )
        name, message, hint = answer.pop("error"), answer.pop("message"), str(answer.pop("hint", ""))
        fields = {key: value for key, value in answer.items() if key.isidentifier() and key != "self"}
        cls = _CLASSES.get(name, TransientError if status >= 500 else PermanentError)
        if issubclass(cls, TransientError):
            fields["retry_after_seconds"] = _seconds(headers.get("Retry-After"))
        raise cls(message, hint=hint, **fields)

    def _failure(self, error: BaseException) -> ReplicarError:
        where: dict[str, Any] = {"host": self.host, "port": self.port}
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                reason = getattr(cause, "verify_message", "") or "its certificate does not verify"
                return PermanentError(
                    f"what answers at {self.where} is not this vault's config server: {reason}",
                    hint="check the config server's address and both clocks; if the vault was made anew, enrol again",
                    **where,
                )
            if isinstance(cause, ssl.SSLError) and "ALERT" in (cause.reason or ""):
                return PermanentError(
                    f"the config server at {self.where} refuses this part's certificate ({cause.reason})",
                    hint="enrol this part again with the vault that this config server serves",
                    **where,
                )
        if isinstance(error, TimeoutError):
            return TransientError(f"the config server at {self.where} did not answer in time", hint=_HINT, **where)
        if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError) and self._server_hostname:
            # refused certificates look like this too: see `replicar.tls`
            hint = f"{_HINT}; its log tells if it refused this part's certificate"
        else:
            hint = _HINT
        reason = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        return TransientError(f"can't reach the config server at {self.where}: {reason}", hint=hint, **where)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from; aiohttp keeps some causes in `os_error` only."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or current in seen:
            continue
        seen.append(current)
        yield current
        waiting += [current.__cause__, current.__context__, getattr(current, "os_error", None)]
        waiting += [arg for arg in current.args if isinstance(arg, BaseException)]


def _error_fields(data: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or not isinstance(fields.get("message"), str):
        return None
    return fields if isinstance(fields.get("error"), str) else None


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isascii() and text.isdecimal() else None
