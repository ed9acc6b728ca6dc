"""Brings machines back from their sealed logs: index, points, views, and what views are written to.

    log in page blobs -> Index (extents of every disk) -> Point (which state) -> View (its bytes) -> VHD, file

Offers: `extents` (the map of one disk), `records` and `index` (what a log says, up to a sequence), `points` (which
states may be asked for, and by what name), `chunks` and `view` (the bytes of one state), `output` (where they go) and
`verify` (every byte of a log checked).
"""
