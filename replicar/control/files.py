"""Small files that must be whole and often secret: keys, certificates, identities.

A file is written beside its place, made durable and renamed, so that a reader sees the old bytes or the new ones and
never a part. A secret is created readable by its owner alone (never widened, then narrowed), and is refused when it
is read back with wider permissions: somebody else may have it by then.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Final

from replicar.errors import LimitError, PermanentError

SECRET_MODE: Final = 0o600
PUBLIC_MODE: Final = 0o644
DIRECTORY_MODE: Final = 0o700
#: Nothing kept this way is anywhere near as long; more is a mistaken path.
MAX_SMALL_FILE_BYTES: Final = 1 << 20


def write_file(path: Path, data: bytes, *, mode: int = SECRET_MODE) -> None:
    """Put `data` at `path` durably and at once; an existing file is replaced.

    Raises:
        PermanentError: when the directory is missing or not writable.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)
    except OSError as error:
        raise PermanentError(
            f"can't write {path}: {error.strerror}", hint="check the directory, its owner and its space", path=str(path)
        ) from error


def read_file(path: Path, *, what: str, hint: str = "", secret: bool = False) -> bytes:
    """The bytes of a small file; `what` names it in errors, `hint` says what to do when it is missing.

    Raises:
        PermanentError: it is missing, unreadable, or a secret that others may read.
        LimitError: it is longer than any such file can be.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(MAX_SMALL_FILE_BYTES + 1)
    except OSError as error:
        raise PermanentError(f"can't read {what} at {path}: {error.strerror}", hint=hint, path=str(path)) from error
    if len(data) > MAX_SMALL_FILE_BYTES:
        raise LimitError(f"{path} is too long to be {what}", hint="check the path", path=str(path))
    if secret and mode & 0o077:
        raise PermanentError(
            f"{what} at {path} may be read by others (mode {mode:04o})",
            hint=f"if nobody else has had it, run: chmod 600 {path}",
            path=str(path),
        )
    return data


def make_directory(path: Path) -> None:
    """Make `path` (and its parents) if it is missing; a new one belongs to its owner alone.

    Raises:
        PermanentError: when it can't be made, or something else is there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    except OSError as error:
        raise PermanentError(
            f"can't make the directory {path}: {error.strerror}",
            hint="choose another place, or check the owner of its parent",
            path=str(path),
        ) from error


def sync_directory(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
