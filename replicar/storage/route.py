"""The way to the service: straight, through an HTTP proxy, or to an address that stands in for the name.

`proxy`: connections are asked of it by CONNECT, and TLS goes through it end to end, so it sees host and port and
nothing else. `connect_to`: a private endpoint's address, for hosts whose DNS does not know it; the certificate is still
the one of the endpoint's name, so an address that belongs to somebody else is refused.

Nothing is taken from the environment: what the settings don't say does not happen.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult

from replicar.errors import PermanentError

#: A proxy's answer to CONNECT; more is none.
MAX_ANSWER_BYTES: Final = 16 << 10
_TUNNEL_OK: Final = 200


@dataclass(frozen=True, slots=True)
class Route:
    """How connections are made. `proxy` is `http://HOST:PORT`; `authorization` is what it wants to hear, if any."""

    proxy: str | None = None
    authorization: str | None = field(default=None, repr=False)
    connect_to: str | None = None

    def first_hop(self, host: str, port: int) -> tuple[str, int]:
        """Where the TCP connection goes."""
        if self.proxy is not None:
            parts = urlsplit(self.proxy)
            return parts.hostname or "", parts.port or 80
        return self.connect_to or host, port

    def proxy_headers(self) -> dict[str, str]:
        """What CONNECT carries besides."""
        return {"Proxy-Authorization": self.authorization} if self.authorization is not None else {}

    async def through(self, plain: socket.socket, host: str, port: int) -> None:
        """Have the proxy, if there is one, connect `plain` with the service.

        Raises:
            OSError: it refuses, or says nothing that makes sense.
        """
        if self.proxy is None:
            return
        loop = asyncio.get_running_loop()
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
        lines += [f"{name}: {value}" for name, value in self.proxy_headers().items()]
        await loop.sock_sendall(plain, "\r\n".join([*lines, "", ""]).encode("ascii"))
        answer = b""
        while b"\r\n\r\n" not in answer:
            # Byte for byte near the end would be needed if the service spoke first; in TLS and HTTP the client does.
            more = await loop.sock_recv(plain, MAX_ANSWER_BYTES - len(answer))
            if not more:
                raise ConnectionError("the proxy hung up")
            answer += more
        words = answer.split(b"\r\n", 1)[0].split(b" ", 2)
        if len(words) < 2 or words[1] != str(_TUNNEL_OK).encode():
            raise ConnectionError(f"the proxy answers {words[1:2]}")


STRAIGHT: Final = Route()


class Fixed(AbstractResolver):
    """A resolver for aiohttp that knows one address, whatever the name."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        kind = socket.AF_INET6 if ipaddress.ip_address(self._address).version == 6 else socket.AF_INET
        flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return [ResolveResult(hostname=host, host=self._address, port=port, family=kind, proto=0, flags=int(flags))]

    async def close(self) -> None:
        """Nothing is open."""


def check_proxy(proxy: str) -> None:
    """Raises:
    PermanentError: it is no `http://HOST:PORT`.
    """
    parts = urlsplit(proxy)
    if parts.username or parts.password or parts.path.strip("/") or parts.query:
        raise PermanentError(
            "storage: the proxy holds more than scheme, host and port",
            hint="put name and password into proxy_credentials_file, as NAME:PASSWORD",
        )
    if parts.scheme != "http" or not parts.hostname:
        raise PermanentError(f"storage: {proxy!r} is no proxy", hint="it looks like http://HOST:PORT")


def check_connect_to(address: str, endpoint: str) -> None:
    """Raises:
    PermanentError: it is no address, or the endpoint has no name that it could stand for.
    """
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise PermanentError(
            f"storage: connect_to {address!r} is no IP address", hint="set it to the private endpoint's address"
        ) from None
    host = urlsplit(endpoint).hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return
    raise PermanentError(
        f"storage: connect_to stands for the name of the endpoint, and {host} is an address",
        hint="set endpoint to the account's name, https://NAME.blob.core.windows.net",
    )


def basic(credentials: str) -> str:
    """The header for NAME:PASSWORD."""
    return "Basic " + base64.b64encode(credentials.encode()).decode()
