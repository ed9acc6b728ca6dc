"""Trace capture: the changes of live block devices, which stay mounted as they are, by the kernel's own events.

`choice` says what a device can have, `capture` does it. The parts beneath, from the kernel up:

    bpf, tracing -> events | tracefs     records of block requests, and how many were lost
    counters                             the kernel's own count of sectors, to prove that none is missing
    extents -> tracked                   what of a disk is dirty and what is under way
    guard (undo) -> freeze -> still      holding the file systems, and nothing for longer than the budget
    follower, copier, stage -> capture   copies into the change log, and points
"""
