"""`replicar demo`: the whole story on one machine, against a real Azurite, without root, in about a minute.

run      the entry point: an exit status, 0 only if every check was true
plan     how large, how fast, how long
story    what happens, in order
report   what came of it, as a table and as JSON
display  progress, for people
"""

from simulator.demo.entry import run
from simulator.demo.plan import Plan

__all__ = ["Plan", "run"]
