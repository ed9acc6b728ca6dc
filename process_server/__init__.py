"""The process server: takes machines' streams on port 9443, keeps them durable, seals them, stores them as page blobs.

The path, in the order bytes take it: `ingest` (TLS, HELLO) -> `receiver` and `intake` (frames) -> `slots` and `cache`
(the buffer a byte arrives in is the buffer that is written to the cache file) -> `commit` (one sync for all machines)
-> `stream` (what of which machine is received, cut, stored) -> `sealer` -> `pipeline` -> `logwriter`. Around it:
`machine` (one machine's life), `assignments`, `health`, `service`, `settings`, `cli`.
"""
