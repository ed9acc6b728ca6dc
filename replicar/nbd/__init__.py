"""NBD, the network block device protocol, from the server's end.

`protocol` has its words and the handshake, `greeting` carries the handshake out on a connection, `replies` is how
requests are answered, `tls` whom a server meets over TLS. The transmission phase is where bytes move, so each server
has its own: the agent's receives into the change log, recovery's reads out of the sealed log. `client` is the other
end.
"""
