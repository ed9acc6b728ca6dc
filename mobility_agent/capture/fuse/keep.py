"""The keeper's whole program: holds a file system's connection to the kernel while the agent is away.

Run as text by a process of its own (see `keeper`): `keep.py FUSE LISTENER PATH NOTE`, two descriptors, the socket's
path, and what is said with the connection to whoever asks for it. It ends when the file system is unmounted, which the
kernel says by an error condition on the connection. It imports nothing of the agent, so that the agent can be replaced
under it.
"""

import contextlib
import os
import select
import signal
import socket
import struct
import sys


def main() -> None:
    fuse, listener_fd, path, note = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4].encode()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # those are for the agent; this ends with the file system
    listener = socket.socket(fileno=listener_fd)
    poll = select.poll()
    poll.register(fuse, 0)  # errors alone: requests are the agent's
    poll.register(listener, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        if fuse in ready:
            break
        asker, _ = listener.accept()
        with asker:
            asker.settimeout(2.0)
            _, user, _ = struct.unpack("3i", asker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if user == os.geteuid():
                try:
                    socket.send_fds(asker, [note], [fuse])
                except OSError:
                    continue  # it died; the next one asks again
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


main()
