"""The agent as a service of a machine."""
