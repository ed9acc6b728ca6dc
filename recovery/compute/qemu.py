"""Machines on this host: QEMU, from NBD exports of a view or from raw files.

A machine is a directory, `root/<name>`, and a QEMU that outlives whoever started it: a worker that was killed finds it
again by its socket. Its disks are NBD clients that wait `RECONNECT_SECONDS` for an export that comes back, so a drill
goes on when the process that serves the view is replaced.

    machine.json   what it runs from
    pid            locked by QEMU as long as it lives
    qmp, console   Unix sockets: the machine protocol, the serial console
    console.log    all that the console said
    qemu.log       what QEMU itself had to say

Isolated means: QEMU's user-mode network with `restrict=on`, in which the guest reaches nothing, neither this host nor
beyond. Ports that a check may use are forwarded from loopback. QEMU itself runs without the right to start programs or
to gain privileges (its seccomp sandbox).

Weak: without KVM (`accelerator="tcg"`) instructions are emulated, some ten times slower. A socket's path is at most 107
bytes long, so `root` has to be short; a longer one is refused.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import socket
import time
from asyncio.subprocess import DEVNULL
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from recovery.compute import qmp
from recovery.compute.check import run_check
from recovery.compute.console import Console
from recovery.compute.machine import Bus, DiskSource, Finding, Firmware, MachineSpec, Power, Proof, Wanted
from replicar.errors import ConflictError, PermanentError, TransientError

PROGRAM: Final = "qemu-system-x86_64"
#: Where Debian's package `ovmf` puts the firmware.
UEFI_FIRMWARE: Final = Path("/usr/share/ovmf/OVMF.fd")
#: How long a guest's disk waits for its export to come back; requests stall meanwhile.
RECONNECT_SECONDS: Final = 300
#: What the AHCI controller of QEMU's q35 has.
SATA_PORTS: Final = 6
START_SECONDS: Final = 60.0
QUIT_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.1
_SOCKET_PATH_BYTES: Final = 107
_NBD_PORT: Final = 10809
_MARK: Final = "machine.json"
LOG: Final = "qemu.log"


@dataclass(frozen=True, slots=True)
class QemuSettings:
    """How machines run here. `accelerator`: "tcg" works everywhere; "kvm" where this host has it."""

    root: Path
    accelerator: str = "tcg"
    memory_reserve_mib: int = 256


class QemuCompute:
    """Machines on this host; see the module."""

    def __init__(self, settings: QemuSettings) -> None:
        self._settings = settings

    async def findings(self, spec: MachineSpec) -> tuple[Finding, ...]:
        """See `Compute`."""
        return tuple(_missing(spec, self._settings, self._at(spec.name) / "console"))

    async def create(self, spec: MachineSpec) -> None:
        """See `Compute`."""
        blocking = [each for each in await self.findings(spec) if each.blocking]
        if blocking:
            raise PermanentError(f"{spec.name} can't run here: {blocking[0].what}", hint=blocking[0].hint)
        where = self._at(spec.name)
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(where):
            text = json.dumps(asdict(spec), sort_keys=True)
            if await self.power(spec.name) is Power.RUNNING:
                if _text(where / _MARK) != text:
                    raise ConflictError(
                        f"a machine {spec.name} runs already, from something else",
                        hint="clean it up first, or give this one another name",
                        ours=text,
                        theirs=_text(where / _MARK),
                    )
                return
            (where / _MARK).write_text(text)
            ports = _free_ports(len(spec.ports))
            (where / "ports.json").write_text(json.dumps(dict(zip(map(str, spec.ports), ports, strict=True))))
            await self._start(spec, where, ports)

    async def power(self, name: str) -> Power:
        """See `Compute`."""
        where = self._at(name)
        if not (where / _MARK).exists():
            return Power.ABSENT
        return Power.STOPPED if running(where) is None else Power.RUNNING

    async def prove(self, spec: MachineSpec, wanted: Wanted) -> Proof:
        """See `Compute`."""
        where, began = self._at(spec.name), time.monotonic()
        wanted.evidence.mkdir(parents=True, exist_ok=True)
        kept = wanted.evidence / "console.log"
        console = Console(where / "console.log")
        try:
            banner = await console.until(wanted.banner, wanted.banner_seconds, lambda: running(where) is not None)
            seconds = time.monotonic() - began
            screenshot = await self._screenshot(where, wanted.evidence / "screen.png")
            said = ""
            if wanted.check is not None:
                said = await run_check(wanted.check, self._told(spec, where, wanted), wanted.check_seconds)
        finally:
            with suppress(FileNotFoundError):
                shutil.copyfile(where / "console.log", kept)
        return Proof(banner, seconds, kept, screenshot, said)

    async def shut_down(self, name: str, seconds: float) -> bool:
        """See `Compute`."""
        where = self._at(name)
        if running(where) is None:
            return True
        async with qmp.connect(where / "qmp") as machine:
            await machine.ask("system_powerdown")
        return await _ends(where, seconds)

    async def remove(self, name: str) -> None:
        """See `Compute`."""
        where = self._at(name)
        if not where.exists():
            return
        if not (where / _MARK).exists() and any(entry.name != ".lock" for entry in where.iterdir()):
            raise PermanentError(f"{where} is no machine of ours", hint="look what it is; it is left as it is")
        with _alone(where):
            if (process := running(where)) is not None:
                with suppress(TransientError, PermanentError):
                    async with qmp.connect(where / "qmp") as machine:
                        await machine.ask("quit")
                if not await _ends(where, QUIT_SECONDS):
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                    if not await _ends(where, QUIT_SECONDS):
                        raise PermanentError(f"QEMU {process} of {name} does not end", hint="look at that process")
            shutil.rmtree(where)

    async def _start(self, spec: MachineSpec, where: Path, ports: list[int]) -> None:
        for left in ("pid", "qmp", "console", LOG):  # of one that died
            (where / left).unlink(missing_ok=True)
        words = command(spec, where, self._settings.accelerator, ports)
        alive, held = os.pipe()  # nobody writes to it: it ends when QEMU does
        os.set_blocking(alive, False)
        try:
            try:
                with (where / LOG).open("wb") as log:
                    # Nobody's child: it stays when we end, and is reaped when it does. (QEMU's own -daemonize forks,
                    # which its sandbox forbids.)
                    process = await asyncio.create_subprocess_exec(
                        *("setsid", "--fork", *words), stdin=DEVNULL, stdout=log, stderr=log, pass_fds=(held,), cwd="/"
                    )
            finally:
                os.close(held)
            await process.wait()
            await _listens(spec.name, where, alive)
        finally:
            os.close(alive)

    async def _screenshot(self, where: Path, target: Path) -> Path:
        taken = where / "screen.png"  # QEMU may write only where it was started to
        async with qmp.connect(where / "qmp") as machine:
            await machine.ask("screendump", filename=str(taken), format="png")
        shutil.move(taken, target)
        return target

    def _told(self, spec: MachineSpec, where: Path, wanted: Wanted) -> dict[str, str]:
        forwarded: dict[str, int] = json.loads(_text(where / "ports.json") or "{}")
        return {
            "REPLICAR_MACHINE": spec.name,
            "REPLICAR_CONSOLE": str(where / "console"),
            "REPLICAR_CONSOLE_LOG": str(where / "console.log"),
            "REPLICAR_EVIDENCE": str(wanted.evidence),
            **{f"REPLICAR_PORT_{guest}": f"127.0.0.1:{here}" for guest, here in forwarded.items()},
        }

    def _at(self, name: str) -> Path:
        return self._settings.root.absolute() / name


def command(spec: MachineSpec, where: Path, accelerator: str, ports: list[int]) -> list[str]:
    """The command line: nothing secret is in it, and nothing is there but what the spec names."""
    words = [
        *(PROGRAM, "-name", spec.name, "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-accel", accelerator, "-cpu", "max" if accelerator == "tcg" else "host"),
        *("-machine", "q35", "-m", str(spec.memory_mib), "-smp", str(spec.processors)),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-pidfile", str(where / "pid"), "-qmp", f"unix:{where / 'qmp'},server=on,wait=off"),
        *("-chardev", f"socket,id=console,path={where / 'console'},server=on,wait=off,logfile={where / 'console.log'}"),
        *("-serial", "chardev:console", "-vga", "std", "-display", "none"),
    ]
    if spec.firmware is Firmware.UEFI:
        words += ["-bios", str(UEFI_FIRMWARE)]
    for number, disk in enumerate(spec.disks):
        words += ["-blockdev", json.dumps(_blockdev(disk, number)), "-device", _disk_device(spec.bus, number)]
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{here}-:{guest}" for guest, here in zip(spec.ports, ports, strict=True))
    restrict = "on" if spec.isolated else "off"
    card = "virtio-net-pci" if spec.bus is Bus.VIRTIO else "e1000"
    return [*words, "-netdev", f"user,id=net,restrict={restrict}{forwards}", "-device", f"{card},netdev=net,romfile="]


def _missing(spec: MachineSpec, settings: QemuSettings, longest: Path) -> Iterator[Finding]:
    if shutil.which(PROGRAM) is None:
        yield Finding(f"there is no {PROGRAM} here", "install QEMU (Debian: qemu-system-x86)")
    if spec.firmware is Firmware.UEFI and not UEFI_FIRMWARE.exists():
        yield Finding(f"there is no UEFI firmware at {UEFI_FIRMWARE}", "install it (Debian: ovmf)")
    if settings.accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        yield Finding("/dev/kvm can't be used here", 'set accelerator = "tcg", or give access to it')
    free = _memory_available_mib() - settings.memory_reserve_mib
    if free < spec.memory_mib:
        hint = "give the machine less memory, or run it on a larger host"
        yield Finding(f"{spec.name} wants {spec.memory_mib} MiB of memory, {free} are free here", hint)
    if len(os.fsencode(longest)) > _SOCKET_PATH_BYTES:
        yield Finding(f"{longest} is too long for a socket", "choose a shorter directory for machines")
    if spec.bus is Bus.SATA and len(spec.disks) > SATA_PORTS:
        yield Finding(f"{spec.name} has more than {SATA_PORTS} disks on SATA", "use the virtio bus")
    for disk in spec.disks:
        if "://" not in disk.place and not Path(disk.place).exists():
            yield Finding(f"disk {disk.name}: there is no {disk.place}", "recover or export it first")
    if settings.accelerator == "tcg":
        yield Finding("instructions are emulated: the machine is slow", 'set accelerator = "kvm"', blocking=False)


def _disk_device(bus: Bus, number: int) -> str:
    if bus is Bus.VIRTIO:
        return f"virtio-blk-pci,drive=disk{number},bootindex={number + 1}"
    return f"ide-hd,drive=disk{number},bus=ide.{number},bootindex={number + 1}"


def _blockdev(disk: DiskSource, number: int) -> dict[str, Any]:
    file: dict[str, Any]
    if "://" in disk.place:
        server, export = _nbd_server(disk)
        file = {"driver": "nbd", "server": server, "export": export, "reconnect-delay": RECONNECT_SECONDS}
    else:
        file = {"driver": "file", "filename": str(Path(disk.place).absolute())}
    return {"driver": "raw", "node-name": f"disk{number}", "discard": "unmap", "file": file}


def _nbd_server(disk: DiskSource) -> tuple[dict[str, str], str]:
    parts = urlsplit(disk.place)
    export = unquote(parts.path.removeprefix("/"))
    sockets = parse_qs(parts.query).get("socket", [])
    if parts.scheme == "nbd+unix" and len(sockets) == 1:
        return {"type": "unix", "path": sockets[0]}, export
    if parts.scheme == "nbd" and parts.hostname:
        return {"type": "inet", "host": parts.hostname, "port": str(parts.port or _NBD_PORT)}, export
    raise PermanentError(
        f"disk {disk.name}: {disk.place!r} is no place that QEMU can run from",
        hint="a raw file's path, nbd+unix:///EXPORT?socket=PATH, or nbd://HOST:PORT/EXPORT",
    )


def running(where: Path) -> int | None:
    """The process of the QEMU that holds this directory's pid file locked; None if there is none."""
    try:
        with (where / "pid").open("rb+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None  # nobody holds it: that QEMU is gone
    except FileNotFoundError:
        return None
    except OSError:
        text = _text(where / "pid").strip()
        return int(text) if text.isdigit() else None


async def _listens(name: str, where: Path, alive: int) -> None:
    """Return when QEMU takes commands."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with suppress(TransientError):
            async with qmp.connect(where / "qmp"):
                return
        with suppress(BlockingIOError):
            if not os.read(alive, 1):
                words = _text(where / LOG).strip()[-1000:]
                raise PermanentError(f"QEMU can't run {name}: {words}", hint="are its disks there, and its exports?")
        if time.monotonic() > deadline:
            raise TransientError(f"QEMU does not take commands for {name} within {START_SECONDS:.0f} s")
        await asyncio.sleep(_POLL_SECONDS)


async def _ends(where: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while running(where) is not None:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL_SECONDS)
    return True


@contextmanager
def _alone(where: Path) -> Iterator[None]:
    """One worker at a time makes or removes a machine; the lock goes with its process."""
    with (where / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TransientError(f"somebody else is at work on {where.name}", hint="try again in a moment") from None
        yield


def _free_ports(count: int) -> list[int]:
    """Free at this moment: QEMU takes them a moment later, and says so if somebody was faster."""
    held = [socket.socket() for _ in range(count)]
    try:
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in held]
    finally:
        for each in held:
            each.close()


def _memory_available_mib() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
