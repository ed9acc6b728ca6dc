"""Which parts of a disk its file systems do not use: pure parsers over reads, none of which belongs to one platform."""
