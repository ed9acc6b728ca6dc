"""Traces of real machines' input and output, read so that they can be done again: fio iologs, blktrace, MSR Cambridge.

    record                  one operation of a trace, and the lines that it is read from
    fio, blktrace, msr      one format each: lines in, records out, pure and streaming
    replay, retold          records fitted to a disk, as a workload like any other; a story with it

A parser takes what its format's documentation has and refuses everything else by file and line: a trace that was half
understood would be a workload that nobody ran.
"""
