"""`python -m replicar.cli` is `replicar`."""

from replicar.cli.app import main

main()
