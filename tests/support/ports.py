"""Ports for tests that can't bind port 0 themselves, because the port has to be written down beforehand.

Prefer binding port 0 and asking what it became. A port from here was free a moment ago; nothing keeps it so.
"""

from __future__ import annotations

import socket


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
