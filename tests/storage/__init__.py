"""The page-blob client: one conformance suite for all stores, and what its decorators add."""
