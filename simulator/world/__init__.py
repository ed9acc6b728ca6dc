"""A world for the real code to run in: time, machines, networks, disks and storage that follow from one seed.

    loop        virtual time: an asyncio event loop that never waits and never touches a socket
    processes   machines and the processes on them, which can die at any call
    calls       the operating system's calls, as the processes see them
    files       what a disk has durably, and what a power cut leaves of it
    network     connections between machines: delays, cuts, stalls
    clocks      each machine's idea of the time
    blobs       page-blob storage that throttles, fails, answers late and does late what it said had failed

Nothing of the product knows of it. The parts already take clock and storage as arguments; the rest of their world is
what the operating system gives them, so it is replaced there: the event loop, and the functions of `os`, `mmap` and
`random` by which the product reaches the outside. What lies in files really lies in files (in memory), so a mapping is
a mapping; what is simulated is what of it would survive.
"""
