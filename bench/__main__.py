"""`python -m bench NAME [--json] [options]`: runs one benchmark; without a name, lists them.

The exit status is 0 only if the run was valid: it measured what it says, whatever the figures are.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import capture, churn, datapath, fleet, limit, recovery, seed, simulator, writes
from bench.report import Report, show
from replicar.errors import ReplicarError


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark by name: one line about it, its options, and what runs it (options given as keywords)."""

    about: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[..., Report]


def _limit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mib", type=int, default=limit.DEFAULT_MIB, help="MiB of input for each step (%(default)s)")
    parser.add_argument("--level", type=int, help="zstd's level (the process server's default)")


def _workload_option(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--workload", choices=writes.NAMES, default=default, help="where writes go (%(default)s)")


def _datapath_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gib", type=float, default=datapath.DEFAULT_GIB, help="GiB of changes (%(default)s)")
    parser.add_argument(
        "--frame-kib", type=int, default=datapath.DEFAULT_FRAME_KIB, help="payload of a frame in KiB (%(default)s)"
    )
    parser.add_argument("--write-kib", type=int, default=datapath.DEFAULT_WRITE_KIB, help="KiB a write (%(default)s)")
    parser.add_argument(
        "--workload", choices=writes.NAMES, default=datapath.DEFAULT_WORKLOAD, help="where writes go (%(default)s)"
    )
    parser.add_argument("--limit-mib", type=int, default=limit.DEFAULT_MIB, help="as --mib of limit (%(default)s)")


def _capture_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=capture.DEFAULT_SECONDS, help="of each turn (%(default)s)")
    parser.add_argument("--rounds", type=int, default=capture.DEFAULT_ROUNDS, help="turns of each (%(default)s)")
    parser.add_argument("--mib", type=int, default=capture.DEFAULT_MIB, help="MiB of each disk (%(default)s)")


def _churn_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mb-per-s", type=float, default=churn.DEFAULT_MB_PER_S, help="of writes (%(default)s)")
    parser.add_argument("--seconds", type=float, default=churn.DEFAULT_SECONDS, help="at that rate (%(default)s)")
    parser.add_argument(
        "--step-seconds",
        type=float,
        default=churn.DEFAULT_STEP_SECONDS,
        help="for each higher rate; 0 tries none (%(default)s)",
    )
    parser.add_argument("--disk-mib", type=int, default=churn.DEFAULT_DISK_MIB, help="MiB of the disk (%(default)s)")
    parser.add_argument(
        "--workload", choices=writes.NAMES, default=churn.DEFAULT_WORKLOAD, help="where writes go (%(default)s)"
    )


def _simulator_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=simulator.DEFAULT_SEEDS, help="stories (%(default)s)")
    parser.add_argument("--tries", type=int, default=simulator.DEFAULT_TRIES, help="for a planted bug (%(default)s)")


def _fleet_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--agents", type=int, default=fleet.DEFAULT_AGENTS, help="machines (%(default)s)")
    parser.add_argument("--seconds", type=float, default=fleet.DEFAULT_SECONDS, help="measured (%(default)s)")
    parser.add_argument(
        "--modest-mb-per-s",
        type=float,
        default=fleet.DEFAULT_MB_PER_S,
        help="of all machines but the greedy one (%(default)s)",
    )
    parser.add_argument("--frame-kib", type=int, default=fleet.DEFAULT_FRAME_KIB, help="KiB a frame (%(default)s)")


def _seed_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gib", type=float, default=seed.DEFAULT_GIB, help="GiB of the disk (%(default)s)")
    parser.add_argument("--delta-mib", type=int, default=seed.DEFAULT_DELTA_MIB, help="MiB changed (%(default)s)")
    parser.add_argument("--replicar-first", action="store_true", help="copy before AzCopy does, not after")


BENCHMARKS: Final = {
    "limit": Benchmark(
        "cpu seconds per GB of the libraries alone, and the throughput these cores could reach at best",
        _limit_options,
        limit.run,
    ),
    "datapath": Benchmark(
        "agent to process server to an HTTPS sink: throughput and cpu seconds per GB, beside the limit",
        _datapath_options,
        datapath.run,
    ),
    "capture": Benchmark(
        "what it costs whoever writes that the agent captures it: beside a server that logs nothing",
        _capture_options,
        capture.run,
    ),
    "churn": Benchmark(
        "8 KiB random writes through the whole path: the RPO at a rate, and the highest rate that is held",
        _churn_options,
        churn.run,
    ),
    "fleet": Benchmark(
        "a thousand machines on one process server, one of them greedy: memory, and the RPO of the others",
        _fleet_options,
        fleet.run,
    ),
    "seed": Benchmark(
        "the first copy of an ext4 disk beside AzCopy, and of 40 MB that changed beside restic's second run",
        _seed_options,
        seed.run,
    ),
    "recovery": Benchmark(
        "how soon any point of a large disk can be read, how fast a disk comes back, how soon a guest boots",
        recovery.options,
        recovery.run,
    ),
    "simulator": Benchmark(
        "stories a second of the simulation, on one core, and how many planted bugs it finds",
        _simulator_options,
        simulator.measure,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:<10}{benchmark.about}")
        return 0
    options = _parser().parse_args(given)
    values: dict[str, Any] = vars(options)
    name, as_json = values.pop("name"), values.pop("json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # temporary files go, as with Ctrl-C
    try:
        report = BENCHMARKS[name].run(**values)
    except ReplicarError as error:
        print(f"bench {name}: {error}", file=sys.stderr)
        return error.exit_status
    report = dataclasses.replace(report, arguments=tuple(given))
    show(report, as_json=as_json)
    return 0 if report.valid else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.about, description=benchmark.about)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.add_argument(
            "--directory", type=Path, help="where temporary files go: the cache's disk (default: /tmp)"
        )
        benchmark.options(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
