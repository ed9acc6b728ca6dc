"""The life of one disk's file system: mounted, or taken over from an agent that is gone; unmounted, or left waiting.

    start   a keeper has it, at the same place    taken over: what was not answered is asked again
            a keeper has it, elsewhere            unmounted if nobody uses it, else refused
            nobody has it                         mounted, a keeper started
    end     nobody uses it                        unmounted
            somebody does                         left to the keeper: they wait for the next agent

Doing a request twice is sound. What the dead agent had not answered it may have logged and done, and it is logged and
done again. Between the two nothing else can have been written to the same place by anybody who relies on an order,
since nobody who does sends a second write before the first one is answered.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from pathlib import Path

from mobility_agent.capture.fuse.keeper import Keeper
from replicar.errors import PermanentError
from replicar.fuse import mount, protocol
from replicar.observe.logs import fields

_log = logging.getLogger(__name__)


class Session:
    """`unmount` may wait for what the front answers, so it belongs into a thread; the rest takes a moment.

    Args:
        disk: its name, for messages.
        file: what the disk is shown as; its directory is the mount point.
        keeper: the path of the keeper's socket.
    """

    def __init__(self, disk: str, file: Path, keeper: Path) -> None:
        self._disk, self._file = disk, file
        self._keeper = Keeper(keeper)
        self.fd = -1

    def begin(self) -> None:
        """Have the connection in `fd`.

        Raises:
            PermanentError: it can't be mounted, or another agent's file is in use.
        """
        mount.check(self._disk, self._file)
        kept = self._keeper.ask()
        if kept is not None and kept.directory == self._file.parent and _resumes(kept.fd):
            _log.info(
                "disk %s: %s is taken over as it is, with its users",
                self._disk,
                self._file,
                extra=fields(disk=self._disk),
            )
            self.fd = kept.fd
            with suppress(FileNotFoundError):  # nobody has looked at it yet
                os.write(self.fd, protocol.forget_attributes())  # the disk may have grown meanwhile
            return
        if kept is not None:
            os.close(kept.fd)
            self._give_up(kept.directory)
        self.fd = mount.mount(self._file.parent)
        try:
            self._keeper.start(self.fd, self._file.parent)
        except BaseException:
            mount.unmount(self._file.parent, lazily=True)
            os.close(self.fd)
            self.fd = -1
            raise

    def unmount(self) -> bool:
        """Take it away if nobody uses it; False: it is in use."""
        try:
            mount.unmount(self._file.parent)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    def close(self, *, unmounted: bool) -> None:
        """Close this end; a file that is still mounted is its keeper's until an agent is started again."""
        os.close(self.fd)
        self.fd = -1
        if unmounted:
            self._keeper.ended()
            return
        _log.warning(
            "disk %s: %s is in use; its users wait until an agent is started again (`mobility-agent release` lets them "
            "go, with errors)",
            self._disk,
            self._file,
        )

    def _give_up(self, directory: Path) -> None:
        """End what a keeper has and can't be gone on with."""
        if directory == self._file.parent:
            _log.error(
                "disk %s: this kernel can't ask again what an agent left unanswered (Linux 6.9 can): the users of %s "
                "get errors, and have to mount it anew",
                self._disk,
                self._file,
            )
            mount.unmount(directory, lazily=True)
        else:
            refuse_use(self._disk, directory)
        self._keeper.ended()


def refuse_use(disk: str, directory: Path) -> None:
    """Unmount what an earlier agent showed at `directory`.

    Raises:
        PermanentError: somebody uses it.
    """
    try:
        mount.unmount(directory)
    except OSError as error:
        raise PermanentError(
            f"disk {disk} is still shown in {directory}, and in use there ({error.strerror})",
            hint="set that `file` again; or `mobility-agent release`, at which its users get errors",
            disk=disk,
            path=str(directory),
        ) from None


def settle(keepers: Path, shown: set[str]) -> None:
    """Unmount what earlier agents showed of disks that are shown no longer.

    Args:
        keepers: the directory of their sockets, each by its disk's name.
        shown: names of the disks that are still shown as files.

    Raises:
        PermanentError: somebody uses one.
    """
    for path in sorted(keepers.iterdir()) if keepers.is_dir() else []:
        if path.name in shown:
            continue
        keeper = Keeper(path)
        if (kept := keeper.ask()) is not None:
            os.close(kept.fd)
            refuse_use(path.name, kept.directory)
            keeper.ended()


def release(keepers: Path) -> list[Path]:
    """Take every file that is left away, also from those who use it: they get errors. The directories they were in."""
    released: list[Path] = []
    for path in sorted(keepers.iterdir()) if keepers.is_dir() else []:
        keeper = Keeper(path)
        if (kept := keeper.ask()) is None:
            continue
        mount.unmount(kept.directory, lazily=True)
        os.close(kept.fd)
        keeper.ended()
        released.append(kept.directory)
    return released


def _resumes(fd: int) -> bool:
    """Ask the kernel to ask again what nobody answered; False if it does not know how to."""
    try:
        os.write(fd, protocol.resend())
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENODEV, errno.ENOENT, errno.EPERM):
            return False
        raise
    return True
