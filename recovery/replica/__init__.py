"""A warm replica: VHD page blobs of a machine's disks, kept close behind its log, so that a failover has little to do.

`fenced` writes a blob that is rewritten, as its only writer; `journal` says what the blobs hold; `warm` brings them on.
"""
