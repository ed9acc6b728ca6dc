"""The mobility agent: captures the changes of a machine's disks and streams them to a process server.

capture/ takes writes in, `changelog` keeps them in order on disk, `ladder` says what is done when order can't be kept,
`seeding` copies what was there before, `sender` streams, `service` holds it all together. It uses replicar/ only.
"""
