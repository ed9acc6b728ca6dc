"""NBD, the network block device protocol, from the server's end and without a socket.

`protocol` has its words and the handshake, `replies` how requests are answered, `tls` whom a server meets over TLS. The
transmission phase is where bytes move, so each server has its own: the agent's receives into the change log, recovery's
reads out of the sealed log.
"""
