"""A stand-in for Azure Resource Manager: there is none to be had here.

It keeps resources as they are put, by path, over HTTPS, and answers as the reference of its REST API says: 200 with
the resource, 404 with an error object, long operations by `Azure-AsyncOperation`. What a test wants to go wrong it puts
into `troubles`; with `hold_at` it carries the so-manieth request out and never answers it. With `content` disks and
snapshots have bytes, and links to read them. It knows nothing of what Azure would refuse.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import defaultdict
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.recovery.compute.managed_disks import ManagedDisks

SUBSCRIPTION = "11111111-2222-3333-4444-555555555555"
GROUP = f"/subscriptions/{SUBSCRIPTION}/resourceGroups/recovered"
NETWORKS = f"{GROUP}/providers/Microsoft.Network/virtualNetworks"
MACHINES = f"{GROUP}/providers/Microsoft.Compute/virtualMachines"


class ResourceManager:
    """An asynchronous context manager; `endpoint` is where it listens."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._tls.load_cert_chain(certificate, key)
        self.endpoint = ""
        self.resources: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.troubles: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
        self.console = b""
        self.power = "PowerState/running"
        self.content: ManagedDisks | None = None
        self.hold_at = 0
        self.held = asyncio.Event()
        self._ended = asyncio.Event()
        self._polls = 0

    async def __aenter__(self) -> ResourceManager:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls).start()
        self.endpoint = f"https://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended.set()
        await self._runner.cleanup()

    def paths(self, kind: str) -> list[str]:
        return sorted(path for path in self.resources if f"/{kind}/" in path)

    async def _answer(self, request: web.Request) -> web.Response:
        self.requests.append((request.method, request.path))
        holds = len(self.requests) == self.hold_at
        answer = await self._answered(request, request.method, request.path)
        if holds:
            self.held.set()
            await self._ended.wait()
        return answer

    async def _answered(self, request: web.Request, method: str, path: str) -> web.Response:
        if path == "/console":
            return web.Response(body=self.console)
        if path == "/screen":
            return web.Response(body=b"BM a picture")
        if path.startswith("/exported/") and self.content is not None:
            return await self.content.answer(request)
        self.tokens.add(request.headers.get("Authorization", ""))
        kind = path.split("/")[-2]
        if self.troubles[method, kind]:
            status, code = self.troubles[method, kind].pop(0)
            headers = {"Retry-After": "0"} if status in (429, 503) else {}
            return _json({"error": {"code": code, "message": f"{code} it is"}}, status, headers)
        if path.startswith("/operations/access/") and self.content is not None:
            return _json({"accessSAS": self.endpoint + self.content.link(path.rpartition("/")[2])})
        if path.startswith("/operations/"):
            self._polls += 1
            return _json({"status": "Succeeded" if self._polls % 2 == 0 else "InProgress"}, 200, {"Retry-After": "0"})
        if method == "PUT":
            return await self._put(path, json.loads(await request.read()))
        if method == "DELETE":
            if path in self.resources and kind in ("disks", "snapshots") and self.content is not None:
                await self.content.delete(path.rpartition("/")[2])
            return web.Response(status=200 if self.resources.pop(path, None) else 204)
        if method == "POST":
            return self._post(path)
        return self._get(path)

    async def _put(self, path: str, body: dict[str, Any]) -> web.Response:
        name, properties = path.rpartition("/")[2], body.setdefault("properties", {})
        properties["provisioningState"] = "Succeeded"
        if "/snapshots/" in path and self.content is not None:
            await self.content.snapshot(name, properties["creationData"]["sourceResourceId"].rpartition("/")[2])
        if "/disks/" in path and self.content is not None:
            properties["diskSizeBytes"] = await self.content.make(name, properties["creationData"]["sourceUri"])
        if "/virtualMachines/" in path:
            storage, self.power = properties["storageProfile"], "PowerState/running"
            for disk in (storage["osDisk"], *storage["dataDisks"]):
                self.resources[disk["managedDisk"]["id"]]["managedBy"] = path
        self.resources[path] = {**body, "id": path, "name": name}
        return _json(
            self.resources[path],
            202 if path.split("/")[-2] in ("disks", "snapshots") else 201,
            {"Azure-AsyncOperation": f"{self.endpoint}/operations/{len(self.requests)}", "Retry-After": "0"},
        )

    def _post(self, path: str) -> web.Response:
        machine, _, action = path.rpartition("/")
        if machine not in self.resources:
            return _absent(path)
        if action == "retrieveBootDiagnosticsData":
            links = {"serialConsoleLogBlobUri": f"{self.endpoint}/console"}
            return _json({**links, "consoleScreenshotBlobUri": f"{self.endpoint}/screen"})
        if action == "beginGetAccess":
            where = f"{self.endpoint}/operations/access/{machine.rpartition('/')[2]}"
            return web.Response(status=202, headers={"Location": where, "Retry-After": "0"})
        if action == "endGetAccess" and self.content is not None:
            self.content.take_back(machine.rpartition("/")[2])
        if action in ("powerOff", "deallocate"):
            self.power = "PowerState/stopped" if action == "powerOff" else "PowerState/deallocated"
        return web.Response(status=200)

    def _get(self, path: str) -> web.Response:
        if path.endswith("/instanceView"):
            return _json({"statuses": [{"code": "ProvisioningState/succeeded"}, {"code": self.power}]})
        if path in self.resources:
            return _json(self.resources[path])
        below = [self.resources[each] for each in self.resources if each.rpartition("/")[0] == path]
        return _json({"value": below}) if path.endswith(("networkInterfaces", "disks", "snapshots")) else _absent(path)


def _absent(path: str) -> web.Response:
    return _json({"error": {"code": "ResourceNotFound", "message": f"there is no {path}"}}, 404)


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response(body, status=status, headers=headers)
