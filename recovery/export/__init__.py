"""Serves a view over NBD, straight from the sealed log: read-only, or with an overlay that is thrown away or kept.

`overlay` is the file that takes what is written, `disk` puts it over the view, `server` and `connection` speak NBD.
"""
