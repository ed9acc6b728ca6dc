"""A disk of a view mounted, so that single files can be taken out of it.

`front` shows the disk as a file (FUSE), `volumes` finds what can be mounted in it, `mounting` puts the two together by
a loop device and takes all of it away again.
"""
