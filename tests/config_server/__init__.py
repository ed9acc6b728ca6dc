"""The config server and its client against each other: real TLS on loopback, real SQLite, a clock that can be set."""
