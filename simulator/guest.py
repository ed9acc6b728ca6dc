"""A small Linux guest: a disk that boots by itself, and the QEMU that runs it (TCG: no KVM is needed).

The disk has an MBR, an ext4 partition and extlinux; in the initial RAM disk is busybox with one script, which works on
the partition: each record is a file of random bytes, synced, and then its number and SHA-256 are printed on the serial
line. So what the line says is what the guest was told is durable. `quit` on the line ends it in good order. With a
database (`guest_database`) the records are rows instead, written by SQLite.

    boot N          N boots of this disk so far, this one included
    kept N          records found when it booted, each checked against its sum
    record N SUM    written and durable
    end             unmounted; the machine powers off

Making the disk mounts it, so it takes root; running it does not.

The kernel is told not to check its timer: on a busy host an emulated one is late, which the kernel takes for broken.

Weak: emulated instructions are slow: some seconds from power to the first record.
"""

from __future__ import annotations

import asyncio
import gzip
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from replicar.errors import PermanentError
from simulator import guest_database

DISK_BYTES: Final = 96 << 20
PARTITION_BYTES: Final = 1 << 20  # where it begins
BOOT_SECONDS: Final = 240.0
END_SECONDS: Final = 30.0
MODULES: Final = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")
MBR: Final = Path("/usr/lib/EXTLINUX/mbr.bin")
#: Where `make setup` unpacks Debian's kernel for guests.
KERNEL: Final = Path(__file__).resolve().parents[1] / ".guest"
TOOLS: Final = ("qemu-system-x86_64", "busybox", "extlinux", "sfdisk", "mkfs.ext4", guest_database.PROGRAM)

_INIT: Final = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /disk
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
echo 1 >/proc/sys/kernel/printk
for module in {modules}; do insmod /modules/$module.ko; done
n=0; while [ ! -b /dev/vda1 ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n + 1)); done
mount -t ext4 /dev/vda1 /disk || {{ echo "no disk"; poweroff -f; }}
boots=$(cat /disk/boots 2>/dev/null || echo 0); boots=$((boots + 1)); echo $boots >/disk/boots; sync
echo "boot $boots"
{work}umount /disk
echo end
poweroff -f
"""
#: Records as files.
_FILES: Final = """\
mkdir -p /disk/records
number=0
while [ -e /disk/records/$((number + 1)) ]; do
    number=$((number + 1))
    sum=$(sha256sum /disk/records/$number | cut -d' ' -f1)
    [ "$(cat /disk/records/$number.sum)" = "$sum" ] || { echo "damaged $number"; poweroff -f; }
done
echo "kept $number"
while ! read -t 0.05 line || [ "$line" != quit ]; do
    number=$((number + 1))
    dd if=/dev/urandom of=/disk/new bs=16384 count=1 2>/dev/null
    sum=$(sha256sum /disk/new | cut -d' ' -f1)
    echo $sum >/disk/records/$number.sum
    mv /disk/new /disk/records/$number
    sync
    echo "record $number $sum"
done
"""
_BOOT: Final = """\
SERIAL 0 115200
DEFAULT linux
PROMPT 0
TIMEOUT 1
LABEL linux
 LINUX /boot/vmlinuz
 INITRD /boot/initrd.gz
 APPEND console=ttyS0 quiet panic=-1 no_timer_check
"""


def missing() -> str:
    """What is needed and not there, in words; empty if nothing is."""
    for tool in TOOLS:
        if shutil.which(tool, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin") is None:
            return f"there is no {tool} here; `make setup` as root installs it"
    if not MBR.exists():
        return f"there is no {MBR}; `make setup` as root installs it"
    return "" if (KERNEL / "vmlinuz").exists() else "there is no kernel for guests; `make setup` as root fetches it"


def make_disk(path: Path, *, database: bool = False) -> None:
    """A disk that boots, at `path`. As root: it is mounted for a moment.

    Args:
        database: the records are rows of a database, instead of files.

    Raises:
        PermanentError: something is missing, or a tool failed.
    """
    if words := missing():
        raise PermanentError(words)
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    _run(["sfdisk", "-q", str(path)], given=f"{PARTITION_BYTES // 512},,83,*\n".encode())
    with path.open("r+b") as file:
        file.write(MBR.read_bytes()[:440])
    with tempfile.TemporaryDirectory(prefix="replicar-guest-") as scratch:
        mountpoint = Path(scratch) / "mounted"
        mountpoint.mkdir()
        loop = _run(["losetup", "-f", "--show", "-o", str(PARTITION_BYTES), str(path)]).strip()
        try:
            _run(["mkfs.ext4", "-q", "-F", "-O", "^64bit,^metadata_csum", loop])
            _run(["mount", loop, str(mountpoint)])
            try:
                boot = mountpoint / "boot"
                boot.mkdir()
                shutil.copy(KERNEL / "vmlinuz", boot / "vmlinuz")
                work = guest_database.SCRIPT if database else _FILES
                (boot / "initrd.gz").write_bytes(_initial_ram_disk(Path(scratch), work))
                if database:
                    guest_database.put(mountpoint)
                (boot / "extlinux.conf").write_text(_BOOT)
                _run(["extlinux", "-i", str(boot)])
            finally:
                _run(["umount", str(mountpoint)])
        finally:
            _run(["losetup", "-d", loop])


def _initial_ram_disk(scratch: Path, work: str) -> bytes:
    root = scratch / "initrd"
    for name in ("bin", "modules"):
        (root / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, root / "bin" / "busybox")
    for module in MODULES:
        shutil.copy(KERNEL / "modules" / f"{module}.ko", root / "modules")
    (root / "init").write_text(_INIT.format(modules=" ".join(MODULES), work=work))
    (root / "init").chmod(0o755)
    names = sorted(str(found.relative_to(root)) for found in root.rglob("*"))
    packed = subprocess.run(
        [str(root / "bin" / "busybox"), "cpio", "-o", "-H", "newc"],
        cwd=root,
        input="\n".join(names).encode() + b"\n",
        capture_output=True,
        timeout=60,
        check=True,
    )
    return gzip.compress(packed.stdout, mtime=0)


def _run(command: Sequence[str], *, given: bytes = b"") -> str:
    path = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    done = subprocess.run(command, input=given, capture_output=True, timeout=120, check=False, env=path)
    if done.returncode:
        raise PermanentError(
            f"`{' '.join(command)}` ended with status {done.returncode}: {done.stderr.decode()[-500:]}"
        )
    return done.stdout.decode()


class Guest:
    """A running guest; an asynchronous context manager, after which no process is left.

    Args:
        drive: what QEMU takes as `file=`: a path, or a URI of NBD.
    """

    def __init__(self, drive: str) -> None:
        self._drive = drive
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._heard = asyncio.Event()
        self.lines: list[str] = []

    async def __aenter__(self) -> Guest:
        drive = f"file={self._drive},format=raw,if=virtio,cache=none,discard=unmap"
        self._process = await asyncio.create_subprocess_exec(
            *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-no-reboot"),
            *("-display", "none", "-serial", "stdio", "-drive", drive),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        assert self._reader is not None
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    @property
    def records(self) -> dict[int, str]:
        """The sums of the records that it said are durable."""
        words = [line.split() for line in self.lines]
        return {int(each[1]): each[2] for each in words if len(each) == 3 and each[0] == "record"}

    def said(self, word: str) -> int:
        """The number behind a word.

        Raises:
            PermanentError: the guest did not say it.
        """
        for line in self.lines:
            if line.startswith(f"{word} "):
                return int(line.split()[1])
        raise PermanentError(f"the guest did not say {word!r}", hint="\n".join(self.lines[-10:]))

    async def until(self, words: str, *, count: int = 1, seconds: float = BOOT_SECONDS) -> None:
        """Wait until so many lines begin with `words`.

        Raises:
            PermanentError: they did not come in time.
        """
        try:
            async with asyncio.timeout(seconds):
                while sum(line.startswith(words) for line in self.lines) < count:
                    self._heard.clear()
                    await self._heard.wait()
        except TimeoutError:
            last = "\n".join(self.lines[-15:])
            raise PermanentError(f"the guest did not say {words!r} in {seconds:.0f} s", hint=last) from None

    async def quit(self) -> None:
        """End it in good order."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(b"quit\n")
        await self.until("end", seconds=END_SECONDS)
        async with asyncio.timeout(END_SECONDS):
            await self._process.wait()

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            self.lines.append(line.decode(errors="replace").strip())
            self._heard.set()
