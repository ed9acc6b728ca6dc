"""The agent as a machine's service: what is looked at before, the unit, and the steps to install and to remove it."""
