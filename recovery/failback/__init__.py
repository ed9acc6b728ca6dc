"""The way home: what differs between two copies of a disk, from their histories, and carrying just that.

spans   which bytes of a disk, as sorted stretches; what two states of a log differ in
carry   copies stretches from one disk to another, and compares them
"""
