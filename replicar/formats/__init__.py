"""What lies on disks, wires and in blobs, as pure functions: bytes in, values out, and back again.

No module here does input or output. docs/formats.md has the same layouts as byte tables with worked examples; the
golden files under tests/golden hold them still.

Offers: `frame` (the one unit from capture to blob), `record` (what MARK, GAP, DISK and AUDIT carry), `changelog` (the
agent's .hrl files), `wire` (what agent and process server say to each other), `segment` (frames, compressed and
sealed), `logblob` (where segments lie in page blobs) and `vhd` (what Azure imports).
"""
