"""The page-blob client: one narrow protocol, Azure behind it, limits and retries around it.

A part opens a `PageBlobStore` from a `StorageTarget` with `open_store`; tests and the simulator hand in a
`MemoryStore`.
"""

from replicar.storage.memory import MemoryStore
from replicar.storage.store import BlobInfo, CopySource, PageBlobStore, is_missing, outcome_is_certain
from replicar.storage.target import StorageTarget, open_store

__all__ = [
    "BlobInfo",
    "CopySource",
    "MemoryStore",
    "PageBlobStore",
    "StorageTarget",
    "is_missing",
    "open_store",
    "outcome_is_certain",
]
