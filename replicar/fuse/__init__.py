"""A disk shown as a file by the kernel's FUSE protocol, without a helper program or a library.

`protocol` is the kernel's language for a directory with one file, `channel` hears and speaks it, `mount` puts such a
directory somewhere. What the file holds is each part's own: the agent's front captures writes, recovery's reads the
sealed log.
"""
