"""A machine's sealed log in storage, read in order: what the process server resumes from and recovery recovers from.

Offers `LogReader`, which walks runs and stripes, verifies the chain and hands out opened segment tables.
"""
