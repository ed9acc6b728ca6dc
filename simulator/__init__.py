"""What stands around the product to try it: an application with its disk and its oracle, and a cluster of real parts.

disk_image, ext4_files, e2fsprogs        a disk with a real file system, made and looked into without root
workload, content, application           what is written to it, and by whom
traces                                   the same as a real machine's trace has it
oracle, recovered                        what a disk must hold, and whether a recovered one does
azurite, child, command, cluster         storage and the parts, as processes of their own by their real commands
demo                                     the whole story
"""
