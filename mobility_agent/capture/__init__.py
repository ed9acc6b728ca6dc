"""Ways to learn of a disk's changes. Now: `inline`, where the agent serves the disk over NBD and sees every write.

`disk` is the protected disk itself, `nbd` the protocol's words and handshake without any socket.
"""
