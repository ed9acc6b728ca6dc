"""Where a recovered machine runs: one narrow interface, and the two that stand behind it.

machine   what is to run (`MachineSpec`), what proves that it does (`Wanted`, `Proof`), and the interface `Compute`
check     the operator's own program that looks at a machine
qmp, qemu on this host, in QEMU, from NBD exports or files: what drills run on, here and now
azure     in Azure, from VHD blobs, through its SDK (an extra: `pip install replicar[azure]`)
"""
