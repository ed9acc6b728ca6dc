"""The process server among everything that fails: its own death, its disk's memory, storage in trouble; by seeds."""
