"""What stories of jobs in storage and in Azure need: a real config server, db1 with its log in Azurite, a stage."""

from __future__ import annotations

from tests.cli.conftest import store, stored, target
from tests.config_server.conftest import cast, clock, founded, house, vault_directory
from tests.recovery.worker.azure_stage import stage

__all__ = ["cast", "clock", "founded", "house", "stage", "store", "stored", "target", "vault_directory"]
