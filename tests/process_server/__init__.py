"""Stories of the process server: pure cores by themselves, then the real thing on the loopback with real TLS."""
