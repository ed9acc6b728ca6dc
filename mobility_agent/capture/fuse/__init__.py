"""The FUSE front of inline capture: a disk as a file to put a loop device on, for whoever mounts it on its own host."""
