"""Faults: what the world does to the product, each with a contract that says what has to survive it.

catalogue   the kinds by name, and `Fault`, one of them at one time
links       between machines
deaths      of processes and machines
disks       of machines
storage     of the blob service
control     the config server, who serves whom, clocks
"""
