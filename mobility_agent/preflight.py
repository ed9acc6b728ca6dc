"""What has to hold on the machine before capture begins, and can be known beforehand; each failure names its thing.

The disks themselves are judged where they are opened (`capture.disk`), TCP ports where they are bound.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from mobility_agent.settings import AgentSettings, CaptureKind
from replicar.control.files import make_directory
from replicar.errors import PermanentError


def check(settings: AgentSettings, log_directory: Path) -> None:
    """Look at everything that the settings ask of this machine.

    Raises:
        PermanentError: naming the first thing that is not right.
    """
    check_journal_space(settings, log_directory)
    if settings.capture is not CaptureKind.INLINE:
        return
    given = {disk.name for disk in settings.disks if disk.nbd}
    for name, address in settings.addresses.items():
        if address.path is not None:
            if name not in given:
                make_directory(address.path.parent)
            check_socket(name, address.path)


def check_journal_space(settings: AgentSettings, log_directory: Path, *, where: Path | None = None) -> None:
    """The change log's limit must fit where it is kept: what it takes already, and what is free.

    Args:
        where: a directory on the same file system, should the settings' own not exist yet.

    Raises:
        PermanentError: it does not.
    """
    held = sum(entry.stat().st_blocks * 512 for entry in log_directory.iterdir()) if log_directory.is_dir() else 0
    system = os.statvfs(where or settings.directory)
    free = system.f_bavail * system.f_frsize
    if held + free < settings.journal_bytes:
        raise PermanentError(
            f"journal_bytes is {int(settings.journal_bytes)}, but {settings.directory} has room for {held + free} only",
            hint="free space there, choose another directory, or set a smaller journal_bytes",
            path=str(settings.directory),
            journal_bytes=int(settings.journal_bytes),
            free_bytes=free,
        )


def check_socket(disk: str, path: Path) -> None:
    """A socket path must be free, or left by an agent that is gone.

    Raises:
        PermanentError: something answers there, something else lies there, or its directory is missing.
    """
    where = {"disk": disk, "path": str(path)}
    if not path.parent.is_dir():
        raise PermanentError(
            f"disk {disk} can't be served at {path}: there is no directory {path.parent}",
            hint="make it, or set another `nbd` for this disk",
            **where,
        )
    if not os.path.lexists(path):
        return
    if not path.is_socket():
        raise PermanentError(
            f"disk {disk} can't be served at {path}: something that is no socket lies there",
            hint="remove it, or set another `nbd` for this disk",
            **where,
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return  # left by a process that is gone
        except TimeoutError:
            pass  # somebody listens, and takes no more
        except OSError as error:
            raise PermanentError(
                f"disk {disk} can't be served at {path}: {error.strerror}",
                hint="check the socket's owner, or set another `nbd` for this disk",
                **where,
            ) from None
    raise PermanentError(
        f"disk {disk} can't be served at {path}: another process serves there",
        hint="stop it (another agent or NBD server), or set another `nbd` for this disk",
        **where,
    )
