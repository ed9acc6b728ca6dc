"""The guard's process: undoes what the agent began, when the agent dies or takes too long. Started by `guard`.

It is given descriptors and a deadline before anything is frozen, so it needs nothing of the agent to thaw. It imports
the standard library only, keeps its memory locked and ignores the signals a service manager ends a group with: it goes
when the agent's end of the socket is closed, and by then everything is undone.

Messages, one datagram each: F + deadline (f64, CLOCK_MONOTONIC) with the file systems' descriptors; T: they are thawed;
R + name with a directory's descriptor: remove this name in it at the end; K: don't. Each is answered with one byte.
"""

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import time
from contextlib import suppress

FITHAW = 0xC0045878
RETRY_SECONDS = 0.005
REMOVE_TRIES = 100
REMOVE_SECONDS = 0.02
MAX_DESCRIPTORS = 64


def thaw(descriptors: list[int]) -> None:
    for descriptor in reversed(descriptors):
        with suppress(OSError):  # it is not frozen, or not yet: tried again until the agent says that it is thawed
            fcntl.ioctl(descriptor, FITHAW, 0)


def close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
    descriptors.clear()


def remove_directory(parent: int, name: str) -> None:
    for _ in range(REMOVE_TRIES):
        try:
            os.rmdir(name, dir_fd=parent)
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(REMOVE_SECONDS)  # the dying agent's descriptors in it are not all closed yet


def guard(agent: socket.socket) -> None:
    frozen: list[int] = []
    deadline = 0.0
    remove: tuple[int, str] | None = None
    with suppress(ConnectionError):  # killed between its message and the answer; that is an end like any other
        while True:
            wait = max(deadline - time.monotonic(), 0.0) if frozen else None
            if not select.select([agent], [], [], wait)[0]:
                thaw(frozen)
                deadline = time.monotonic() + RETRY_SECONDS
                continue
            message, descriptors, _, _ = socket.recv_fds(agent, 4096, MAX_DESCRIPTORS)
            if not message:
                break
            if message[:1] == b"F":
                close(frozen)
                frozen = descriptors
                (deadline,) = struct.unpack("<d", message[1:])
            elif message == b"T":
                close(frozen)
            elif message[:1] == b"R":
                remove = descriptors[0], message[1:].decode()
            elif message == b"K":
                remove = None
            agent.send(b".")
    thaw(frozen)
    if remove is not None:
        remove_directory(*remove)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-1000")
    except OSError:
        pass  # without the right to, it is killed no sooner than others
    ctypes.CDLL(None).mlockall(3)  # now and later: thawing must not wait for memory that waits for the frozen disk
    with socket.socket(fileno=int(sys.argv[1])) as agent:
        guard(agent)


if __name__ == "__main__":
    main()
